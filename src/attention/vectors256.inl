// Vectors of 32 bytes of codes, for AVX2 and AVX-VNNI. See int_kernels.inl.

constexpr int kVectorBytes = 32;
using Bytes = __m256i;

inline Bytes load_bytes(const uint8_t* p) {
    return _mm256_load_si256(reinterpret_cast<const __m256i*>(p));
}
inline Bytes splat_byte(int x) {
    return _mm256_set1_epi8(static_cast<char>(x));
}
inline Bytes load_table16(const int8_t* table) {
    return _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(table)));
}
inline Bytes add_bytes(Bytes a, Bytes b) {
    return _mm256_add_epi8(a, b);
}
inline Bytes subtract_bytes(Bytes a, Bytes b) {
    return _mm256_sub_epi8(a, b);
}
template <int N>
inline Bytes shift_right(Bytes v) {
    return _mm256_srli_epi32(v, N);
}
template <int N>
inline Bytes shift_left(Bytes v) {
    return _mm256_slli_epi32(v, N);
}
inline Bytes choose(Bytes mask, Bytes a, Bytes b) {
    return ((a ^ b) & mask) ^ b;
}
inline Bytes lookup(Bytes table, Bytes index) {
    return _mm256_shuffle_epi8(table, index);
}
template <int BIT>
inline Bytes pick(Bytes bits, Bytes set, Bytes clear) { // blendv looks at each byte's highest bit
    return _mm256_blendv_epi8(clear, set, BIT == 7 ? bits : shift_left<7 - BIT>(bits));
}

inline Vi round_to_ints(Vf x) {
    return reinterpret_cast<Vi>(_mm256_cvtps_epi32(reinterpret_cast<__m256>(x)));
}
inline Vf load_halves(const uint16_t* p) {
    return reinterpret_cast<Vf>(_mm256_cvtph_ps(_mm_load_si128(reinterpret_cast<const __m128i*>(p))));
}

// Integers of 16 bits, in groups of four as they came: the pack works within 128 bits, so the first vector's groups are at
// 0 and 2.
inline __m256i order_groups(__m256i v) {
    return _mm256_permute4x64_epi64(v, _MM_SHUFFLE(3, 1, 2, 0));
}
