// Quantise on write. Every operation on numbers is the CPU's (codec/kernels.inc), in its order and without contraction,
// so codes and scales come out the same bit for bit.
//
// Four lanes take a row, lane w of them channels 16 k + 4 w + (0..3): loads are whole vectors, only two of the seven
// stages of the rotation (and of the sums over 16 partial sums) cross lanes, and four codes make a word at once.
#include "cuda/device.cuh"
#include "cuda/encode.h"
#include "cuda/gpu_layout.h"
#include "cuda/search_ranges.h"
#include "cuda/unpack.cuh"

namespace turboquant::cuda {

namespace {

constexpr unsigned kAll = 0xffffffffU;
constexpr uint32_t kInfinity = 0x7f800000U;
constexpr uint32_t kOrdinaryLow = (127U - 30U) << 23;
constexpr uint32_t kOrdinaryHigh = (127U + 30U) << 23;
constexpr int kFourBitThresholds = 7;
constexpr int kTagElements = 64;    // of a row: their lowest fp16 bit is always zero (docs/format.md)
constexpr int kEncodeThreads = 128; // 4 lanes a row, 16 rows, keys and values
constexpr int kSideThreads = kEncodeThreads / 2;

// One row by four lanes.
template <int D>
struct Row {
    static constexpr int kSteps = D / 16;
    float y[kSteps][4];
    float top; // largest magnitude; of a row with NaN or infinity: infinity or 0
};

// The 16 partial sums of a row meet: i with i + 8, then 4, 2, 1 (part of the format).
__device__ __forceinline__ float sum16(float (&p)[4]) {
#pragma unroll
    for (int h = 2; h > 0; h /= 2) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            p[i] = __fadd_rn(p[i], __shfl_xor_sync(kAll, p[i], h));
        }
    }
    return __fadd_rn(__fadd_rn(p[0], p[2]), __fadd_rn(p[1], p[3]));
}

__device__ __forceinline__ float4 load_four(const float* from, bool aligned) {
    return aligned ? *reinterpret_cast<const float4*>(from) : float4{from[0], from[1], from[2], from[3]};
}

// A row as fp16, rounded as the CPU does; `at` is the lane's first element. Rows that are fp16 are not waited for. True:
// something of a row that was not fp16 is not finite.
template <int D>
__device__ __forceinline__ bool load_row(const EncodeArgs& a, int side, int64_t at, bool there,
                                         uint32_t (&halves)[D / 16][2]) {
    constexpr int kSteps = D / 16;
    bool bad = false;
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
        halves[k][0] = halves[k][1] = 0;
    }
    if (there && a.type == 1) {
        const auto* const from = static_cast<const uint16_t*>(a.x[side]) + at;
        if (a.vectors[side] != 0) {
#pragma unroll
            for (int k = 0; k < kSteps; ++k) {
                const uint2 four = *reinterpret_cast<const uint2*>(from + 16 * k);
                halves[k][0] = four.x;
                halves[k][1] = four.y;
            }
        } else {
#pragma unroll
            for (int k = 0; k < kSteps; ++k) {
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    halves[k][i] = static_cast<uint32_t>(from[16 * k + 2 * i]) |
                                   static_cast<uint32_t>(from[16 * k + 2 * i + 1]) << 16;
                }
            }
        }
    } else if (there) {
        float finite = 0; // NaN once anything was not finite
#pragma unroll
        for (int k = 0; k < kSteps; ++k) {
            float x[4];
            if (a.type == 0 && a.vectors[side] != 0) {
                const float4 four =
                    *reinterpret_cast<const float4*>(static_cast<const float*>(a.x[side]) + at + 16 * k);
                x[0] = four.x;
                x[1] = four.y;
                x[2] = four.z;
                x[3] = four.w;
            } else {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    x[i] = load_element(a.x[side], at + 16 * k + i, a.type);
                }
            }
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                finite = fmaf(x[i], 0.0F, finite);
                x[i] = fminf(fmaxf(x[i], -65504.0F), 65504.0F);
            }
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const __half2 two = __floats2half2_rn(x[2 * i], x[2 * i + 1]);
                halves[k][i] = reinterpret_cast<const uint32_t&>(two);
            }
        }
        bad = finite != finite;
    }
    return bad;
}

