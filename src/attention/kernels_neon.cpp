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

constexpr int kVectorBytes = 16;
constexpr int kKeyOffset = 0;
constexpr int kValueOffset = 0;
constexpr float kLargestQuery = 127 * 256 + 127; // both terms at most 127
constexpr float kLargestWeight = 127 * 256 + 127;
constexpr int kMostHeads = 8;
using Bytes = uint8x16_t;

constexpr int vectors_at_once(int heads) {
    return heads <= 2 ? 4 : heads <= 4 ? 2 : 1;
}
constexpr bool kDecodeFirst = false;

inline Bytes load_bytes(const uint8_t* p) {
    return vld1q_u8(p);
}
inline Bytes splat_byte(int x) {
    return vdupq_n_u8(static_cast<uint8_t>(x));
}
inline Bytes load_table16(const int8_t* table) {
    return vreinterpretq_u8_s8(vld1q_s8(table));
}
inline Bytes add_bytes(Bytes a, Bytes b) {
    return vaddq_u8(a, b);
}
inline Bytes subtract_bytes(Bytes a, Bytes b) {
    return vsubq_u8(a, b);
}
template <int N>
inline Bytes shift_right(Bytes v) {
    return vshrq_n_u8(v, N);
}
template <int N>
inline Bytes shift_left(Bytes v) {
    return vshlq_n_u8(v, N);
}
inline Bytes choose(Bytes mask, Bytes a, Bytes b) {
    return vbslq_u8(mask, a, b);
}
inline Bytes lookup(Bytes table, Bytes index) {
    return vqtbl1q_u8(table, index);
}
template <int BIT>
inline Bytes pick(Bytes bits, Bytes set, Bytes clear) {
    return vbslq_u8(vtstq_u8(bits, splat_byte(1 << BIT)), set, clear);
}

inline Vi round_to_ints(Vf x) {
    return reinterpret_cast<Vi>(vcvtnq_s32_f32(reinterpret_cast<float32x4_t>(x)));
}
inline Vf load_halves(const uint16_t* p) {
    return reinterpret_cast<Vf>(vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))));
}

using Codes = int8x16_t;
inline Codes operand(Bytes codes) {
    return vreinterpretq_s8_u8(codes);
}

struct Word {
    int8x16_t high;
    int8x16_t low;
};
inline Word word(const IntWord& w) {
    return {vreinterpretq_s8_s32(vld1q_dup_s32(&w.term[0])), vreinterpretq_s8_s32(vld1q_dup_s32(&w.term[1]))};
}

struct Sum {
    int32x4_t high;
    int32x4_t low;
};
inline void dot_key(Sum& sum, Codes codes, const Word& word) {
    sum.high = vdotq_s32(sum.high, codes, word.high);
    sum.low = vdotq_s32(sum.low, codes, word.low);
}
inline void dot_value(Sum& sum, Codes codes, const Word& word) {
    dot_key(sum, codes, word);
}
inline Vi total(const Sum& sum) {
    return reinterpret_cast<Vi>(vaddq_s32(vshlq_n_s32(sum.high, 8), sum.low));
}

// 8 integers as two signed byte terms -> 2 words
inline void store_query_words(const Vi (&v)[2], IntWord* words) {
    const int16x8_t x =
        vcombine_s16(vmovn_s32(reinterpret_cast<int32x4_t>(v[0])), vmovn_s32(reinterpret_cast<int32x4_t>(v[1])));
    const int32x2_t low = vreinterpret_s32_s8(vmovn_s16(x));
    const int32x2_t high = vreinterpret_s32_s8(vshrn_n_s16(vaddq_s16(x, vdupq_n_s16(128)), 8));
    const int32x2x2_t terms = {{high, low}};
    vst2_s32(&words[0].term[0], terms);
}
inline void store_weight_words(const Vi (&v)[2], IntWord* words) {
    store_query_words(v, words);
}

#include "attention/int_decoders.inl"

#include "attention/int_kernels.inl"

constexpr Kernels kNeon = all_kernels();
} // namespace

const Kernels& neon_kernels() {
    return kNeon;
}

} // namespace turboquant::attention
