// The hot loops of the codec, compiled once per instruction set from one source (kernels.inc). Internal.
//
// Every variant gives the same bits: additions happen in the same order (16 partial sums, then a fixed tree) and the
// library is compiled without contraction. Plain types only: what these files include must not leave inline functions
// behind that were compiled for an instruction set the processor may lack.
#pragma once

#include <stdint.h>

namespace turboquant {

enum class Isa; // turboquant/isa.h

inline constexpr int kMaxHeadSize = 1024;
// Vectors handed to the kernels hold a multiple of this many elements, zeros behind the last real one.
inline constexpr int kVectorPadding = 16;

struct EncodeTable {
    int bits = 0;
    int n_thresholds = 0; // 2^(bits-1) - 1; 0 for 8 bits
    int first_level = 0;
    float threshold[31] = {}; // of |y| / sigma: midpoints between the centroids
    // With r = (n / 64)^(1/4), sigma is stretched by 1 + slope / r * (largest |y| / sigma - origin - growth * r), within
    // 0.75..1.25.
    float stretch_slope = 0;
    float stretch_origin = 0;
    float stretch_growth = 0;
    float range_scale = 0; // range_threshold, below
    // What crossing threshold k adds to (m << 8 | level[m]): one sum gives the index and the integer of the codebook.
    int32_t step[31] = {};
    // The same as a binary search. Comparison i (of bits - 1, i = 0 first) is with tree[i][path], bit j of `path` being
    // what comparison j found; leaf_index and leaf_level [path of all] are the index and the codebook's integer.
    alignas(64) float tree[5][16] = {};
    alignas(64) int32_t leaf_index[32] = {};
    alignas(64) float leaf_level[32] = {};
    // And for 3 and 4 bits, in one comparison: |y| / sigma * range_scale, rounded, is a range, at most n_thresholds.
    // Range r > 0 holds threshold r - 1 and no other; range 0 holds none, and has one below every magnitude here.
    alignas(64) float range_threshold[16] = {};
    alignas(64) float level[16] = {}; // of the first indices, the codebook's integer
};

enum class KernelRule : int { unbiased, matched, mmse };

// One block to encode. h, mu, factor: as for condition(); codes: room for the padding.
struct EncodeItem {
    const uint16_t* h;
    const float* mu;
    const float* factor;
    uint8_t* codes;
    uint16_t* scale;
    uint8_t note; // out: an EncodeNote's value
};
inline constexpr int kEncodeItems = 8;

struct PlaneShape {
    int width;
    int shift;
    int groups; // key: channel groups a half tile; value: row groups
};

struct CodecKernels {
    // h = half(x), finite values beyond the range clamped to +-65504; returns the largest bit pattern of |x|.
    // n: a multiple of 16.
    uint32_t (*round_to_half)(const float* x, int n, uint16_t* h);
    // y[c] = (h[c] - mu[c]) * factor[c] for c < n, finite h; zeros up to the next multiple of 16. h, mu and factor are
    // read up to there.
    void (*condition)(const uint16_t* h, const float* mu, const float* factor, int n, float* y);
    // y = H y / sqrt(n), or its transpose; n: a servable block (rotation.cpp), y padded with zeros.
    void (*hadamard)(float* y, int n, bool transposed);
    // One rotated block: see encode_block. codes: room for the padding. Returns an EncodeNote's value.
    uint8_t (*encode)(const float* y, int n, const EncodeTable& table, KernelRule rule, uint8_t* codes,
                      uint16_t* scale);
    // condition(), hadamard() and encode() of `count` blocks of n elements each, bit for bit. Best by kEncodeItems.
    void (*encode_rows)(EncodeItem* items, int count, int n, const EncodeTable& table, KernelRule rule);
    // Writes one row's codes (padded with zeros to 32) into a plane of a tile.
    void (*put_key_row)(uint8_t* plane, const PlaneShape& shape, int row, const uint8_t* codes);
    void (*put_value_row)(uint8_t* plane, const PlaneShape& shape, int channels, int row, const uint8_t* codes);
};

const CodecKernels& codec_kernels(Isa isa);

namespace kernels_portable {
extern const CodecKernels kKernels;
}
namespace kernels_avx2 {
extern const CodecKernels kKernels;
}
namespace kernels_avx512 {
extern const CodecKernels kKernels;
}

} // namespace turboquant
