// Quantise on write, and reading back. Every operation on numbers is the CPU's (codec/kernels.inc), in its order and
// without contraction, so codes and scales come out the same bit for bit.
#include "cuda/device.cuh"
#include "cuda/encode.h"
#include "cuda/gpu_layout.h"
#include "cuda/unpack.cuh"

namespace turboquant::cuda {

namespace {

constexpr unsigned kAll = 0xffffffffU;
constexpr uint32_t kInfinity = 0x7f800000U;
constexpr uint32_t kOrdinaryLow = (127U - 30U) << 23;
constexpr uint32_t kOrdinaryHigh = (127U + 30U) << 23;
constexpr int kTagElements = 64; // of a row: their lowest fp16 bit is always zero (docs/format.md)
constexpr int kEncodeThreads = 512; // 16 lanes a row, 16 rows, keys and values

// Sums and maxima over the 16 lanes of a row, in the order that the format fixes.
__device__ __forceinline__ float sum16(float x) {
    x = __fadd_rn(x, __shfl_xor_sync(kAll, x, 8));
    x = __fadd_rn(x, __shfl_xor_sync(kAll, x, 4));
    x = __fadd_rn(x, __shfl_xor_sync(kAll, x, 2));
    return __fadd_rn(x, __shfl_xor_sync(kAll, x, 1));
}
__device__ __forceinline__ uint32_t max16(uint32_t x) {
#pragma unroll
    for (int h = 8; h > 0; h /= 2) {
        x = max(x, __shfl_xor_sync(kAll, x, h));
    }
    return x;
}

// One row by 16 lanes, lane l holding channels l, l + 16, ...
template <int D>
struct Row {
    static constexpr int kOwn = D / 16;
    float y[kOwn];
    uint32_t top; // largest magnitude, bits
};

template <int N, class T>
__device__ __forceinline__ void load_strided(float (&y)[N], const T* x) { // every 16th element
#pragma unroll
    for (int k = 0; k < N; ++k) {
        y[k] = static_cast<float>(x[16 * k]);
    }
}

// Rounds to fp16 as the CPU does and gives the row's conditioned, rotated numbers.
template <int D>
__device__ __forceinline__ void rotate_row(const EncodeArgs& a, int side, int64_t token, int head, int l, Row<D>& row) {
    constexpr int kOwn = Row<D>::kOwn;
    const bool there = token < a.n;
    const int64_t at = token * a.stride[side] + head * a.head_stride[side];
    bool finite = true;
#pragma unroll
    for (int k = 0; k < kOwn; ++k) {
        row.y[k] = 0;
    }
    if (there && a.type == 0) {
        load_strided(row.y, static_cast<const float*>(a.x[side]) + at + l);
    } else if (there && a.type == 1) {
        load_strided(row.y, static_cast<const __half*>(a.x[side]) + at + l);
    } else if (there) {
        load_strided(row.y, static_cast<const __nv_bfloat16*>(a.x[side]) + at + l);
    }
#pragma unroll
    for (int k = 0; k < kOwn; ++k) {
        finite = finite && (__float_as_uint(row.y[k]) & 0x7fffffffU) < kInfinity;
    }
    // Every lane takes part; the ballot is cut to the row's half.
    const unsigned bad = __ballot_sync(kAll, !finite) >> (threadIdx.x & 16U) & 0xffffU;
#pragma unroll
    for (int k = 0; k < kOwn; ++k) {
        const int channel = l + 16 * k;
        float x = fminf(fmaxf(row.y[k], -65504.0F), 65504.0F);
        if (bad != 0) {
            x = 0;
        }
        uint16_t h = __half_as_ushort(__float2half_rn(x));
        if (head == 0 && channel < kTagElements) {
            h &= 0xfffeU;
        }
        x = __half2float(__ushort_as_half(h));
        // Lane l's channel l + 16 k is bit l + 16 (k % 2) of word k / 2.
        const float sign = (a.cache.signs[k / 2] >> (l + 16 * (k % 2)) & 1U) != 0 ? -1.0F : 1.0F;
        float factor = sign;
        float mean = 0;
        if (side == 0 && a.cache.lambda != nullptr) {
            factor = __fmul_rn(a.cache.lambda[head * D + channel], sign);
        }
        if (side == 0 && a.cache.mu != nullptr) {
            mean = a.cache.mu[head * D + channel];
        }
        row.y[k] = __fmul_rn(__fsub_rn(x, mean), factor);
    }
#pragma unroll
    for (int h = 1; h < 16; h *= 2) {
        const float sign = (l & h) != 0 ? -1.0F : 1.0F;
#pragma unroll
        for (int k = 0; k < kOwn; ++k) {
            const float other = __shfl_xor_sync(kAll, row.y[k], h);
            row.y[k] = __fmaf_rn(row.y[k], sign, other); // exact product: one rounding
        }
    }
#pragma unroll
    for (int h = 1; h < kOwn; h *= 2) {
#pragma unroll
        for (int k = 0; k < kOwn; ++k) {
            if ((k & h) == 0) {
                const float p = row.y[k];
                const float q = row.y[k + h];
                row.y[k] = __fadd_rn(p, q);
                row.y[k + h] = __fsub_rn(p, q);
            }
        }
    }
    const float norm = __fdiv_rn(1.0F, __fsqrt_rn(static_cast<float>(D)));
    uint32_t top = 0;
#pragma unroll
    for (int k = 0; k < kOwn; ++k) {
        row.y[k] = __fmul_rn(row.y[k], norm);
        top = max(top, __float_as_uint(row.y[k]) & 0x7fffffffU);
    }
    row.top = max16(top);
}

__device__ __forceinline__ float rule_scale(float norm2, float dot, float code2, int rule) {
    return rule == 0 ? __fdiv_rn(norm2, dot) : rule == 1 ? __fsqrt_rn(__fdiv_rn(norm2, code2)) : __fdiv_rn(dot, code2);
}

// How many thresholds lie below a magnitude, by halving, and the codebook's integer there.
template <int BITS>
__device__ __forceinline__ void find_level(const float (&threshold)[(1 << (BITS - 1)) - 1], float magnitude,
                                           uint32_t& index, float& level) {
    constexpr int kThresholds = (1 << (BITS - 1)) - 1;
    constexpr uint32_t kLow = BITS == 2   ? bytes_of(35, 117, 0, 0)
                              : BITS == 3 ? bytes_of(13, 41, 73, 117)
                                          : bytes_of(5, 15, 25, 37);
    constexpr uint32_t kHigh = bytes_of(49, 63, 81, 107); // of 4 bits
    const bool upper = magnitude > threshold[kThresholds / 2];
    index = upper ? (kThresholds + 1) / 2 : 0;
    if constexpr (BITS == 3) {
        index += magnitude > (upper ? threshold[2] : threshold[0]) ? 1 : 0;
    } else if constexpr (BITS == 4) {
        const bool middle = magnitude > (upper ? threshold[5] : threshold[1]);
        index += middle ? 2 : 0;
        const float last = upper ? (middle ? threshold[6] : threshold[4]) : (middle ? threshold[2] : threshold[0]);
        index += magnitude > last ? 1 : 0;
    }
    level = static_cast<float>(prmt(kLow, kHigh, index) & 255U);
}

// Codes of a row, channel c's to codes[c]; returns the scale, in every lane.
template <int D, int BITS>
__device__ __forceinline__ uint16_t encode_row(const SideTable& table, const Row<D>& row, int l, uint8_t* codes) {
    constexpr int kOwn = Row<D>::kOwn;
    // Below 2^-100 the scale is far under the smallest fp16. Lanes of a warp hold two rows: no early return.
    const bool empty = row.top >= kInfinity || row.top < (27U << 23);
    float shrink = 1;
    float grow = 1;
    if (!empty && row.top - kOrdinaryLow >= kOrdinaryHigh - kOrdinaryLow) {
        const uint32_t exponent = row.top >> 23;
        shrink = __uint_as_float((254U - exponent) << 23 | (exponent == 254U ? 1U << 22 : 0U));
        grow = __uint_as_float(exponent << 23);
    }
    float square = 0;
#pragma unroll
    for (int k = 0; k < kOwn; ++k) {
        const float v = __fmul_rn(row.y[k], shrink);
        square = __fadd_rn(square, __fmul_rn(v, v));
    }
    const float norm2 = sum16(square);
    const float largest = __fmul_rn(__uint_as_float(row.top), shrink);
    float dot = 0;
    float code2 = 0;
    uint8_t code[kOwn];
    if constexpr (BITS == 8) {
        const float step = __fdiv_rn(127.0F, largest);
#pragma unroll
        for (int k = 0; k < kOwn; ++k) {
            const float v = __fmul_rn(row.y[k], shrink);
            const float rounded = __fadd_rn(__fmul_rn(v, step), 12582912.0F);
            const float c = __fsub_rn(rounded, 12582912.0F);
            dot = __fadd_rn(dot, __fmul_rn(v, c));
            code2 = __fadd_rn(code2, __fmul_rn(c, c));
            code[k] = static_cast<uint8_t>(__float_as_uint(rounded) & 255U);
        }
    } else {
        constexpr int kThresholds = (1 << (BITS - 1)) - 1;
        const float sigma0 = __fsqrt_rn(__fdiv_rn(norm2, static_cast<float>(D)));
        const float peak = __fdiv_rn(largest, sigma0);
        const float size = __fsqrt_rn(__fsqrt_rn(__fdiv_rn(static_cast<float>(D), 64.0F)));
        float stretch = __fadd_rn(
            1.0F, __fmul_rn(__fdiv_rn(table.stretch_slope, size),
                            __fsub_rn(peak, __fadd_rn(table.stretch_origin, __fmul_rn(table.stretch_growth, size)))));
        stretch = 0.75F > stretch ? 0.75F : stretch;
        stretch = 1.25F < stretch ? 1.25F : stretch;
        const float sigma = __fmul_rn(sigma0, stretch);
        float threshold[kThresholds];
#pragma unroll
        for (int k = 0; k < kThresholds; ++k) {
            threshold[k] = __fmul_rn(table.threshold[k], sigma);
        }
#pragma unroll
        for (int k = 0; k < kOwn; ++k) {
            const float v = __fmul_rn(row.y[k], shrink);
            const float magnitude = fabsf(v);
            uint32_t index;
            float level;
            find_level<BITS>(threshold, magnitude, index, level);
            dot = __fadd_rn(dot, __fmul_rn(magnitude, level));
            code2 = __fadd_rn(code2, __fmul_rn(level, level));
            code[k] = static_cast<uint8_t>(index | (__float_as_uint(v) >> 31 << (BITS - 1)));
        }
    }
    dot = sum16(dot);
    code2 = sum16(code2);
    float s = __fmul_rn(rule_scale(norm2, dot, code2, table.rule), grow);
    s = s >= 65520.0F ? 65504.0F : s;
    uint16_t scale = __half_as_ushort(__float2half_rn(s));
    if (empty) {
        scale = 0;
    }
#pragma unroll
    for (int k = 0; k < kOwn; ++k) {
        codes[l + 16 * k] = scale == 0 ? 0 : code[k];
    }
    return scale;
}

// The word at `word` of `lane`'s words of a plane, from bytes codes[token][channel] of a tile.
template <int D, int WIDTH>
__device__ __forceinline__ uint32_t gather_word(const uint8_t* codes, int side, int lane, int word, int shift) {
    uint32_t out = 0;
    constexpr int kGroups = 8 / WIDTH; // of 4 codes in a word
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
        const int group = word * kGroups + i;
#pragma unroll
        for (int element = 0; element < 4; ++element) {
            int token;
            int channel;
            if (side == 0) { // the inverse of key_place
                token = lane / 4 + group % 4 / 2 * 8;
                channel = lane % 4 * (D / 4) + group / 4 * 8 + group % 2 * 4 + element;
            } else { // of value_place
                token = lane % 4 * 2 + element / 2 + element % 2 * 8;
                channel = group / 2 * 16 + group % 2 * 8 + lane / 4;
            }
            const uint32_t field = codes[token * D + channel] >> shift & ((1U << WIDTH) - 1U);
            out |= field << word_place(WIDTH, group, element).bit;
        }
    }
    return out;
}

// All words of a side of a full tile, by the 256 threads of that side.
template <int D, int WIDTH>
__device__ __forceinline__ void put_plane(uint8_t* plane, const uint8_t* codes, int side, int shift) {
    constexpr int kWords = words_per_lane(D, WIDTH);
    for (int at = threadIdx.x % 256; at < kWords * kLanes; at += 256) {
        // In the order of memory: at = (chunk * 32 + lane) * chunk words + word within
        constexpr int kChunk = chunk_words(D, WIDTH);
        const int word = at / (kChunk * kLanes) * kChunk + at % kChunk;
        const int lane = at / kChunk % kLanes;
        reinterpret_cast<uint32_t*>(plane)[at] = gather_word<D, WIDTH>(codes, side, lane, word, shift);
    }
}

// One token's words of a plane, by a warp. Other tokens of the call may share a word, but no bit of it.
template <int D, int WIDTH>
__device__ __forceinline__ void put_row(uint8_t* plane, int side, int token, const uint8_t* codes, int shift) {
    constexpr int kWords = words_per_lane(D, WIDTH);
    constexpr int kGroups = 8 / WIDTH; // of 4 codes in a word
    const int lanes = side == 0 ? 4 : 8; // that hold the token's codes
    for (int at = threadIdx.x % 32; at < lanes * kWords; at += 32) {
        const int lane = side == 0 ? token % 8 * 4 + at % 4 : at % 8 * 4 + token % 8 / 2;
        const int word = at / lanes;
        uint32_t value = 0;
        uint32_t mask = 0;
#pragma unroll
        for (int i = 0; i < kGroups; ++i) {
            const int group = word * kGroups + i;
#pragma unroll
            for (int element = 0; element < 4; ++element) {
                const bool own = side == 0 ? group % 4 / 2 == token / 8 : element == token % 2 * 2 + token / 8;
                const int channel = side == 0 ? lane % 4 * (D / 4) + group / 4 * 8 + group % 2 * 4 + element
                                              : group / 2 * 16 + group % 2 * 8 + lane / 4;
                if (own) {
                    const int bit = word_place(WIDTH, group, element).bit;
                    mask |= ((1U << WIDTH) - 1U) << bit;
                    value |= (codes[channel] >> shift & ((1U << WIDTH) - 1U)) << bit;
                }
            }
        }
        auto* const to = reinterpret_cast<uint32_t*>(plane + word_offset(D, WIDTH, lane, word));
        if (mask == 0xffffffffU) {
            *to = value;
        } else if (mask != 0) {
            atomicAnd(to, ~mask);
            atomicOr(to, value);
        }
    }
}

// A block: 16 rows of the input of one head, keys then values.
template <int D>
__global__ void __launch_bounds__(kEncodeThreads) encode_kernel(const __grid_constant__ EncodeArgs a) {
    __shared__ __align__(16) uint8_t codes[2][kTileTokens][D];
    __shared__ uint16_t scales[2][kTileTokens];
    __shared__ int64_t slots[kTileTokens];
    const int head = blockIdx.y;
    const int64_t first = static_cast<int64_t>(blockIdx.x) * kTileTokens;
    __shared__ bool whole_tile; // the rows fill a tile in order
    if (threadIdx.x < 32) {
        const int64_t token = first + threadIdx.x % kTileTokens;
        int64_t slot = token < a.n ? a.slots[token] : -1;
        slot = slot < a.cache.n_slots ? slot : -1;
        const int64_t slot0 = __shfl_sync(kAll, slot, 0);
        const bool fits = slot0 >= 0 && slot0 % kTileTokens == 0 && slot == slot0 + threadIdx.x % kTileTokens;
        const bool all = __all_sync(kAll, fits);
        if (threadIdx.x < kTileTokens) {
            slots[threadIdx.x] = slot;
        }
        if (threadIdx.x == 0) {
            whole_tile = all;
        }
    }
    const int side = threadIdx.x / 256;
    const int own = threadIdx.x / 16 % 16; // of the 16 rows
    const int l = threadIdx.x % 16;
    const int64_t exact = a.exact_rows != nullptr && first + own < a.n ? a.exact_rows[first + own] : -1;
    {
        Row<D> row;
        rotate_row<D>(a, side, first + own, head, l, row);
        if (exact >= 0) {
            uint16_t* const to = a.exact[side] + (exact * a.cache.kv_heads + head) * D;
#pragma unroll
            for (int k = 0; k < Row<D>::kOwn; ++k) {
                to[l + 16 * k] = __half_as_ushort(__float2half_rn(fminf(fmaxf(row.y[k], -65504.0F), 65504.0F)));
            }
        }
        const SideTable& table = a.cache.side[side];
        uint16_t scale;
        switch (table.bits) {
        case 2: scale = encode_row<D, 2>(table, row, l, codes[side][own]); break;
        case 3: scale = encode_row<D, 3>(table, row, l, codes[side][own]); break;
        case 4: scale = encode_row<D, 4>(table, row, l, codes[side][own]); break;
        default: scale = encode_row<D, 8>(table, row, l, codes[side][own]); break;
        }
        if (l == 0) {
            scales[side][own] = scale;
        }
    }
    __syncthreads();
    const int key_bytes = side_bytes(D, a.cache.side[0].bits);
    const int code_bytes = key_bytes + side_bytes(D, a.cache.side[1].bits);
    const auto tile_of = [&](int64_t slot) {
        const int64_t tiles = a.cache.page_size / kTileTokens;
        return a.cache.pages + slot / a.cache.page_size * a.cache.page_bytes +
               (head * tiles + slot % a.cache.page_size / kTileTokens) * a.cache.tile_bytes;
    };
    if (whole_tile) {
        uint8_t* const tile = tile_of(slots[0]);
        uint8_t* const base = tile + (side == 0 ? 0 : key_bytes);
        const uint8_t* const from = &codes[side][0][0];
        switch (a.cache.side[side].bits) {
        case 2: put_plane<D, 2>(base, from, side, 0); break;
        case 3:
            put_plane<D, 2>(base, from, side, 0);
            put_plane<D, 1>(base + plane_bytes(D, 2), from, side, 2);
            break;
        case 4: put_plane<D, 4>(base, from, side, 0); break;
        default: put_plane<D, 8>(base, from, side, 0); break;
        }
        if (threadIdx.x % 256 < kTileTokens) {
            const int token = threadIdx.x % 256;
            reinterpret_cast<uint16_t*>(tile + code_bytes)[scale_index(token) + 2 * side] = scales[side][token];
        }
        return;
    }
    for (int i = threadIdx.x % 256 / 32; i < kTileTokens; i += 8) { // a warp a row
        if (slots[i] < 0) {
            continue;
        }
        uint8_t* const tile = tile_of(slots[i]);
        const int token = static_cast<int>(slots[i] % kTileTokens);
        uint8_t* const base = tile + (side == 0 ? 0 : key_bytes);
        switch (a.cache.side[side].bits) {
        case 2: put_row<D, 2>(base, side, token, codes[side][i], 0); break;
        case 3:
            put_row<D, 2>(base, side, token, codes[side][i], 0);
            put_row<D, 1>(base + plane_bytes(D, 2), side, token, codes[side][i], 2);
            break;
        case 4: put_row<D, 4>(base, side, token, codes[side][i], 0); break;
        default: put_row<D, 8>(base, side, token, codes[side][i], 0); break;
        }
        if (threadIdx.x % 32 == 0) {
            reinterpret_cast<uint16_t*>(tile + code_bytes)[scale_index(token) + 2 * side] = scales[side][i];
        }
    }
}

__device__ __forceinline__ int signed_level(int code, const SideTable& table) {
    if (table.bits == 8) {
        return static_cast<int8_t>(code);
    }
    const int levels = 1 << (table.bits - 1);
    int found = table.first_level;
    for (int s = 0; s < (code & (levels - 1)); ++s) {
        found += table.step[s];
    }
    const int level = found & 255;
    return (code & levels) != 0 ? -level : level;
}

// A warp: one row of one side and head.
template <int D>
__global__ void __launch_bounds__(256) read_kernel(const __grid_constant__ ReadArgs a) {
    constexpr int kOwn = D / 32;
    const int lane = threadIdx.x % 32;
    const int64_t row = static_cast<int64_t>(blockIdx.x) * 8 + threadIdx.x / 32;
    if (row >= 2 * a.n * a.cache.kv_heads) {
        return;
    }
    const int head = static_cast<int>(row % a.cache.kv_heads);
    const int64_t i = row / a.cache.kv_heads % a.n;
    const int side = static_cast<int>(row / a.cache.kv_heads / a.n);
    const SideTable& table = a.cache.side[side];
    int64_t slot = a.slots[i];
    slot = slot < a.cache.n_slots ? slot : -1;
    int code[kOwn];
    uint16_t scale = 0;
    const int key_bytes = side_bytes(D, a.cache.side[0].bits);
    if (slot >= 0) {
        const int64_t tiles = a.cache.page_size / kTileTokens;
        const uint8_t* const tile = a.cache.pages + slot / a.cache.page_size * a.cache.page_bytes +
                                    (head * tiles + slot % a.cache.page_size / kTileTokens) * a.cache.tile_bytes;
        const int token = static_cast<int>(slot % kTileTokens);
        scale = reinterpret_cast<const uint16_t*>(
            tile + key_bytes + side_bytes(D, a.cache.side[1].bits))[scale_index(token) + 2 * side];
        const uint8_t* const base = tile + (side == 0 ? 0 : key_bytes);
        const int low = low_width(table.bits);
        const auto field = [&](const uint8_t* plane, int width, const CodePlace& place) {
            const WordPlace w = word_place(width, place.group, place.element);
            const auto word = *reinterpret_cast<const uint32_t*>(plane + word_offset(D, width, place.lane, w.word));
            return static_cast<int>(word >> w.bit & ((1U << width) - 1U));
        };
        for (int e = 0; e < kOwn; ++e) {
            const int channel = lane * kOwn + e;
            const CodePlace place = side == 0 ? key_place(D, token, channel) : value_place(token, channel);
            code[e] = field(base, low, place);
            if (table.bits == 3) {
                code[e] |= field(base + plane_bytes(D, 2), 1, place) << 2;
            }
        }
    } else {
        for (int e = 0; e < kOwn; ++e) {
            code[e] = 0;
        }
    }
    if (a.codes != nullptr) {
        for (int e = 0; e < kOwn; ++e) {
            a.codes[row * D + lane * kOwn + e] = static_cast<uint8_t>(code[e]);
        }
    }
    if (a.scales != nullptr && lane == 0) {
        a.scales[row] = scale;
    }
    if (a.rows == nullptr) {
        return;
    }
    const float s = __half2float(__ushort_as_half(scale));
    float y[kOwn];
    for (int e = 0; e < kOwn; ++e) {
        y[e] = s * static_cast<float>(signed_level(code[e], table));
    }
    if (a.rotated == 0) {
        hadamard_warp<D>(y, lane);
        for (int e = 0; e < kOwn; ++e) {
            const int channel = lane * kOwn + e;
            y[e] *= (a.cache.signs[channel / 32] >> (channel % 32) & 1U) != 0 ? -1.0F : 1.0F;
            if (side == 0 && a.cache.lambda != nullptr) {
                y[e] /= a.cache.lambda[head * D + channel];
            }
            if (side == 0 && a.cache.mu != nullptr && slot >= 0) {
                y[e] += a.cache.mu[head * D + channel];
            }
        }
    }
    for (int e = 0; e < kOwn; ++e) {
        store_element(a.rows, row * D + lane * kOwn + e, a.type, y[e]);
    }
}

} // namespace

cudaError_t launch_encode(const EncodeArgs& args, int head_size, cudaStream_t stream) {
    const dim3 grid(static_cast<unsigned>((args.n + kTileTokens - 1) / kTileTokens),
                    static_cast<unsigned>(args.cache.kv_heads));
    switch (head_size) {
    case 64: encode_kernel<64><<<grid, kEncodeThreads, 0, stream>>>(args); break;
    case 128: encode_kernel<128><<<grid, kEncodeThreads, 0, stream>>>(args); break;
    default: encode_kernel<256><<<grid, kEncodeThreads, 0, stream>>>(args); break;
    }
    return cudaGetLastError();
}

cudaError_t launch_read(const ReadArgs& args, int head_size, cudaStream_t stream) {
    const auto blocks = static_cast<unsigned>((2 * args.n * args.cache.kv_heads + 7) / 8);
    switch (head_size) {
    case 64: read_kernel<64><<<blocks, 256, 0, stream>>>(args); break;
    case 128: read_kernel<128><<<blocks, 256, 0, stream>>>(args); break;
    default: read_kernel<256><<<blocks, 256, 0, stream>>>(args); break;
    }
    return cudaGetLastError();
}

} // namespace turboquant::cuda
