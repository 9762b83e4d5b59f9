// Vectors of 64 bytes of codes and dot products of bytes, for AVX-512 with VNNI, with and without VBMI. See
// int_kernels.inl.
//
// One dot-product instruction takes four bytes of codes a lane. The other factor has two byte terms, so that nothing is
// lost that matters (16 bits of the query, 16 of the weights):
//   keys    lane = row,     codes + 128 as u8, query = 256 hi + lo in s8; the 128 is repaid by the query's sum
//   values  lane = channel, codes as s8, weights = 256 hi + lo in u8

constexpr int kVectorBytes = 64;
constexpr int kKeyOffset = 128;
constexpr int kValueOffset = 0;
constexpr float kLargestQuery = 127 * 256 + 127; // both terms at most 127
constexpr float kLargestWeight = 65535;
constexpr int kMostHeads = 6; // of 8, each word would be loaded for a single vector: bound by loads
using Bytes = __m512i;

// Up to 12 heads' sums of two terms, and at least 8 chains of dot products.
constexpr int vectors_at_once(int heads) {
    return heads <= 2 ? 4 : heads <= 6 ? 2 : 1;
}
constexpr bool kDecodeFirst = false;

inline Bytes load_bytes(const uint8_t* p) {
    return _mm512_load_si512(p);
}
inline Bytes splat_byte(int x) {
    return _mm512_set1_epi8(static_cast<char>(x));
}
inline Bytes load_table16(const int8_t* table) {
    return _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(table)));
}
inline Bytes add_bytes(Bytes a, Bytes b) {
    return _mm512_add_epi8(a, b);
}
inline Bytes subtract_bytes(Bytes a, Bytes b) {
    return _mm512_sub_epi8(a, b);
}
template <int N>
inline Bytes shift_right(Bytes v) {
    return _mm512_srli_epi32(v, N);
}
template <int N>
inline Bytes shift_left(Bytes v) {
    return _mm512_slli_epi32(v, N);
}
inline Bytes choose(Bytes mask, Bytes a, Bytes b) {
    return _mm512_ternarylogic_epi32(mask, a, b, 0xca);
}
template <int BIT>
inline Bytes pick(Bytes bits, Bytes set, Bytes clear) {
    return _mm512_mask_blend_epi8(_mm512_test_epi8_mask(bits, splat_byte(1 << BIT)), clear, set);
}

inline Vi round_to_ints(Vf x) {
    return reinterpret_cast<Vi>(_mm512_cvtps_epi32(reinterpret_cast<__m512>(x)));
}
inline Vf load_halves(const uint16_t* p) {
    return reinterpret_cast<Vf>(_mm512_cvtph_ps(_mm256_load_si256(reinterpret_cast<const __m256i*>(p))));
}

using Codes = Bytes;
inline Codes operand(Bytes codes) {
    return codes;
}

struct Word {
    __m512i high;
    __m512i low;
};
inline Word word(const IntWord& w) {
    return {_mm512_set1_epi32(w.term[0]), _mm512_set1_epi32(w.term[1])};
}

// sum += four products of unsigned and signed bytes a lane. Written out for GCC, which otherwise copies every sum to
// another register and back.
inline void dot_bytes(__m512i& sum, __m512i unsigned_bytes, __m512i signed_bytes) {
#if defined(__GNUC__) && !defined(__clang__)
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(unsigned_bytes), "v"(signed_bytes));
#else
    sum = _mm512_dpbusd_epi32(sum, unsigned_bytes, signed_bytes);
#endif
}

struct Sum {
    __m512i high;
    __m512i low;
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
    return reinterpret_cast<Vi>(_mm512_add_epi32(_mm512_slli_epi32(sum.high, 8), sum.low));
}

// Of each four integers of 16 bits: the high bytes, then the low ones. The pack before worked within 128 bits: the first
// vector's groups of four are at 0, 2, 4, 6.
inline void store_terms(__m512i integers, IntWord* words) {
    const __m512i order = _mm512_broadcast_i32x4(_mm_setr_epi8(1, 3, 5, 7, 0, 2, 4, 6, 9, 11, 13, 15, 8, 10, 12, 14));
    const __m512i groups = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
    _mm512_storeu_si512(words, _mm512_permutexvar_epi64(groups, _mm512_shuffle_epi8(integers, order)));
}
inline void store_query_words(const Vi (&v)[2], IntWord* words) {
    const __m512i x =
        _mm512_packs_epi32(reinterpret_cast<const __m512i&>(v[0]), reinterpret_cast<const __m512i&>(v[1]));
    const __m512i high = _mm512_add_epi16(x, _mm512_set1_epi16(128)); // so that the low byte is v - 256 high
    store_terms(choose(_mm512_set1_epi16(255), x, high), words);
}
inline void store_weight_words(const Vi (&v)[2], IntWord* words) {
    store_terms(_mm512_packus_epi32(reinterpret_cast<const __m512i&>(v[0]), reinterpret_cast<const __m512i&>(v[1])),
                words);
}
