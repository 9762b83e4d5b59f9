// Kernels for AVX2 with FMA and F16C. Compiled for that; called only where the processor has it.
//
// Integer tiles: codes + 128 as 16-bit numbers, the even bytes of a 32-bit lane and the odd ones apart, against pairs
// of 16-bit integers of the query (keys: lane = row) or of the weights (values: lane = channel). A word's two terms
// are the pairs (0, 2) and (1, 3). The 128 is repaid by the sum of the integers. 32-bit sums may wrap on the way; the
// end result fits.
#include "attention/kernels.h"

#include <immintrin.h>

namespace turboquant::attention {
namespace {
#include "attention/float_kernels.inl"

constexpr int kPrefetchBytes = 1536; // ahead in a stream
constexpr int kHalves = 2;           // vectors a line

// ---- codes to bytes --------------------------------------------------------------------------------------------------
// A line of the first plane holds kFields pairs of vectors of 8 lanes x 4 codes. Of the second plane, one line serves
// kRatio lines of the first; `high` comes shifted so that this line's fields are the lowest. get() gives code + 128.

inline __m256i load_half(const uint8_t* p) {
    return _mm256_load_si256(reinterpret_cast<const __m256i*>(p));
}
inline __m256i spread(const int8_t* table) {
    return _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(table)));
}
inline __m256i bytes(int x) {
    return _mm256_set1_epi8(static_cast<char>(x));
}

// Up to 4 bits: the whole code indexes a table of 16.
struct SmallDecoder {
    explicit SmallDecoder(const LevelTables& t) : table(_mm256_add_epi8(spread(t.value), bytes(128))) {}
    __m256i table;
};

template <int Bits>
struct Decoder;

template <>
struct Decoder<2> : SmallDecoder {
    using SmallDecoder::SmallDecoder;
    static constexpr int kFields = 4, kRatio = 1;
    template <int F>
    __m256i get(__m256i low, __m256i) const {
        const __m256i index = F == 0 ? low : _mm256_srli_epi32(low, 2 * F);
        return _mm256_shuffle_epi8(table, _mm256_and_si256(index, bytes(3)));
    }
};

template <>
struct Decoder<3> : SmallDecoder {
    using SmallDecoder::SmallDecoder;
    static constexpr int kFields = 4, kRatio = 2, kHighWidth = 1;
    template <int F>
    __m256i get(__m256i low, __m256i high) const {
        const __m256i magnitude = F == 0 ? low : _mm256_srli_epi32(low, 2 * F);
        const __m256i sign = F < 2 ? _mm256_slli_epi32(high, 2 - F) : F == 2 ? high : _mm256_srli_epi32(high, F - 2);
        return _mm256_shuffle_epi8(
            table, _mm256_or_si256(_mm256_and_si256(magnitude, bytes(3)), _mm256_and_si256(sign, bytes(4))));
    }
};

template <>
struct Decoder<4> : SmallDecoder {
    using SmallDecoder::SmallDecoder;
    static constexpr int kFields = 2, kRatio = 1;
    template <int F>
    __m256i get(__m256i low, __m256i) const {
        const __m256i index = F == 0 ? low : _mm256_srli_epi32(low, 4);
        return _mm256_shuffle_epi8(table, _mm256_and_si256(index, bytes(15)));
    }
};

template <>
struct Decoder<5> {
    static constexpr int kFields = 2, kRatio = 4, kHighWidth = 1;
    explicit Decoder(const LevelTables& t)
        : positive(_mm256_add_epi8(bytes(128), spread(t.magnitude))),
          negative(_mm256_sub_epi8(bytes(128), spread(t.magnitude))) {}
    template <int F>
    __m256i get(__m256i low, __m256i high) const {
        const __m256i index = _mm256_and_si256(F == 0 ? low : _mm256_srli_epi32(low, 4), bytes(15));
        const __m256i sign = _mm256_slli_epi32(high, 7 - F); // to the top bit of each byte, which is what blends
        return _mm256_blendv_epi8(_mm256_shuffle_epi8(positive, index), _mm256_shuffle_epi8(negative, index), sign);
    }
    __m256i positive;
    __m256i negative;
};

template <>
struct Decoder<6> {
    static constexpr int kFields = 2, kRatio = 2, kHighWidth = 2;
    explicit Decoder(const LevelTables& t) : first(spread(t.magnitude)), second(spread(t.magnitude + 16)) {}
    template <int F>
    __m256i get(__m256i low, __m256i high) const {
        const __m256i index = _mm256_and_si256(F == 0 ? low : _mm256_srli_epi32(low, 4), bytes(15));
        const __m256i upper = _mm256_slli_epi32(high, 7 - 2 * F);
        const __m256i sign = _mm256_slli_epi32(high, 6 - 2 * F);
        const __m256i level =
            _mm256_blendv_epi8(_mm256_shuffle_epi8(first, index), _mm256_shuffle_epi8(second, index), upper);
        return _mm256_blendv_epi8(_mm256_add_epi8(bytes(128), level), _mm256_sub_epi8(bytes(128), level), sign);
    }
    __m256i first;
    __m256i second;
};

