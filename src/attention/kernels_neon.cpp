// Kernels for AArch64 with the dot-product instructions (ARMv8.2 and later). Compiled for that; called only where the
// processor has them.
//
// Integer tiles: one dot-product instruction takes four signed bytes of codes a lane; the other factor (query: lane =
// row; weights: lane = channel) has two signed byte terms, 256 hi + lo.
#include "attention/kernels.h"

#include <arm_neon.h>

namespace turboquant::attention {
namespace {
#include "attention/float_kernels.inl"

constexpr int kQuarters = 4;    // vectors a line
constexpr int kLargest = 32639; // 127 * 256 + 127

// ---- codes to bytes --------------------------------------------------------------------------------------------------
// A line of the first plane holds kFields times four vectors of 4 lanes x 4 codes. Of the second plane, one line serves
// kRatio lines of the first; `high` comes shifted so that this line's fields are the lowest.

inline uint8x16_t bytes(int x) {
    return vdupq_n_u8(static_cast<uint8_t>(x));
}

// Field F of width W of each byte.
template <int F, int W>
inline uint8x16_t field(uint8x16_t v) {
    if constexpr (F == 0) {
        return vandq_u8(v, bytes((1 << W) - 1));
    } else if constexpr ((F + 1) * W == 8) {
        return vshrq_n_u8(v, F * W);
    } else {
        return vandq_u8(vshrq_n_u8(v, F * W), bytes((1 << W) - 1));
    }
}

// Up to 4 bits: the whole code indexes a table of 16.
struct SmallDecoder {
    explicit SmallDecoder(const LevelTables& t) : table(vld1q_s8(t.value)) {}
    int8x16_t table;
};

template <int Bits>
struct Decoder;

template <>
struct Decoder<2> : SmallDecoder {
    using SmallDecoder::SmallDecoder;
    static constexpr int kFields = 4, kRatio = 1;
    template <int F>
    int8x16_t get(uint8x16_t low, uint8x16_t) const {
        return vqtbl1q_s8(table, field<F, 2>(low));
    }
};

template <>
struct Decoder<3> : SmallDecoder {
    using SmallDecoder::SmallDecoder;
    static constexpr int kFields = 4, kRatio = 2, kHighWidth = 1;
    template <int F>
    int8x16_t get(uint8x16_t low, uint8x16_t high) const {
        return vqtbl1q_s8(table, vorrq_u8(field<F, 2>(low), vandq_u8(vtstq_u8(high, bytes(1 << F)), bytes(4))));
    }
};

template <>
struct Decoder<4> : SmallDecoder {
    using SmallDecoder::SmallDecoder;
    static constexpr int kFields = 2, kRatio = 1;
    template <int F>
    int8x16_t get(uint8x16_t low, uint8x16_t) const {
        return vqtbl1q_s8(table, field<F, 4>(low));
    }
};

template <>
struct Decoder<5> {
    static constexpr int kFields = 2, kRatio = 4, kHighWidth = 1;
    explicit Decoder(const LevelTables& t) : table(vld1q_s8(t.magnitude)) {}
    template <int F>
    int8x16_t get(uint8x16_t low, uint8x16_t high) const {
        const int8x16_t level = vqtbl1q_s8(table, field<F, 4>(low));
        return vbslq_s8(vtstq_u8(high, bytes(1 << F)), vnegq_s8(level), level);
    }
    int8x16_t table;
};

template <>
struct Decoder<6> {
    static constexpr int kFields = 2, kRatio = 2, kHighWidth = 2;
    explicit Decoder(const LevelTables& t) : table(vld1q_s8_x2(t.magnitude)) {}
    template <int F>
    int8x16_t get(uint8x16_t low, uint8x16_t high) const {
        const uint8x16_t upper = vandq_u8(vtstq_u8(high, bytes(1 << (2 * F))), bytes(16));
        const int8x16_t level = vqtbl2q_s8(table, vorrq_u8(field<F, 4>(low), upper));
        return vbslq_s8(vtstq_u8(high, bytes(2 << (2 * F))), vnegq_s8(level), level);
    }
    int8x16x2_t table;
};

template <>
struct Decoder<8> {
    static constexpr int kFields = 1, kRatio = 1;
    explicit Decoder(const LevelTables&) {}
    template <int F>
    int8x16_t get(uint8x16_t low, uint8x16_t) const {
        return vreinterpretq_s8_u8(low);
    }
};

// A quarter of the second plane's line for line `group` of the first, its fields shifted down.
template <class D>
inline uint8x16_t high_quarter(const uint8_t* lines, int group, int stride) {
    if constexpr (D::kRatio == 1) {
        return bytes(0);
    } else {
        const int shift = group % D::kRatio * D::kFields * D::kHighWidth;
        return vshlq_u8(vld1q_u8(lines + group / D::kRatio * stride), vdupq_n_s8(static_cast<int8_t>(-shift)));
    }
}

// acc[part][head][term] += codes * words of one field.
template <class D, int Heads, int Parts, int F>
inline void dot_fields(const D& decoder, const uint8x16_t (&low)[Parts], const uint8x16_t (&high)[Parts],
                       const IntWord* words, int stride, int32x4_t (&acc)[Parts][Heads][2]) {
    int8x16_t codes[Parts];
    for (int j = 0; j < Parts; ++j) {
        codes[j] = decoder.template get<F>(low[j], high[j]);
    }
    for (int h = 0; h < Heads; ++h) {
        for (int term = 0; term < 2; ++term) {
            const int8x16_t word = vreinterpretq_s8_s32(vld1q_dup_s32(&words[h * stride + F].term[term]));
            for (int j = 0; j < Parts; ++j) {
                acc[j][h][term] = vdotq_s32(acc[j][h][term], codes[j], word);
            }
        }
    }
    if constexpr (F + 1 < D::kFields) {
        dot_fields<D, Heads, Parts, F + 1>(decoder, low, high, words, stride, acc);
    }
}

// Sums over `groups` lines of the first plane, `stride` bytes apart: 256 hi + lo as floats, 4 lanes each.
template <class D, int Heads, int Parts>
inline void dot_lines(const D& decoder, const uint8_t* low, const uint8_t* high, int groups, int stride,
                      const IntWord* words, int words_stride, float32x4_t (&sums)[Parts][Heads]) {
    int32x4_t acc[Parts][Heads][2] = {};
    for (int group = 0; group < groups; ++group) {
        uint8x16_t low_parts[Parts];
        uint8x16_t high_parts[Parts];
        for (int j = 0; j < Parts; ++j) {
            low_parts[j] = vld1q_u8(low + group * stride + j * 16);
            high_parts[j] = high_quarter<D>(high + j * 16, group, stride);
        }
        dot_fields<D, Heads, Parts, 0>(decoder, low_parts, high_parts, words + group * D::kFields, words_stride, acc);
    }
    for (int j = 0; j < Parts; ++j) {
        for (int h = 0; h < Heads; ++h) {
            sums[j][h] = vcvtq_f32_s32(vaddq_s32(vshlq_n_s32(acc[j][h][0], 8), acc[j][h][1]));
        }
    }
}

// As many parts of a line at once as the registers hold sums for.
template <int Heads>
constexpr int kParts = Heads <= 2   ? 4
                       : Heads <= 4 ? 2
                                    : 1;

inline float32x4_t load_halves(const uint16_t* p) {
    return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p)));
}