// The conditioned, rotated numbers of a row.
template <int D>
__device__ __forceinline__ void rotate_row(const EncodeArgs& a, int side, int64_t token, bool there, int head, int w,
                                           bool bad, uint32_t (&halves)[D / 16][2], Row<D>& row) {
    constexpr int kSteps = Row<D>::kSteps;
    if (a.type == 1 && a.cache.mu != nullptr && side == 0) { // any exponent of ones?
        uint32_t seen = 0;
#pragma unroll
        for (int k = 0; k < kSteps; ++k) {
            seen |= ((halves[k][0] & 0x7fff7fffU) + 0x04000400U) | ((halves[k][1] & 0x7fff7fffU) + 0x04000400U);
        }
        bad = (seen & 0x80008000U) != 0;
    } // without a mean the rotation spreads NaN and infinity over the whole row, whose largest tells
    // A row with NaN or infinity is one of zeros (before the mean is taken off).
    const unsigned bad_lanes = __ballot_sync(kAll, bad);
    if (bad_lanes != 0) {
        const bool zero = (bad_lanes >> (threadIdx.x & 28U) & 15U) != 0;
#pragma unroll
        for (int k = 0; k < kSteps; ++k) {
            halves[k][0] = zero ? 0 : halves[k][0];
            halves[k][1] = zero ? 0 : halves[k][1];
        }
    }
    // Signs of the rotation, for pairs of elements: bits 15 and 31 after a shift.
    uint32_t signs[D > 128 ? 2 : 1];
#pragma unroll
    for (int i = 0; i < (D > 128 ? 2 : 1); ++i) {
        const uint32_t(&of)[4] = a.pair_signs[i];
        signs[i] = (w & 2) != 0 ? ((w & 1) != 0 ? of[3] : of[2]) : ((w & 1) != 0 ? of[1] : of[0]);
    }
    const uint32_t tags = head == 0 ? 0xfffefffeU : 0xffffffffU;
#pragma unroll
    for (int k = 0; k < kTagElements / 16; ++k) {
        halves[k][0] &= tags;
        halves[k][1] &= tags;
    }
    const auto flips = [&](int pair) { return signs[pair / 16] << (15 - pair % 16); }; // bits 15 and 31
    const auto widen = [&](int k, int i, uint32_t two) {
        const float2 x = __half22float2(reinterpret_cast<const __half2&>(two));
        row.y[k][2 * i] = x.x;
        row.y[k][2 * i + 1] = x.y;
    };
    const float* mu = side == 0 ? a.cache.mu : nullptr;
    const float* const lambda = side == 0 ? a.cache.lambda : nullptr;
    if (mu == nullptr && lambda == nullptr) {
#pragma unroll
        for (int k = 0; k < kSteps; ++k) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                widen(k, i, halves[k][i] ^ (flips(2 * k + i) & 0x80008000U));
            }
        }
    } else {
#pragma unroll
        for (int k = 0; k < kSteps; ++k) {
            widen(k, 0, halves[k][0]);
            widen(k, 1, halves[k][1]);
        }
        const auto apply = [&](const float* with, auto op) {
#pragma unroll
            for (int k = 0; k < kSteps; ++k) {
                const float4 four = load_four(with + head * D + 4 * w + 16 * k, a.condition_vectors != 0);
                row.y[k][0] = op(row.y[k][0], four.x);
                row.y[k][1] = op(row.y[k][1], four.y);
                row.y[k][2] = op(row.y[k][2], four.z);
                row.y[k][3] = op(row.y[k][3], four.w);
            }
        };
        if (mu != nullptr) {
            if (a.cache.mu_blocks > 0 && there) {
                mu += static_cast<int64_t>(mean_block(a.positions[token], a.cache.mu_blocks)) * a.cache.kv_heads * D;
            }
            apply(mu, [](float x, float mean) { return __fsub_rn(x, mean); });
        }
        if (lambda != nullptr) {
            apply(lambda, [](float x, float factor) { return __fmul_rn(x, factor); });
        }
#pragma unroll
        for (int k = 0; k < kSteps; ++k) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const uint32_t flip = flips(2 * k + i / 2) << (i % 2 == 0 ? 16 : 0) & 0x80000000U;
                row.y[k][i] = __uint_as_float(__float_as_uint(row.y[k][i]) ^ flip);
            }
        }
    }
    const auto butterfly = [](float& p, float& q) {
        const float sum = __fadd_rn(p, q);
        q = __fsub_rn(p, q);
        p = sum;
    };
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
        butterfly(row.y[k][0], row.y[k][1]);
        butterfly(row.y[k][2], row.y[k][3]);
        butterfly(row.y[k][0], row.y[k][2]);
        butterfly(row.y[k][1], row.y[k][3]);
    }