template <>
struct Decoder<8> {
    static constexpr int kFields = 1, kRatio = 1;
    explicit Decoder(const LevelTables&) {}
    template <int F>
    __m256i get(__m256i low, __m256i) const {
        return _mm256_xor_si256(low, bytes(128));
    }
};

// Half of the second plane's line for line `group` of the first, its fields shifted down.
template <class D>
inline __m256i high_half(const uint8_t* lines, int group, int stride) {
    if constexpr (D::kRatio == 1) {
        return _mm256_setzero_si256();
    } else {
        return _mm256_srl_epi32(load_half(lines + group / D::kRatio * stride),
                                _mm_cvtsi32_si128(group % D::kRatio * D::kFields * D::kHighWidth));
    }
}

// acc[half][head] += codes * words of one field, for both halves of a line.
template <class D, int Heads, int Parts, int F>
inline void dot_fields(const D& decoder, const __m256i (&low)[Parts], const __m256i (&high)[Parts],
                       const IntWord* words, int stride, __m256i (&acc)[Parts][Heads]) {
    __m256i even[Parts];
    __m256i odd[Parts];
    for (int j = 0; j < Parts; ++j) {
        const __m256i codes = decoder.template get<F>(low[j], high[j]);
        even[j] = _mm256_and_si256(codes, _mm256_set1_epi16(255));
        odd[j] = _mm256_srli_epi16(codes, 8);
    }
    for (int h = 0; h < Heads; ++h) {
        const __m256i first = _mm256_set1_epi32(words[h * stride + F].term[0]);
        const __m256i second = _mm256_set1_epi32(words[h * stride + F].term[1]);
        for (int j = 0; j < Parts; ++j) {
            acc[j][h] = _mm256_add_epi32(
                acc[j][h], _mm256_add_epi32(_mm256_madd_epi16(even[j], first), _mm256_madd_epi16(odd[j], second)));
        }
    }
    if constexpr (F + 1 < D::kFields) {
        dot_fields<D, Heads, Parts, F + 1>(decoder, low, high, words, stride, acc);
    }
}

// Sums of `groups` lines of the first plane, `stride` bytes apart, part `half` and following of each line.
template <class D, int Heads, int Parts>
inline void dot_lines(const D& decoder, const uint8_t* low, const uint8_t* high, int groups, int stride,
                      const IntWord* words, int words_stride, __m256i (&acc)[Parts][Heads]) {
    for (int group = 0; group < groups; ++group) {
        _mm_prefetch(reinterpret_cast<const char*>(low + group * stride + kPrefetchBytes), _MM_HINT_T0);
        __m256i low_parts[Parts];
        __m256i high_parts[Parts];
        for (int j = 0; j < Parts; ++j) {
            low_parts[j] = load_half(low + group * stride + j * 32);
            high_parts[j] = high_half<D>(high + j * 32, group, stride);
        }
        dot_fields<D, Heads, Parts, 0>(decoder, low_parts, high_parts, words + group * D::kFields, words_stride, acc);
    }
}

// Up to 4 heads the sums of both halves of a line fit the registers.
template <int Heads>
constexpr int kParts = Heads <= 4 ? kHalves : 1;

template <int Bits, int Heads>
void scores(const TileLayout& tile, const LevelTables& tables, const uint8_t* codes, const uint16_t* scales,
            const IntWord* q, int q_stride, const float* mul, const int32_t* sum, float* s) {
    using D = Decoder<Bits>;
    const D decoder(tables);
    const int groups = tile.planes[0].padded_channels / (4 * D::kFields);
    const int high_groups = tile.n_planes > 1 ? tile.planes[1].padded_channels / (4 * D::kFields * D::kRatio) : 0;
    for (int line = 0; line < 4; ++line) { // of 16 rows
        for (int part = 0; part < kHalves; part += kParts<Heads>) {
            const int offset = line % 2 * kLineBytes + part * 32;
            const uint8_t* low = codes + line / 2 * groups * 2 * kLineBytes + offset;
            const uint8_t* high = codes + tile.planes[1].offset + line / 2 * high_groups * 2 * kLineBytes + offset;
            __m256i acc[kParts<Heads>][Heads] = {};
            dot_lines<D, Heads, kParts<Heads>>(decoder, low, high, groups, 2 * kLineBytes, q, q_stride, acc);
            for (int j = 0; j < kParts<Heads>; ++j) {
                const int row = line * 16 + (part + j) * 8;
                const __m256 scale = _mm256_cvtph_ps(_mm_load_si128(reinterpret_cast<const __m128i*>(scales + row)));
                for (int h = 0; h < Heads; ++h) {
                    const __m256i v = _mm256_sub_epi32(
                        acc[j][h], _mm256_set1_epi32(static_cast<int32_t>(static_cast<uint32_t>(sum[h]) * 128U)));
                    _mm256_storeu_ps(
                        s + h * kTileRows + row,
                        _mm256_mul_ps(_mm256_cvtepi32_ps(v), _mm256_mul_ps(scale, _mm256_set1_ps(mul[h]))));
                }
            }
        }
    }
}

