// How the writing kernel finds the index of a 4-bit code: by the ranges of codec/kernels.h's EncodeTable, of which each
// holds one threshold, so that one comparison decides. A table has every range that a magnitude can be in: no number is
// clamped. No CUDA here: tests check it anywhere.
#pragma once

#include "cuda/gpu_layout.h"

namespace turboquant::cuda {

// More than any magnitude needs, which is 21.4 sigma: sqrt(256), the largest over the root mean square, / 0.75, the
// grid's least stretch.
inline constexpr int kSearchRanges = 128;
inline constexpr int kRangeSteps = 8;           // a magnitude's place is rounded to a part of a range
inline constexpr float kIndexBase = 8388608.0F; // 2^23: what is added to it lies in a float's lowest bits
// Added to a place in steps, for ranges reach from half a range before their number to half a range behind.
inline constexpr float kPlaceBase = kIndexBase + 0.5F * kRangeSteps;

struct SearchRange {
    float threshold; // in units of sigma
    float below;     // kIndexBase + the index of magnitudes not above the threshold
};

// Range r of n ascending thresholds: range 0 has one below every magnitude, ranges beyond the last are like it.
TQ_HD constexpr SearchRange search_range(const float* thresholds, int n, int r) {
    const int range = r < n ? r : n;
    return {range > 0 ? thresholds[range - 1] : -1.0F, kIndexBase + static_cast<float>(range - 1)};
}

} // namespace turboquant::cuda