#pragma unroll
    for (int h = 1; h < 4; h *= 2) {
        const float sign = (w & h) != 0 ? -1.0F : 1.0F;
#pragma unroll
        for (int k = 0; k < kSteps; ++k) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float other = __shfl_xor_sync(kAll, row.y[k][i], h);
                row.y[k][i] = __fmaf_rn(row.y[k][i], sign, other); // exact product: one rounding
            }
        }
    }
#pragma unroll
    for (int h = 1; h < kSteps; h *= 2) {
#pragma unroll
        for (int k = 0; k < kSteps; ++k) {
            if ((k & h) == 0) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    butterfly(row.y[k][i], row.y[k + h][i]);
                }
            }
        }
    }
    row.top = 0;
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            row.y[k][i] = __fmul_rn(row.y[k][i], a.norm);
            row.top = fmaxf(row.top, fabsf(row.y[k][i]));
        }
    }
#pragma unroll
    for (int h = 1; h < 4; h *= 2) {
        row.top = fmaxf(row.top, __shfl_xor_sync(kAll, row.top, h));
    }
}

__device__ __forceinline__ float rule_scale(float norm2, float dot, float code2, int rule) {
    return rule == 0 ? __fdiv_rn(norm2, dot) : rule == 1 ? __fsqrt_rn(__fdiv_rn(norm2, code2)) : __fdiv_rn(dot, code2);
}

// 1 if a > b, else 0, for numbers of at most 2^60 that differ by 2^-61 if they differ: on the multiplication pipe, as
// the one for comparisons is the narrower. `b` comes times -2^64.
__device__ __forceinline__ float above(float a, float b) {
    return __saturatef(__fmaf_rn(a, 0x1p64F, b));
}

// How many of a few thresholds lie below a magnitude, times `unit`, added to `sum`. Thresholds come times -2^64.
template <int N>
__device__ __forceinline__ float count_thresholds(const float (&threshold)[N], float magnitude, float unit, float sum) {
#pragma unroll
    for (int k = 0; k < N; ++k) {
        sum = fmaf(above(magnitude, threshold[k]), unit, sum);
    }
    return sum;
}

// The same of many thresholds: kIndexBase + the count. The range that a magnitude lies in leaves one comparison. `scale`
// turns a magnitude into steps; `unit` is -2^64 sigma; `search` an address in shared memory, of a table aligned to its
// size.
__device__ __forceinline__ float find_index(uint32_t search, float magnitude, float scale, float unit) {
    static_assert(sizeof(SearchRange) == kRangeSteps); // so a step is a byte's address
    constexpr uint32_t kMask = (kSearchRanges - 1) * kRangeSteps;
    const float place = fmaf(magnitude, scale, kPlaceBase);
    float threshold;
    float below;
    asm("ld.shared.v2.f32 {%0, %1}, [%2];"
        : "=f"(threshold), "=f"(below)
        : "r"((__float_as_uint(place) & kMask) | search));
    return above(magnitude, __fmul_rn(threshold, unit)) + below;
}

// Four bytes below 16 as four nibbles, in bits 0 to 7 and 16 to 23.
__device__ __forceinline__ uint32_t nibbles(uint32_t bytes) {
    return bytes | bytes >> 4;
}

// The lowest bytes of four words.
__device__ __forceinline__ uint32_t low_bytes(uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
    return prmt(prmt(a, b, 0x0040U), prmt(c, d, 0x0040U), 0x5410U);
}