template <int Bits, int Heads>
void values(const TileLayout& tile, const LevelTables& tables, const uint8_t* codes, const IntWord* w, const float* mul,
            const int32_t* sum, const float* rescale, float* acc, int acc_stride) {
    using D = Decoder<Bits>;
    constexpr int kGroups = kTileRows / (4 * D::kFields);
    constexpr int kHighGroups = D::kRatio == 1 ? 0 : kGroups / D::kRatio;
    const D decoder(tables);
    const int columns = tile.planes[0].padded_channels / 16;
    for (int c = 0; c < columns; ++c) {
        for (int part = 0; part < kHalves; part += kParts<Heads>) {
            const uint8_t* low = codes + c * kGroups * kLineBytes + part * 32;
            const uint8_t* high = codes + tile.planes[1].offset + c * kHighGroups * kLineBytes + part * 32;
            __m256i sums[kParts<Heads>][Heads] = {};
            dot_lines<D, Heads, kParts<Heads>>(decoder, low, high, kGroups, kLineBytes, w, kTileRows / 4, sums);
            for (int h = 0; h < Heads; ++h) {
                for (int j = 0; j < kParts<Heads>; ++j) {
                    const __m256 v = _mm256_cvtepi32_ps(_mm256_sub_epi32(sums[j][h], _mm256_set1_epi32(sum[h] * 128)));
                    float* to = acc + h * acc_stride + c * 16 + (part + j) * 8;
                    const __m256 old = _mm256_mul_ps(_mm256_loadu_ps(to), _mm256_set1_ps(rescale[h]));
                    _mm256_storeu_ps(to, _mm256_fmadd_ps(v, _mm256_set1_ps(mul[h]), old));
                }
            }
        }
    }
}

// ---- quantisation ----------------------------------------------------------------------------------------------------

// 8 integers of 16 bits -> 2 words
inline void store_words(__m256i v, IntWord* words) {
    const __m128i packed = _mm_packs_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    // of each four: (0, 2), (1, 3)
    const __m128i order = _mm_setr_epi8(0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(words), _mm_shuffle_epi8(packed, order));
}

inline int32_t lane_total(__m256i v) {
    alignas(32) int32_t lanes[8];
    _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), v);
    int32_t s = 0;
    for (int32_t x : lanes) {
        s += x;
    }
    return s;
}

constexpr float kLargest = 32767;

void quantise_query(const float* q, int n, IntWord* words, float* mul, int32_t* sum) {
    __m256 top = _mm256_setzero_ps();
    __m256 poison = _mm256_setzero_ps(); // NaN where something is not finite: it must reach the output
    const __m256 no_sign = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
    for (int c = 0; c < n; c += 8) {
        const __m256 x = _mm256_loadu_ps(q + c);
        top = _mm256_max_ps(top, _mm256_and_ps(x, no_sign));
        poison = _mm256_fmadd_ps(x, _mm256_setzero_ps(), poison);
    }
    const float largest = lane_max(reinterpret_cast<Vf>(top));
    const __m256 factor = _mm256_set1_ps(largest > 0 ? kLargest / largest : 0.0f);
    __m256i total = _mm256_setzero_si256();
    for (int c = 0; c < n; c += 8) {
        const __m256i v = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(q + c), factor));
        store_words(v, words + c / 4);
        total = _mm256_add_epi32(total, v);
    }
    for (int w = n / 4; w < (n + 31) / 32 * 8; ++w) {
        words[w] = {};
    }
    *sum = lane_total(total);
    *mul = largest / kLargest + lane_sum(reinterpret_cast<Vf>(poison));
}

void quantise_weights(const float* p, const uint16_t* scales, IntWord* words, float* mul, int32_t* sum) {
    __m256 w[kTileRows / 8];
    __m256 top = _mm256_setzero_ps();
    for (int i = 0; i < kTileRows / 8; ++i) {
        const __m256 scale = _mm256_cvtph_ps(_mm_load_si128(reinterpret_cast<const __m128i*>(scales + i * 8)));
        w[i] = _mm256_mul_ps(_mm256_loadu_ps(p + i * 8), scale);
        top = _mm256_max_ps(top, w[i]);
    }
    const float largest = lane_max(reinterpret_cast<Vf>(top));
    const __m256 factor = _mm256_set1_ps(largest > 0 ? kLargest / largest : 0.0f);
    __m256i total = _mm256_setzero_si256();
    for (int i = 0; i < kTileRows / 8; ++i) {
        const __m256i v = _mm256_cvtps_epi32(_mm256_mul_ps(w[i], factor));
        store_words(v, words + i * 2);
        total = _mm256_add_epi32(total, v);
    }
    *mul = largest / kLargest;
    *sum = lane_total(total);
}

#include "attention/int_dispatch.inl"

constexpr Kernels kAvx2 = all_kernels();
} // namespace

const Kernels& avx2_kernels() {
    return kAvx2;
}

} // namespace turboquant::attention