template <int Bits, int Heads>
void scores(const TileLayout& tile, const LevelTables& tables, const uint8_t* codes, const uint16_t* scales,
            const IntWord* q, int q_stride, const float* mul, const int32_t*, float* s) {
    using D = Decoder<Bits>;
    constexpr int kP = kParts<Heads>;
    const D decoder(tables);
    const int groups = tile.planes[0].padded_channels / (4 * D::kFields);
    const int high_groups = tile.n_planes > 1 ? tile.planes[1].padded_channels / (4 * D::kFields * D::kRatio) : 0;
    for (int line = 0; line < 4; ++line) { // of 16 rows
        for (int part = 0; part < kQuarters; part += kP) {
            const int offset = line % 2 * kLineBytes + part * 16;
            float32x4_t sums[kP][Heads];
            dot_lines<D, Heads, kP>(decoder, codes + line / 2 * groups * 2 * kLineBytes + offset,
                                    codes + tile.planes[1].offset + line / 2 * high_groups * 2 * kLineBytes + offset,
                                    groups, 2 * kLineBytes, q, q_stride, sums);
            for (int j = 0; j < kP; ++j) {
                const int row = line * 16 + (part + j) * 4;
                const float32x4_t scale = load_halves(scales + row);
                for (int h = 0; h < Heads; ++h) {
                    vst1q_f32(s + h * kTileRows + row, vmulq_f32(sums[j][h], vmulq_n_f32(scale, mul[h])));
                }
            }
        }
    }
}

