// Kernels for AVX-512 F/BW/DQ/VL with VNNI. Compiled for that; called only where the processor has it.
//
// Integer tiles: one dot-product instruction takes four bytes of codes a lane. The other factor has two byte terms, so
// that nothing is lost that matters (16 bits of the query, 16 of the weights):
//   keys    lane = row,     codes + 128 as u8, query = 256 hi + lo in s8; the 128 is repaid by the query's sum
//   values  lane = channel, codes as s8, weights = 256 hi + lo in u8
#include "attention/kernels.h"

#if defined(__GNUC__) && !defined(__clang__) // GCC 12 warns of its own header (GCC bug 105593)
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

namespace turboquant::attention {
namespace {
#include "attention/float_kernels.inl"

constexpr int kPrefetchBytes = 1536; // ahead in a stream; measured at 32K rows

// ---- codes to bytes --------------------------------------------------------------------------------------------------
// A line of the first plane holds kFields vectors of 16 lanes x 4 codes. Of the second plane, one line serves kRatio
// lines of the first; `high` comes shifted so that this line's fields are the lowest.

inline __m512i load_line(const uint8_t* p) {
    _mm_prefetch(reinterpret_cast<const char*>(p + kPrefetchBytes), _MM_HINT_T0);
    return _mm512_load_si512(p);
}

inline __m512i spread(const int8_t* table) {
    return _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(table)));
}

// Up to 4 bits: the whole code indexes a table of 16.
struct SmallDecoder {
    SmallDecoder(const LevelTables& t, int offset)
        : table(_mm512_add_epi8(spread(t.value), _mm512_set1_epi8(static_cast<char>(offset)))) {}
    __m512i table;
};

template <int Bits>
struct Decoder;

template <>
struct Decoder<2> : SmallDecoder {
    using SmallDecoder::SmallDecoder;
    static constexpr int kFields = 4, kRatio = 1;
    template <int F>
    __m512i get(__m512i low, __m512i) const {
        const __m512i index = F == 0 ? low : _mm512_srli_epi32(low, 2 * F);
        return _mm512_shuffle_epi8(table, _mm512_and_si512(index, _mm512_set1_epi8(3)));
    }
};

template <>
struct Decoder<3> : SmallDecoder {
    using SmallDecoder::SmallDecoder;
    static constexpr int kFields = 4, kRatio = 2, kHighWidth = 1;
    template <int F>
    __m512i get(__m512i low, __m512i high) const {
        const __m512i three = _mm512_set1_epi8(3);
        const __m512i magnitude = F == 0 ? low : _mm512_srli_epi32(low, 2 * F);
        const __m512i sign = F < 2 ? _mm512_slli_epi32(high, 2 - F) : F == 2 ? high : _mm512_srli_epi32(high, F - 2);
        const __m512i index =
            _mm512_ternarylogic_epi32(three, magnitude, sign, 0xca); // bitwise three ? magnitude : sign
        return _mm512_shuffle_epi8(table, _mm512_and_si512(index, _mm512_set1_epi8(7)));
    }
};

template <>
struct Decoder<4> : SmallDecoder {
    using SmallDecoder::SmallDecoder;
    static constexpr int kFields = 2, kRatio = 1;
    template <int F>
    __m512i get(__m512i low, __m512i) const {
        const __m512i index = F == 0 ? low : _mm512_srli_epi32(low, 4);
        return _mm512_shuffle_epi8(table, _mm512_and_si512(index, _mm512_set1_epi8(15)));
    }
};

template <>
struct Decoder<5> {
    static constexpr int kFields = 2, kRatio = 4, kHighWidth = 1;
    Decoder(const LevelTables& t, int offset) {
        const __m512i plus = _mm512_set1_epi8(static_cast<char>(offset));
        positive = _mm512_add_epi8(plus, spread(t.magnitude));
        negative = _mm512_sub_epi8(plus, spread(t.magnitude));
    }
    template <int F>
    __m512i get(__m512i low, __m512i high) const {
        const __m512i index = _mm512_and_si512(F == 0 ? low : _mm512_srli_epi32(low, 4), _mm512_set1_epi8(15));
        const __mmask64 sign = _mm512_test_epi8_mask(high, _mm512_set1_epi8(1 << F));
        return _mm512_mask_shuffle_epi8(_mm512_shuffle_epi8(positive, index), sign, negative, index);
    }
    __m512i positive;
    __m512i negative;
};

