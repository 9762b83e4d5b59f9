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
#include "attention/vectors256.inl"

constexpr int kKeyOffset = 128;
constexpr int kValueOffset = 128;
constexpr float kLargestQuery = 32767;
constexpr float kLargestWeight = 32767;
constexpr int kMostHeads = 8;

constexpr int vectors_at_once(int heads) {
    return heads == 1 ? 4 : heads <= 4 ? 2 : 1;
}
constexpr bool kDecodeFirst = true;

struct Codes {
    __m256i even;
    __m256i odd;
};
inline Codes operand(Bytes codes) {
    return {codes & _mm256_set1_epi16(255), _mm256_srli_epi16(codes, 8)};
}

struct Word {
    __m256i pair[2];
};
inline Word word(const IntWord& w) {
    return {{_mm256_set1_epi32(w.term[0]), _mm256_set1_epi32(w.term[1])}};
}

struct Sum {
    __m256i all;
};
inline void dot_key(Sum& sum, const Codes& codes, const Word& word) {
    sum.all = _mm256_add_epi32(sum.all, _mm256_add_epi32(_mm256_madd_epi16(codes.even, word.pair[0]),
                                                         _mm256_madd_epi16(codes.odd, word.pair[1])));
    asm("" : "+x"(sum.all)); // GCC would add up several fields first, and run out of registers
}
inline void dot_value(Sum& sum, const Codes& codes, const Word& word) {
    dot_key(sum, codes, word);
}
inline Vi total(const Sum& sum) {
    return reinterpret_cast<Vi>(sum.all);
}

// Of each four integers: (0, 2), (1, 3).
inline void store_query_words(const Vi (&v)[2], IntWord* words) {
    const __m256i packed =
        _mm256_packs_epi32(reinterpret_cast<const __m256i&>(v[0]), reinterpret_cast<const __m256i&>(v[1]));
    const __m256i order = _mm256_setr_epi8(0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15, 0, 1, 4, 5, 2, 3, 6, 7,
                                           8, 9, 12, 13, 10, 11, 14, 15);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(words), order_groups(_mm256_shuffle_epi8(packed, order)));
}
inline void store_weight_words(const Vi (&v)[2], IntWord* words) {
    store_query_words(v, words);
}

#include "attention/int_decoders.inl"

#include "attention/int_kernels.inl"

constexpr Kernels kAvx2 = all_kernels();
} // namespace

const Kernels& avx2_kernels() {
    return kAvx2;
}

} // namespace turboquant::attention