template <int Bits, int Heads>
void values(const TileLayout& tile, const LevelTables& tables, const uint8_t* codes, const IntWord* w, const float* mul,
            const int32_t*, const float* rescale, float* acc, int acc_stride) {
    using D = Decoder<Bits>;
    constexpr int kP = kParts<Heads>;
    constexpr int kGroups = kTileRows / (4 * D::kFields);
    constexpr int kHighGroups = D::kRatio == 1 ? 0 : kGroups / D::kRatio;
    const D decoder(tables);
    const int columns = tile.planes[0].padded_channels / 16;
    for (int c = 0; c < columns; ++c) {
        for (int part = 0; part < kQuarters; part += kP) {
            float32x4_t sums[kP][Heads];
            dot_lines<D, Heads, kP>(decoder, codes + c * kGroups * kLineBytes + part * 16,
                                    codes + tile.planes[1].offset + c * kHighGroups * kLineBytes + part * 16, kGroups,
                                    kLineBytes, w, kTileRows / 4, sums);
            for (int h = 0; h < Heads; ++h) {
                for (int j = 0; j < kP; ++j) {
                    float* to = acc + h * acc_stride + c * 16 + (part + j) * 4;
                    const float32x4_t old = vmulq_n_f32(vld1q_f32(to), rescale[h]);
                    vst1q_f32(to, vfmaq_n_f32(old, sums[j][h], mul[h]));
                }
            }
        }
    }
}

// ---- quantisation ----------------------------------------------------------------------------------------------------

// 16 integers as two signed byte terms -> 4 words
inline void store_words(const int32x4_t (&v)[4], IntWord* words) {
    const int16x8_t first = vcombine_s16(vmovn_s32(v[0]), vmovn_s32(v[1]));
    const int16x8_t second = vcombine_s16(vmovn_s32(v[2]), vmovn_s32(v[3]));
    const int8x16_t low = vcombine_s8(vmovn_s16(first), vmovn_s16(second));
    const int16x8_t half = vdupq_n_s16(128);
    const int8x16_t high = vcombine_s8(vshrn_n_s16(vaddq_s16(first, half), 8), vshrn_n_s16(vaddq_s16(second, half), 8));
    const int32x4x2_t terms = {{vreinterpretq_s32_s8(high), vreinterpretq_s32_s8(low)}};
    vst2q_s32(&words[0].term[0], terms);
}

// x[n], n a multiple of 16 -> words; returns what an integer stands for.
inline float quantise(const float* x, int n, IntWord* words) {
    float32x4_t top = vdupq_n_f32(0);
    float32x4_t poison = vdupq_n_f32(0); // NaN where something is not finite: it must reach the output
    for (int c = 0; c < n; c += 4) {
        const float32x4_t v = vld1q_f32(x + c);
        top = vmaxnmq_f32(top, vabsq_f32(v));
        poison = vfmaq_f32(poison, v, vdupq_n_f32(0));
    }
    const float largest = vmaxnmvq_f32(top);
    const float factor = largest > 0 ? kLargest / largest : 0.0f;
    for (int c = 0; c < n; c += 16) {
        int32x4_t v[4];
        for (int i = 0; i < 4; ++i) {
            v[i] = vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(x + c + i * 4), factor));
        }
        store_words(v, words + c / 4);
    }
    return largest / kLargest + vaddvq_f32(poison);
}

void quantise_query(const float* q, int n, IntWord* words, float* mul, int32_t* sum) {
    *mul = quantise(q, n, words);
    for (int w = n / 4; w < (n + 31) / 32 * 8; ++w) {
        words[w] = {};
    }
    *sum = 0; // codes are signed here: nothing to repay
}

void quantise_weights(const float* p, const uint16_t* scales, IntWord* words, float* mul, int32_t* sum) {
    float weights[kTileRows];
    for (int r = 0; r < kTileRows; r += 4) {
        vst1q_f32(weights + r, vmulq_f32(vld1q_f32(p + r), load_halves(scales + r)));
    }
    *mul = quantise(weights, kTileRows, words);
    *sum = 0;
}

#include "attention/int_dispatch.inl"

constexpr Kernels kNeon = all_kernels();
} // namespace

const Kernels& neon_kernels() {
    return kNeon;
}

} // namespace turboquant::attention