// Codes of a row, channel c's to byte c of `codes`; returns the scale, in every lane. `search`: find_index.
template <int D, int BITS>
__device__ __forceinline__ uint16_t encode_row(const SideTable& table, uint32_t search, Row<D>& row, int w,
                                               uint8_t* codes) {
    constexpr int kSteps = Row<D>::kSteps;
    // Below 2^-100 the scale is far under the smallest fp16. Lanes of a warp hold eight rows: no early return.
    const uint32_t top = __float_as_uint(row.top);
    const bool empty = top >= kInfinity || top < (27U << 23);
    float grow = 1;
    float largest = row.top;
    const bool extreme = !empty && top - kOrdinaryLow >= kOrdinaryHigh - kOrdinaryLow;
    if (__any_sync(kAll, extreme || empty)) {
        float shrink = 1;
        if (extreme) {
            const uint32_t exponent = top >> 23;
            shrink = __uint_as_float((254U - exponent) << 23 | (exponent == 254U ? 1U << 22 : 0U));
            grow = __uint_as_float(exponent << 23);
        }
        largest = __fmul_rn(largest, shrink);
#pragma unroll
        for (int k = 0; k < kSteps; ++k) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                row.y[k][i] = empty ? 0.0F : __fmul_rn(row.y[k][i], shrink);
            }
        }
    }
    float square[4] = {};
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            square[i] = __fadd_rn(square[i], __fmul_rn(row.y[k][i], row.y[k][i]));
        }
    }
    const float norm2 = sum16(square);
    float dot[4] = {};
    int code2 = 0; // a sum of squares of integers: below 2^24, so exact in any order
    uint32_t packed[kSteps];
    if constexpr (BITS == 8) {
        const float step = __fdiv_rn(127.0F, largest);
#pragma unroll
        for (int k = 0; k < kSteps; ++k) {
            uint32_t rounded[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float r = __fadd_rn(__fmul_rn(row.y[k][i], step), 12582912.0F);
                dot[i] = __fadd_rn(dot[i], __fmul_rn(row.y[k][i], __fsub_rn(r, 12582912.0F)));
                rounded[i] = __float_as_uint(r);
            }
            packed[k] = low_bytes(rounded[0], rounded[1], rounded[2], rounded[3]);
            code2 = __dp4a(static_cast<int>(packed[k]), static_cast<int>(packed[k]), code2);
        }
    } else {
        const float sigma0 = __fsqrt_rn(__fmul_rn(norm2, 1.0F / D)); // a power of two: as the division
        const float peak = __fdiv_rn(largest, sigma0);
        float stretch = __fadd_rn(1.0F, __fmul_rn(table.stretch_per_peak, __fsub_rn(peak, table.stretch_from)));
        stretch = 0.75F > stretch ? 0.75F : stretch;
        stretch = 1.25F < stretch ? 1.25F : stretch;
        const float sigma = __fmul_rn(sigma0, stretch);
        // 4 bits search in ranges, others count.
        constexpr int kCounted = BITS == 4 ? 1 : (1 << (BITS - 1)) - 1;
        const float unit = sigma * -0x1p64F;
        const float scale = __fdividef(kRangeSteps * table.range_scale, sigma);
        float threshold[kCounted];
#pragma unroll
        for (int k = 0; k < kCounted; ++k) {
            threshold[k] = __fmul_rn(table.threshold[k], unit);
        }
        constexpr uint32_t kLow = BITS == 2   ? bytes_of(35, 117, 0, 0)
                                  : BITS == 3 ? bytes_of(13, 41, 73, 117)
                                              : bytes_of(5, 15, 25, 37);
        constexpr uint32_t kHigh = bytes_of(49, 63, 81, 107); // of 4 bits
#pragma unroll
        for (int k = 0; k < kSteps; ++k) {
            uint32_t index;
            if constexpr (BITS == 4) {
                uint32_t found[4];
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    found[i] = __float_as_uint(find_index(search, fabsf(row.y[k][i]), scale, unit));
                }
                index = low_bytes(found[0], found[1], found[2], found[3]);
            } else {
                // Two indices a byte apart, counted in the low bits of a float.
                uint32_t pairs[2];
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    float sum = kIndexBase;
                    sum = count_thresholds(threshold, fabsf(row.y[k][2 * i]), 1.0F, sum);
                    sum = count_thresholds(threshold, fabsf(row.y[k][2 * i + 1]), 256.0F, sum);
                    pairs[i] = __float_as_uint(sum);
                }
                index = prmt(pairs[0], pairs[1], 0x5410U);
            }
            const uint32_t level = prmt(kLow, kHigh, prmt(nibbles(index), 0, 0x4420U));
            code2 = __dp4a(static_cast<int>(level), static_cast<int>(level), code2);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                // A byte as the lowest of 2^23's float: conversions are slow.
                const float value = __uint_as_float(prmt(level, 0x4b000000U, 0x7440U + i)) - kIndexBase;
                dot[i] = __fadd_rn(dot[i], __fmul_rn(fabsf(row.y[k][i]), value));
            }
            const uint32_t sign =
                prmt(prmt(__float_as_uint(row.y[k][0]), __float_as_uint(row.y[k][1]), 0x0073U),
                     prmt(__float_as_uint(row.y[k][2]), __float_as_uint(row.y[k][3]), 0x0073U), 0x5410U);
            packed[k] = index | (sign >> (8 - BITS) & 0x01010101U << (BITS - 1));
        }
    }
    const float dots = sum16(dot);
