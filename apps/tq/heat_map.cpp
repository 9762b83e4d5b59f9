#include "heat_map.h"

#include <algorithm>
#include <cmath>

#include <fmt/format.h>

namespace turboquant::app {
namespace {

constexpr int kCellWidth = 52;
constexpr int kCellHeight = 22;
constexpr int kLeft = 64;   // of a panel, for its labels
constexpr int kTop = 30;    // for its title
constexpr int kBottom = 30; // for the columns' labels
constexpr int kMargin = 16;
constexpr int kHeader = 34;
constexpr int kFooter = 24;
constexpr size_t kPanelsInARow = 4;

std::string escaped(const std::string& text) {
    std::string result;
    for (const char c : text) {
        result += c == '<' ? "&lt;" : c == '>' ? "&gt;" : c == '&' ? "&amp;" : c == '"' ? "&quot;" : std::string(1, c);
    }
    return result;
}

std::string words(double x, double y, const char* anchor, int size, const std::string& colour,
                  const std::string& text) {
    return fmt::format("<text x=\"{}\" y=\"{}\" text-anchor=\"{}\" font-size=\"{}\" fill=\"{}\">{}</text>\n", x, y,
                       anchor, size, colour, escaped(text));
}

// From orange (nothing) over white to blue (everything): told apart without red and green.
std::string colour_of(double share) {
    const double none[3] = {216, 110, 20};
    const double half[3] = {247, 247, 247};
    const double all[3] = {33, 102, 172};
    int rgb[3];
    for (int i = 0; i < 3; ++i) {
        const double value =
            share < 0.5 ? none[i] + (half[i] - none[i]) * share * 2 : half[i] + (all[i] - half[i]) * (share - 0.5) * 2;
        rgb[i] = static_cast<int>(std::lround(value));
    }
    return fmt::format("#{:02x}{:02x}{:02x}", rgb[0], rgb[1], rgb[2]);
}

} // namespace

std::string to_svg(const HeatMap& map) {
    const int panel_width = kLeft + kCellWidth * static_cast<int>(map.columns.size()) + kMargin;
    const int panel_height = kTop + kCellHeight * static_cast<int>(map.rows.size()) + kBottom;
    const size_t across = std::min(kPanelsInARow, std::max<size_t>(1, map.panels.size()));
    const size_t down = (map.panels.size() + across - 1) / across;
    // A single narrow panel must still hold the title.
    const int width =
        std::max(static_cast<int>(across) * panel_width, 8 * static_cast<int>(map.title.size())) + kMargin;
    const int height = kHeader + static_cast<int>(down) * panel_height + kFooter;
    std::string svg =
        fmt::format("<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{0}\" height=\"{1}\" viewBox=\"0 0 "
                    "{0} {1}\" font-family=\"sans-serif\">\n"
                    "<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n",
                    width, height);
    svg += words(kMargin, 22, "start", 14, "#222", map.title);
    for (size_t p = 0; p < map.panels.size(); ++p) {
        const HeatMap::Panel& panel = map.panels[p];
        const int left = static_cast<int>(p % across) * panel_width + kLeft;
        const int top = kHeader + static_cast<int>(p / across) * panel_height + kTop;
        svg += words(left, top - 8, "start", 13, "#222", panel.title);
        for (size_t row = 0; row < map.rows.size(); ++row) {
            const int y = top + static_cast<int>(row) * kCellHeight;
            svg += words(left - 6, y + 15, "end", 11, "#444", map.rows[row]);
            for (size_t column = 0; column < map.columns.size(); ++column) {
                const double share = panel.cells[row][column];
                const int x = left + static_cast<int>(column) * kCellWidth;
                svg +=
                    fmt::format("<rect x=\"{}\" y=\"{}\" width=\"{}\" height=\"{}\" fill=\"{}\" stroke=\"white\"/>\n",
                                x, y, kCellWidth, kCellHeight, colour_of(share));
                svg += words(x + kCellWidth / 2.0, y + 15, "middle", 11, share > 0.75 || share < 0.1 ? "white" : "#222",
                             fmt::format("{:.0f}", 100 * share));
            }
        }
        const int below = top + kCellHeight * static_cast<int>(map.rows.size());
        for (size_t column = 0; column < map.columns.size(); ++column) {
            svg += words(left + (static_cast<double>(column) + 0.5) * kCellWidth, below + 14, "middle", 11, "#444",
                         map.columns[column]);
        }
    }
    svg +=
        words(kMargin, height - 12, "start", 11, "#444", fmt::format("across: {}; down: {}", map.x_label, map.y_label));
    return svg + "</svg>\n";
}

} // namespace turboquant::app
