// How the writing kernel finds a magnitude's index among many thresholds: magnitudes are cut into ranges of equal width,
// of which each holds at most one threshold, so that one comparison decides. No CUDA here: tests check it anywhere.
#pragma once

namespace turboquant::cuda {

inline constexpr int kSearchRanges = 128;
inline constexpr int kFirstRanges = 16;         // that are not like the last one
inline constexpr int kRangeSteps = 8;           // a magnitude's place is rounded to a step
inline constexpr float kFirstEnd = 2.75F;       // of the first ranges, in units of sigma; of all: 22
inline constexpr float kIndexBase = 8388608.0F; // 2^23: what is added to it lies in a float's lowest bits

// In units of sigma. No magnitude is above 21.4: sqrt(256), the largest over the root mean square, / 0.75, the grid's
// least stretch.
struct SearchRange {
    float threshold; // the one that may lie within; beyond every magnitude where none does
    float below;     // kIndexBase + how many lie below all of it
};

// Fills the first ranges from n ascending thresholds; false if two of them share a range, or some lie beyond. Range r is
// that of kRangeSteps steps from kRangeSteps * r on; it is taken wider by a quarter of a step at both ends, far more than
// the kernel's arithmetic is off.
constexpr bool search_ranges(const float* thresholds, int n, SearchRange (&ranges)[kFirstRanges]) {
    constexpr float kStep = kFirstEnd / (kFirstRanges * kRangeSteps);
    for (int r = 0; r < kFirstRanges; ++r) {
        const float low = (static_cast<float>(kRangeSteps * r) - 0.75F) * kStep;
        const float high = (static_cast<float>(kRangeSteps * (r + 1)) - 0.25F) * kStep;
        int below = 0;
        int within = 0;
        for (int k = 0; k < n; ++k) {
            below += thresholds[k] < low ? 1 : 0;
            within += thresholds[k] >= low && thresholds[k] <= high ? 1 : 0;
        }
        ranges[r].threshold = within == 1 ? thresholds[below] : 64.0F;
        ranges[r].below = kIndexBase + static_cast<float>(below);
        if (within > 1) {
            return false;
        }
    }
    const SearchRange& last = ranges[kFirstRanges - 1];
    return last.below == kIndexBase + static_cast<float>(n) && last.threshold == 64.0F;
}

} // namespace turboquant::cuda