template <>
struct Decoder<6> {
    static constexpr int kFields = 2, kRatio = 2, kHighWidth = 2;
    Decoder(const LevelTables& t, int o)
        : first(spread(t.magnitude)),
          second(spread(t.magnitude + 16)),
          offset(_mm512_set1_epi8(static_cast<char>(o))) {}
    template <int F>
    __m512i get(__m512i low, __m512i high) const {
        const __m512i index = _mm512_and_si512(F == 0 ? low : _mm512_srli_epi32(low, 4), _mm512_set1_epi8(15));
        const __mmask64 upper = _mm512_test_epi8_mask(high, _mm512_set1_epi8(1 << (2 * F)));
        const __mmask64 sign = _mm512_test_epi8_mask(high, _mm512_set1_epi8(2 << (2 * F)));
        const __m512i level = _mm512_mask_shuffle_epi8(_mm512_shuffle_epi8(first, index), upper, second, index);
        return _mm512_mask_sub_epi8(_mm512_add_epi8(offset, level), sign, offset, level);
    }
    __m512i first;
    __m512i second;
    __m512i offset;
};

template <>
struct Decoder<8> {
    static constexpr int kFields = 1, kRatio = 1;
    Decoder(const LevelTables&, int o) : offset(_mm512_set1_epi8(static_cast<char>(o))) {}
    template <int F>
    __m512i get(__m512i low, __m512i) const {
        return _mm512_add_epi8(low, offset);
    }
    __m512i offset;
};

// The second plane's line for line `group` of the first, its fields shifted down. `lines`: where the second plane's
// lines of this traversal begin, `stride` bytes apart.
template <class D>
inline __m512i high_line(const uint8_t* lines, int group, int stride) {
    if constexpr (D::kRatio == 1) {
        return _mm512_setzero_si512();
    } else {
        const __m512i line = load_line(lines + group / D::kRatio * stride);
        return _mm512_srl_epi32(line, _mm_cvtsi32_si128(group % D::kRatio * D::kFields * D::kHighWidth));
    }
}

// ---- scores ----------------------------------------------------------------------------------------------------------

// One field of `Lines` lines against all heads.
template <class D, int Heads, int Lines, int F>
inline void score_field(const D& decoder, const __m512i (&low)[Lines], const __m512i (&high)[Lines], const IntWord* q,
                        int q_stride, __m512i (&acc)[Lines][Heads][2]) {
    __m512i codes[Lines];
    for (int j = 0; j < Lines; ++j) {
        codes[j] = decoder.template get<F>(low[j], high[j]);
    }
    for (int h = 0; h < Heads; ++h) {
        for (int term = 0; term < 2; ++term) {
            const __m512i word = _mm512_set1_epi32(q[h * q_stride + F].term[term]);
            for (int j = 0; j < Lines; ++j) {
                acc[j][h][term] = _mm512_dpbusd_epi32(acc[j][h][term], codes[j], word);
            }
        }
    }
    if constexpr (F + 1 < D::kFields) {
        score_field<D, Heads, Lines, F + 1>(decoder, low, high, q, q_stride, acc);
    }
}