#pragma unroll
    for (int h = 1; h < 4; h *= 2) {
        code2 += __shfl_xor_sync(kAll, code2, h);
    }
    float s = __fmul_rn(rule_scale(norm2, dots, static_cast<float>(code2), table.rule), grow);
    s = s >= 65520.0F ? 65504.0F : s;
    uint16_t scale = __half_as_ushort(__float2half_rn(s));
    if (empty) {
        scale = 0;
    }
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
        *reinterpret_cast<uint32_t*>(codes + 16 * k + 4 * w) = scale == 0 ? 0 : packed[k];
    }
    return scale;
}

// ---- from bytes, a row's codes one after the other, to the layout of a tile -----------------------------------------

// A row of codes in shared memory: padded, so that eight rows' words lie in different banks.
template <int D>
inline constexpr int kPitch = D + 16;
inline constexpr int kPairPitch = kLanes + 4; // likewise, of words

// Codes of 8 bits are words as they are, others nibbles: words of pairs of groups, [pair][lane]; of 8 bits two a pair.
template <int D, bool BYTES>
__device__ __forceinline__ void pair_values(const uint8_t* codes, uint32_t* pairs) {
    // A thread: four channels (and those 8 on) of tokens 2t, 2t + 8, 2t + 1, 2t + 9.
    for (int at = static_cast<int>(threadIdx.x % kSideThreads); at < D / 2; at += kSideThreads) {
        const int t = at % 4;
        const int quad = at / 4 % 2;
        const int pair = at / 8;
        uint32_t turned[2][4]; // [8 channels on][channel]: a byte a token
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const uint8_t* const from = codes + pair * 16 + i * 8 + quad * 4;
            const auto word = [&](int token) { return *reinterpret_cast<const uint32_t*>(from + token * kPitch<D>); };
            const uint32_t x0 = word(2 * t);
            const uint32_t x1 = word(2 * t + 8);
            const uint32_t x2 = word(2 * t + 1);
            const uint32_t x3 = word(2 * t + 9);
            const uint32_t low01 = prmt(x0, x1, 0x5140U);
            const uint32_t high01 = prmt(x0, x1, 0x7362U);
            const uint32_t low23 = prmt(x2, x3, 0x5140U);
            const uint32_t high23 = prmt(x2, x3, 0x7362U);
            turned[i][0] = prmt(low01, low23, 0x5410U);
            turned[i][1] = prmt(low01, low23, 0x7632U);
            turned[i][2] = prmt(high01, high23, 0x5410U);
            turned[i][3] = prmt(high01, high23, 0x7632U);
        }
#pragma unroll
        for (int c = 0; c < 4; ++c) {
            const int lane = (quad * 4 + c) * 4 + t;
            if constexpr (BYTES) {
                pairs[2 * pair * kPairPitch + lane] = turned[0][c];
                pairs[(2 * pair + 1) * kPairPitch + lane] = turned[1][c];
            } else {
                pairs[pair * kPairPitch + lane] = prmt(nibbles(turned[0][c]), nibbles(turned[1][c]), 0x6420U);
            }
        }
    }
}

