// Panels of coloured cells as an SVG picture.
#pragma once

#include <string>
#include <vector>

namespace turboquant::app {

struct HeatMap {
    std::string title;
    std::string x_label;
    std::string y_label;
    std::vector<std::string> columns; // labels, the same for all panels
    std::vector<std::string> rows;
    struct Panel {
        std::string title;
        std::vector<std::vector<double>> cells; // [row][column], 0..1
    };
    std::vector<Panel> panels;
};

std::string to_svg(const HeatMap& map);

} // namespace turboquant::app