template <int Bits, int Heads>
void scores(const TileLayout& tile, const LevelTables& tables, const uint8_t* codes, const uint16_t* scales,
            const IntWord* q, int q_stride, const float* mul, const int32_t* sum, float* s) {
    using D = Decoder<Bits>;
    constexpr int kLines = Heads <= 6 ? 2 : 1; // two share the query's words, as long as the sums fit the registers
    const D decoder(tables, 128);
    const int groups = tile.planes[0].padded_channels / (4 * D::kFields);
    const int high_groups = tile.n_planes > 1 ? tile.planes[1].padded_channels / (4 * D::kFields * D::kRatio) : 0;
    for (int half = 0; half < 2; ++half) {
        for (int first = 0; first < 2; first += kLines) {
            const uint8_t* low = codes + (half * groups * 2 + first) * kLineBytes;
            const uint8_t* high = codes + tile.planes[1].offset + (half * high_groups * 2 + first) * kLineBytes;
            __m512i acc[kLines][Heads][2] = {};
            for (int group = 0; group < groups; ++group) {
                __m512i low_lines[kLines];
                __m512i high_lines[kLines];
                for (int j = 0; j < kLines; ++j) {
                    low_lines[j] = load_line(low + (group * 2 + j) * kLineBytes);
                    high_lines[j] = high_line<D>(high + j * kLineBytes, group, 2 * kLineBytes);
                }
                score_field<D, Heads, kLines, 0>(decoder, low_lines, high_lines, q + group * D::kFields, q_stride, acc);
            }
            for (int j = 0; j < kLines; ++j) {
                const int row = half * 32 + (first + j) * 16;
                const __m512 scale = _mm512_cvtph_ps(_mm256_load_si256(reinterpret_cast<const __m256i*>(scales + row)));
                for (int h = 0; h < Heads; ++h) {
                    __m512i v = _mm512_add_epi32(_mm512_slli_epi32(acc[j][h][0], 8), acc[j][h][1]);
                    v = _mm512_sub_epi32(v, _mm512_set1_epi32(sum[h] * 128));
                    _mm512_storeu_ps(
                        s + h * kTileRows + row,
                        _mm512_mul_ps(_mm512_cvtepi32_ps(v), _mm512_mul_ps(scale, _mm512_set1_ps(mul[h]))));
                }
            }
        }
    }
}

// ---- values ----------------------------------------------------------------------------------------------------------

template <class D, int Heads, int Columns, int F>
inline void value_field(const D& decoder, const __m512i (&low)[Columns], const __m512i (&high)[Columns],
                        const IntWord* w, __m512i (&acc)[Columns][Heads][2]) {
    __m512i codes[Columns];
    for (int j = 0; j < Columns; ++j) {
        codes[j] = decoder.template get<F>(low[j], high[j]);
    }
    for (int h = 0; h < Heads; ++h) {
        for (int term = 0; term < 2; ++term) {
            const __m512i word = _mm512_set1_epi32(w[h * (kTileRows / 4) + F].term[term]);
            for (int j = 0; j < Columns; ++j) {
                acc[j][h][term] = _mm512_dpbusd_epi32(acc[j][h][term], word, codes[j]);
            }
        }
    }
    if constexpr (F + 1 < D::kFields) {
        value_field<D, Heads, Columns, F + 1>(decoder, low, high, w, acc);
    }
}

// `Columns` groups of 16 channels.
template <int Bits, int Heads, int Columns>
inline void value_columns(const Decoder<Bits>& decoder, const uint8_t* low, const uint8_t* high, const IntWord* w,
                          const float* mul, const float* rescale, float* acc, int acc_stride) {
    using D = Decoder<Bits>;
    constexpr int kGroups = kTileRows / (4 * D::kFields);
    constexpr int kHighGroups = kGroups / D::kRatio;
    __m512i sums[Columns][Heads][2] = {};
    for (int group = 0; group < kGroups; ++group) {
        __m512i low_lines[Columns];
        __m512i high_lines[Columns];
        for (int j = 0; j < Columns; ++j) {
            low_lines[j] = load_line(low + (j * kGroups + group) * kLineBytes);
            high_lines[j] = high_line<D>(high + j * kHighGroups * kLineBytes, group, kLineBytes);
        }
        value_field<D, Heads, Columns, 0>(decoder, low_lines, high_lines, w + group * D::kFields, sums);
    }
    for (int h = 0; h < Heads; ++h) {
        for (int j = 0; j < Columns; ++j) {
            const __m512 sum = _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(sums[j][h][0], 8), sums[j][h][1]));
            float* to = acc + h * acc_stride + j * 16;
            const __m512 old = _mm512_mul_ps(_mm512_loadu_ps(to), _mm512_set1_ps(rescale[h]));
            _mm512_storeu_ps(to, _mm512_fmadd_ps(sum, _mm512_set1_ps(mul[h]), old));
        }
    }
}