// The same of one lane and pair of keys, straight from the codes: 8 neighbouring channels of a token.
template <int D>
__device__ __forceinline__ uint2 key_bytes(const uint8_t* codes, int lane, int pair) {
    return *reinterpret_cast<const uint2*>(codes + (lane / 4 + pair % 2 * 8) * kPitch<D> + lane % 4 * (D / 4) +
                                           pair / 2 * 8);
}

// A plane of a full tile, by the threads of a side, 16 bytes at a time where a lane has so many. WIDTH 8: bytes; 4, 2:
// the low bits; 1: bit 2.
template <int D, int WIDTH, bool KEYS>
__device__ __forceinline__ void put_plane(uint8_t* plane, const uint8_t* codes, const uint32_t* pairs) {
    constexpr int kChunk = chunk_words(D, WIDTH);
    constexpr int kChunks = words_per_lane(D, WIDTH) / kChunk;
    const auto pair_of = [&](int lane, int pair) {
        if constexpr (KEYS) {
            const uint2 bytes = key_bytes<D>(codes, lane, pair);
            return prmt(nibbles(bytes.x), nibbles(bytes.y), 0x6420U);
        } else {
            return pairs[pair * kPairPitch + lane];
        }
    };
    for (int at = static_cast<int>(threadIdx.x % kSideThreads); at < kChunks * kLanes; at += kSideThreads) {
        const int lane = at % kLanes;
        const int first = at / kLanes * kChunk;
        uint32_t words[kChunk];
#pragma unroll
        for (int i = 0; i < kChunk; ++i) {
            const int word = first + i;
            if constexpr (WIDTH == 8 && KEYS) {
                const uint2 bytes = key_bytes<D>(codes, lane, word / 2);
                words[i] = i % 2 == 0 ? bytes.x : bytes.y;
            } else if constexpr (WIDTH == 8) {
                words[i] = pairs[word * kPairPitch + lane];
            } else if constexpr (WIDTH == 4) {
                words[i] = pair_of(lane, word);
            } else if constexpr (WIDTH == 2) {
                words[i] = (pair_of(lane, 2 * word) & 0x33333333U) | (pair_of(lane, 2 * word + 1) & 0x33333333U) << 2;
            } else {
                words[i] = 0;
#pragma unroll
                for (int p = 0; p < 4; ++p) {
                    words[i] |= (pair_of(lane, 4 * word + p) >> 2 & 0x11111111U) << p;
                }
            }
        }
        auto* const to = reinterpret_cast<uint32_t*>(plane) + at * kChunk;
        if constexpr (kChunk == 4) {
            *reinterpret_cast<uint4*>(to) = {words[0], words[1], words[2], words[3]};
        } else if constexpr (kChunk == 2) {
            *reinterpret_cast<uint2*>(to) = {words[0], words[1]};
        } else {
            *to = words[0];
        }
    }
}

template <int D, bool KEYS>
__device__ __forceinline__ void put_side(uint8_t* base, int bits, const uint8_t* codes, const uint32_t* pairs) {
    switch (bits) {
    case 2: put_plane<D, 2, KEYS>(base, codes, pairs); break;
    case 3:
        put_plane<D, 2, KEYS>(base, codes, pairs);
        put_plane<D, 1, KEYS>(base + plane_bytes(D, 2), codes, pairs);
        break;
    case 4: put_plane<D, 4, KEYS>(base, codes, pairs); break;
    default: put_plane<D, 8, KEYS>(base, codes, pairs); break;
    }
}

