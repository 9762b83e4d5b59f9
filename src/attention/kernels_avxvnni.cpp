// Kernels for AVX2 with AVX-VNNI: dot products of bytes in 256-bit vectors, as client processors without AVX-512 have
// them. Compiled for that; called only where the processor has it. The arithmetic is kernels_avx512.cpp's.
#include "attention/kernels.h"

#include <immintrin.h>

namespace turboquant::attention {
namespace {
#include "attention/float_kernels.inl"
#include "attention/vectors256.inl"

constexpr int kKeyOffset = 128;
constexpr int kValueOffset = 0;
constexpr float kLargestQuery = 127 * 256 + 127; // both terms at most 127
constexpr float kLargestWeight = 65535;
constexpr int kMostHeads = 6; // of two sums each in 16 registers

constexpr int vectors_at_once(int heads) {
    return heads == 1 ? 4 : heads <= 3 ? 2 : 1;
}
constexpr bool kDecodeFirst = false;

using Codes = Bytes;
inline Codes operand(Bytes codes) {
    return codes;
}

struct Word {
    __m256i high;
    __m256i low;
};
inline Word word(const IntWord& w) {
    return {_mm256_set1_epi32(w.term[0]), _mm256_set1_epi32(w.term[1])};
}

// sum += four products of unsigned and signed bytes a lane. Written out for GCC, which otherwise copies every sum to
// another register and back.
inline void dot_bytes(__m256i& sum, __m256i unsigned_bytes, __m256i signed_bytes) {
#if defined(__GNUC__) && !defined(__clang__)
    asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(unsigned_bytes), "x"(signed_bytes));
#else
    sum = _mm256_dpbusd_avx_epi32(sum, unsigned_bytes, signed_bytes);
#endif
}

struct Sum {
    __m256i high;
    __m256i low;
};
inline void dot_key(Sum& sum, Codes codes, const Word& word) {
    dot_bytes(sum.high, codes, word.high);
    dot_bytes(sum.low, codes, word.low);
}
inline void dot_value(Sum& sum, Codes codes, const Word& word) {
    dot_bytes(sum.high, word.high, codes);
    dot_bytes(sum.low, word.low, codes);
}
inline Vi total(const Sum& sum) {
    return reinterpret_cast<Vi>(_mm256_add_epi32(_mm256_slli_epi32(sum.high, 8), sum.low));
}

// Of each four integers of 16 bits: the high bytes, then the low ones.
inline void store_terms(__m256i integers, IntWord* words) {
    const __m256i order = _mm256_setr_epi8(1, 3, 5, 7, 0, 2, 4, 6, 9, 11, 13, 15, 8, 10, 12, 14, 1, 3, 5, 7, 0, 2, 4, 6,
                                           9, 11, 13, 15, 8, 10, 12, 14);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(words), order_groups(_mm256_shuffle_epi8(integers, order)));
}
inline void store_query_words(const Vi (&v)[2], IntWord* words) {
    const __m256i x =
        _mm256_packs_epi32(reinterpret_cast<const __m256i&>(v[0]), reinterpret_cast<const __m256i&>(v[1]));
    const __m256i high = _mm256_add_epi16(x, _mm256_set1_epi16(128)); // so that the low byte is v - 256 high
    store_terms(choose(_mm256_set1_epi16(255), x, high), words);
}
inline void store_weight_words(const Vi (&v)[2], IntWord* words) {
    store_terms(_mm256_packus_epi32(reinterpret_cast<const __m256i&>(v[0]), reinterpret_cast<const __m256i&>(v[1])),
                words);
}

#include "attention/int_decoders.inl"

#include "attention/int_kernels.inl"

constexpr Kernels kAvxVnni = all_kernels();
} // namespace

const Kernels& avxvnni_kernels() {
    return kAvxVnni;
}

} // namespace turboquant::attention
