#include "llm/bit_allocation.h"

#include <algorithm>
#include <cmath>

namespace turboquant::llm {

double codebook_error(int bits) {
    switch (bits) {
    case 2: return .1186;
    case 3: return .0334;
    case 4: return .00834;
    case 5: return .00210;
    case 6: return .000565;
    case 8: return .000042;
    default: return 0; // exact rows
    }
}

double cost_at(const SideCost& side, int bits) {
    return side.kld * codebook_error(bits) / codebook_error(side.bits);
}

void shrink_costs(std::vector<SideCost*> sides) {
    sides.erase(std::remove_if(sides.begin(), sides.end(), [](const SideCost* side) { return !(side->kld > 0); }),
                sides.end());
    const auto n = static_cast<double>(sides.size());
    if (n < 3) {
        return; // no spread to speak of
    }
    double mean = 0;
    double noise = 0;
    for (const SideCost* side : sides) {
        mean += std::log(side->kld) / n;
        noise += std::pow(side->error / side->kld, 2) / n;
    }
    double spread = 0;
    for (const SideCost* side : sides) {
        spread += std::pow(std::log(side->kld) - mean, 2) / (n - 1);
    }
    const double real = std::max(0.0, spread - noise);
    for (SideCost* side : sides) {
        const double own = std::pow(side->error / side->kld, 2);
        const double weight = real + own > 0 ? real / (real + own) : 1;
        side->kld = std::exp(mean + weight * (std::log(side->kld) - mean));
    }
}

double mean_bits(const std::vector<SideCost>& sides, const std::vector<int>& widths) {
    double bits = 0;
    double values = 0;
    for (size_t i = 0; i < sides.size(); ++i) {
        bits += static_cast<double>(widths[i]) * static_cast<double>(sides[i].values);
        values += static_cast<double>(sides[i].values);
    }
    return values > 0 ? bits / values : 0;
}

std::vector<int> allocate_bits(const std::vector<SideCost>& sides, double budget, int least) {
    std::vector<int> widths(sides.size(), least);
    double left = 0; // bits of a token that may still be given away
    for (const SideCost& side : sides) {
        left += (budget - least) * static_cast<double>(side.values);
    }
    for (;;) {
        size_t best = sides.size();
        int best_width = 0;
        double best_gain = -1;
        for (size_t i = 0; i < sides.size(); ++i) {
            const auto* const next = std::upper_bound(kWidths.begin(), kWidths.end(), widths[i]);
            if (next == kWidths.end()) {
                continue;
            }
            const double price = (*next - widths[i]) * static_cast<double>(sides[i].values);
            const double gain = (cost_at(sides[i], widths[i]) - cost_at(sides[i], *next)) / price;
            if (price <= left + 1e-9 * static_cast<double>(sides[i].values) && gain > best_gain) {
                best = i;
                best_width = *next;
                best_gain = gain;
            }
        }
        if (best == sides.size()) {
            return widths;
        }
        left -= (best_width - widths[best]) * static_cast<double>(sides[best].values);
        widths[best] = best_width;
    }
}

} // namespace turboquant::llm