// One token's words of a plane, by a warp. Other tokens of the call may share a word, but no bit of it.
template <int D, int WIDTH>
__device__ __forceinline__ void put_row(uint8_t* plane, int side, int token, const uint8_t* codes, int shift) {
    constexpr int kWords = words_per_lane(D, WIDTH);
    constexpr int kGroups = 8 / WIDTH;   // of 4 codes in a word
    const int lanes = side == 0 ? 4 : 8; // that hold the token's codes
    for (int at = static_cast<int>(threadIdx.x % 32); at < lanes * kWords; at += 32) {
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

// A block: 16 rows of the input of one head, keys then values. BITS: of both; 0: what the cache says.
template <int D, int BITS>
__global__ void __launch_bounds__(kEncodeThreads, D == 256    ? 3
                                                  : BITS != 0 ? 7
                                                              : 5) encode_kernel(const __grid_constant__ EncodeArgs a) {
    __shared__ __align__(16) uint8_t codes[2][kTileTokens * kPitch<D>];
    __shared__ uint32_t pairs[D / 8 * kPairPitch]; // of values
    __shared__ uint16_t scales[2][kTileTokens];
    // All sides of 4 bits have the same thresholds.
    __shared__ __align__(sizeof(SearchRange[kSearchRanges])) SearchRange search[kSearchRanges];
    const int head = static_cast<int>(blockIdx.y);
    const int64_t first = static_cast<int64_t>(blockIdx.x) * a.rows;
    const unsigned thread_of_side = threadIdx.x % kSideThreads;
    const int side = threadIdx.x < kSideThreads ? 0 : 1;
    const int lane = static_cast<int>(threadIdx.x % 32);
    const int w = static_cast<int>(threadIdx.x % 4);
    const int mine = static_cast<int>(threadIdx.x % kTileTokens);
    const int own = static_cast<int>(thread_of_side / 4); // of the 16 rows
    const bool real = own < a.rows && first + own < a.n;
    const bool busy = static_cast<int>(thread_of_side / 32 * 8) < a.rows; // some row is the warp's
    // Everything is asked for before anything is waited for.
    int64_t slot = mine < a.rows && first + mine < a.n ? a.slots[first + mine] : -1; // of row lane % 16
    const int64_t exact = a.exact_rows != nullptr && real ? a.exact_rows[first + own] : -1;
    uint32_t halves[D / 16][2];
    const bool bad =
        busy && load_row<D>(a, side, (first + own) * a.stride[side] + head * a.head_stride[side] + 4 * w, real, halves);
    if (BITS == 0 || BITS == 4) {
        static_assert(kSearchRanges == kEncodeThreads);
        const SideTable& four = a.cache.side[BITS == 0 && a.cache.side[0].bits != 4 ? 1 : 0];
        search[threadIdx.x] = search_range(four.threshold, kFourBitThresholds, static_cast<int>(threadIdx.x));
        __syncthreads();
    }
    if (busy) {
        Row<D> row;
        rotate_row<D>(a, side, first + own, real, head, w, bad, halves, row);
        if (exact >= 0) {
            auto* const to = reinterpret_cast<uint2*>(a.exact[side] + (exact * a.cache.kv_heads + head) * D + 4 * w);
            const bool finite = row.y[0][0] - row.y[0][0] == 0; // or none of the row's are
#pragma unroll
            for (int k = 0; k < Row<D>::kSteps; ++k) {
                uint32_t two[2];
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    const float x = fminf(fmaxf(row.y[k][2 * i], -65504.0F), 65504.0F);
                    const float y = fminf(fmaxf(row.y[k][2 * i + 1], -65504.0F), 65504.0F);
                    const __half2 h = finite ? __floats2half2_rn(x, y) : __half2{};
                    two[i] = reinterpret_cast<const uint32_t&>(h);
                }
                to[4 * k] = {two[0], two[1]};
            }
        }
        const SideTable& table = a.cache.side[side];
        const auto ranges = static_cast<uint32_t>(__cvta_generic_to_shared(search));
        uint8_t* const to = codes[side] + own * kPitch<D>;
        uint16_t scale;
        switch (BITS != 0 ? BITS : table.bits) {
        case 2: scale = encode_row<D, 2>(table, ranges, row, w, to); break;
        case 3: scale = encode_row<D, 3>(table, ranges, row, w, to); break;
        case 4: scale = encode_row<D, 4>(table, ranges, row, w, to); break;
        default: scale = encode_row<D, 8>(table, ranges, row, w, to); break;
        }
        if (w == 0) {
            scales[side][own] = scale;
        }
    }
    __syncthreads();
    const int key_side = side_bytes(D, a.cache.side[0].bits);
    const int code_bytes = key_side + side_bytes(D, a.cache.side[1].bits);
    const auto tile_of = [&](int64_t of) {
        const int tiles = a.cache.page_size / kTileTokens;
        const int in_page = static_cast<int>(of) & (a.cache.page_size - 1);
        return a.cache.pages + (of >> a.cache.page_shift) * a.cache.page_bytes +
               static_cast<int64_t>(head * tiles + in_page / kTileTokens) * a.cache.tile_bytes;
    };
    const int bits = BITS != 0 ? BITS : a.cache.side[side].bits;
    const int thread = static_cast<int>(thread_of_side);
    // Do the rows fill a tile in order? Every warp sees for itself; the slots were not needed until here.
    slot = slot < a.cache.n_slots ? slot : -1;
    const int64_t slot0 = __shfl_sync(kAll, slot, 0);
    const bool whole_tile = __all_sync(kAll, slot0 >= 0 && (slot0 & (kTileTokens - 1)) == 0 && slot == slot0 + mine);
    if (whole_tile) {
        uint8_t* const tile = tile_of(slot0);
        if (side == 0) {
            put_side<D, true>(tile, bits, codes[0], nullptr);
        } else {
            if (bits == 8) {
                pair_values<D, true>(codes[1], pairs);
            } else {
                pair_values<D, false>(codes[1], pairs);
            }
            asm volatile("bar.sync 1, %0;" ::"n"(kSideThreads) : "memory"); // the values' warps
            put_side<D, false>(tile + key_side, bits, codes[1], pairs);
        }
        if (thread < kTileTokens) {
            reinterpret_cast<uint16_t*>(tile + code_bytes)[scale_index(thread) + 2 * side] = scales[side][thread];
        }
        return;
    }
    for (int i = thread / 32; i < a.rows; i += kSideThreads / 32) { // a warp a row
        const int64_t to = __shfl_sync(kAll, slot, i);
        if (to < 0) {
            continue;
        }
        uint8_t* const tile = tile_of(to);
        const int token = static_cast<int>(to % kTileTokens);
        uint8_t* const base = tile + (side == 0 ? 0 : key_side);
        const uint8_t* const from = codes[side] + i * kPitch<D>;
        switch (bits) {
        case 2: put_row<D, 2>(base, side, token, from, 0); break;
        case 3:
            put_row<D, 2>(base, side, token, from, 0);
            put_row<D, 1>(base + plane_bytes(D, 2), side, token, from, 2);
            break;
        case 4: put_row<D, 4>(base, side, token, from, 0); break;
        default: put_row<D, 8>(base, side, token, from, 0); break;
        }
        if (lane == 0) {
            reinterpret_cast<uint16_t*>(tile + code_bytes)[scale_index(token) + 2 * side] = scales[side][i];
        }
    }
}

// The presets' bits have kernels of their own.
template <int D>
void launch_bits(const EncodeArgs& args, int bits, dim3 grid, cudaStream_t stream) {
    switch (bits) {
    case 3: encode_kernel<D, 3><<<grid, kEncodeThreads, 0, stream>>>(args); break;
    case 4: encode_kernel<D, 4><<<grid, kEncodeThreads, 0, stream>>>(args); break;
    default: encode_kernel<D, 0><<<grid, kEncodeThreads, 0, stream>>>(args); break;
    }
}

} // namespace

cudaError_t launch_encode(EncodeArgs args, int head_size, cudaStream_t stream) {
    // A block of few tokens is short of warps that write rows one after the other: fewer rows a block.
    args.rows = args.n <= 64 ? 2 : args.n <= 256 ? 4 : kTileTokens;
    const dim3 grid(static_cast<unsigned>((args.n + args.rows - 1) / args.rows),
                    static_cast<unsigned>(args.cache.kv_heads));
    const int bits = args.cache.side[0].bits == args.cache.side[1].bits ? args.cache.side[0].bits : 0;
    switch (head_size) {
    case 64: launch_bits<64>(args, bits, grid, stream); break;
    case 128: launch_bits<128>(args, bits, grid, stream); break;
    default: launch_bits<256>(args, bits, grid, stream); break;
    }
    return cudaGetLastError();
}

} // namespace turboquant::cuda
