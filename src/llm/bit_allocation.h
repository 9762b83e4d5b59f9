// Which layers' keys and values deserve how many bits. Free of libllama.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

namespace turboquant::llm {

inline constexpr std::array<int, 6> kWidths = {2, 3, 4, 5, 6, 8};

// Squared error of a code over the energy, measured on normal blocks of 128 with the scale of values (docs/format.md,
// "Codebooks" and "Grid"; other block sizes differ by a tenth). 0 for exact rows.
double codebook_error(int bits);

// One side (keys or values) of one layer.
struct SideCost {
    int64_t values = 0; // of one token
    double kld = 0;     // what it alone causes at `bits`
    int bits = 0;
    double error = 0; // standard error of kld
};

// Costs that were measured over few positions exaggerate how much sides differ, and an allocation by them pays for it.
// Moves the logarithm of each cost of `sides` towards their mean, by what share of their spread is noise (empirical Bayes
// with normal logarithms). Sides of one kind: all keys, or all values. Costs of 0 stay.
void shrink_costs(std::vector<SideCost*> sides);

// What a side causes at another width: divergence is of second order in the error of the scores, so it grows as the
// codebook's squared error.
double cost_at(const SideCost& side, int bits);

// Widths of all sides that make the sum of their costs small while the mean over all values is at most `budget` bits
// (kWidths.front() <= least <= budget): from `least` bits each, the step that gains most per bit is taken as long as one
// fits. The costs are convex in the bits, so only the last steps can be short of the optimum.
std::vector<int> allocate_bits(const std::vector<SideCost>& sides, double budget, int least);

double mean_bits(const std::vector<SideCost>& sides, const std::vector<int>& widths);

} // namespace turboquant::llm