template <int Bits, int Heads>
void values(const TileLayout& tile, const LevelTables& tables, const uint8_t* codes, const IntWord* w, const float* mul,
            const int32_t*, const float* rescale, float* acc, int acc_stride) {
    using D = Decoder<Bits>;
    constexpr int kColumns = Heads <= 6 ? 2 : 1;
    constexpr int kLowBytes = kTileRows / (4 * D::kFields) * kLineBytes; // of 16 channels
    constexpr int kHighBytes = D::kRatio == 1 ? 0 : kLowBytes / D::kRatio;
    const D decoder(tables, 0);
    const uint8_t* low = codes;
    const uint8_t* high = codes + tile.planes[1].offset;
    const int columns = tile.planes[0].padded_channels / 16;
    int c = 0;
    for (; c + kColumns <= columns; c += kColumns) {
        value_columns<Bits, Heads, kColumns>(decoder, low + c * kLowBytes, high + c * kHighBytes, w, mul, rescale,
                                             acc + c * 16, acc_stride);
    }
    if (c < columns) {
        value_columns<Bits, Heads, 1>(decoder, low + c * kLowBytes, high + c * kHighBytes, w, mul, rescale,
                                      acc + c * 16, acc_stride);
    }
}

// ---- quantisation ----------------------------------------------------------------------------------------------------

// 16 integers as two byte terms -> 4 words
inline void store_words(__m512i high, __m512i low, IntWord* words) {
    const __m128i h = _mm512_cvtepi32_epi8(high);
    const __m128i l = _mm512_cvtepi32_epi8(low);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(words), _mm_unpacklo_epi32(h, l));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(words + 2), _mm_unpackhi_epi32(h, l));
}

void quantise_query(const float* q, int n, IntWord* words, float* mul, int32_t* sum) {
    constexpr float kLargest = 127 * 256 + 127; // both terms at most 127
    __m512 top = _mm512_setzero_ps();
    __m512 poison = _mm512_setzero_ps(); // NaN where something is not finite: it must reach the output
    for (int c = 0; c < n; c += 16) {
        const __m512 x = _mm512_loadu_ps(q + c);
        top = _mm512_max_ps(top, _mm512_abs_ps(x));
        poison = _mm512_fmadd_ps(x, _mm512_setzero_ps(), poison);
    }
    const float largest = lane_max(reinterpret_cast<Vf>(top));
    const __m512 factor = _mm512_set1_ps(largest > 0 ? kLargest / largest : 0.0f);
    __m512i total = _mm512_setzero_si512();
    for (int c = 0; c < n; c += 16) {
        const __m512i v = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(q + c), factor));
        const __m512i high = _mm512_srai_epi32(_mm512_add_epi32(v, _mm512_set1_epi32(128)), 8);
        store_words(high, v, words + c / 4); // the low byte of v is v - 256 high
        total = _mm512_add_epi32(total, v);
    }
    for (int w = n / 4; w < (n + 31) / 32 * 8; ++w) {
        words[w] = {};
    }
    alignas(64) int32_t lanes[16];
    _mm512_store_si512(lanes, total);
    int32_t s = 0;
    for (int32_t x : lanes) {
        s += x;
    }
    *sum = s;
    *mul = largest / kLargest + lane_sum(reinterpret_cast<Vf>(poison));
}

void quantise_weights(const float* p, const uint16_t* scales, IntWord* words, float* mul, int32_t* sum) {
    constexpr float kLargest = 65535;
    __m512 w[kTileRows / 16];
    __m512 top = _mm512_setzero_ps();
    for (int i = 0; i < kTileRows / 16; ++i) {
        const __m512 scale = _mm512_cvtph_ps(_mm256_load_si256(reinterpret_cast<const __m256i*>(scales + i * 16)));
        w[i] = _mm512_mul_ps(_mm512_loadu_ps(p + i * 16), scale);
        top = _mm512_max_ps(top, w[i]);
    }
    const float largest = lane_max(reinterpret_cast<Vf>(top));
    const __m512 factor = _mm512_set1_ps(largest > 0 ? kLargest / largest : 0.0f);
    for (int i = 0; i < kTileRows / 16; ++i) {
        const __m512i v = _mm512_cvtps_epi32(_mm512_mul_ps(w[i], factor));
        store_words(_mm512_srli_epi32(v, 8), v, words + i * 4);
    }
    *mul = largest / kLargest;
    *sum = 0; // codes are signed here: nothing to repay
}

#include "attention/int_dispatch.inl"

constexpr Kernels kAvx512 = all_kernels();
} // namespace

const Kernels& avx512_kernels() {
    return kAvx512;
}

} // namespace turboquant::attention
