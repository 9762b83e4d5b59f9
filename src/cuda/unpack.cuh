// Codes to int8, in registers: no table in memory, no shuffles. Internal.
//
// prmt picks four bytes of a table of eight by the low three bits of four nibbles, so
// - 2 and 3 bits: a table of all signed levels, one prmt for four codes;
// - 4 bits: a table of the eight magnitudes; the sign bits become byte masks through prmt's sign mode, and XOR makes m
//   or -m-1 of them. With odd levels L = 2m + 1 that is (+-L - 1) / 2: twice the dot product plus one sum of the other
//   operand gives back what L would have given, exactly. So kStep = 2 and kOffset = 1 there.
// - 8 bits: nothing to do.
#pragma once

#include "cuda/device.cuh"
#include "cuda/gpu_layout.h"

namespace turboquant::cuda {

TQ_HD constexpr uint32_t bytes_of(int a, int b, int c, int d) {
    return static_cast<uint32_t>(a & 255) | static_cast<uint32_t>(b & 255) << 8 | static_cast<uint32_t>(c & 255) << 16 |
           static_cast<uint32_t>(d & 255) << 24;
}

template <int BITS>
struct Unpack;

// words: a lane's words of the plane(s) that hold groups 0, 1, ... ; pair p are groups 2p and 2p + 1.
template <>
struct Unpack<4> {
    static constexpr float kStep = 2;
    static constexpr float kOffset = 1;
    __device__ __forceinline__ static void pair(const uint32_t* low, const uint32_t*, int p, uint32_t& a, uint32_t& b) {
        constexpr uint32_t kSmall = bytes_of(2, 7, 12, 18);   // levels 5 15 25 37
        constexpr uint32_t kLarge = bytes_of(24, 31, 40, 53); // 49 63 81 107
        const uint32_t w = low[p];
        const uint32_t magnitude = w & 0x77777777U;
        const uint32_t shifted = w << 4;
        a = prmt(kSmall, kLarge, magnitude) ^ prmt(shifted, w, 0xd9c8U);
        b = prmt(kSmall, kLarge, magnitude >> 16) ^ prmt(shifted, w, 0xfbeaU);
    }
};

template <>
struct Unpack<3> {
    static constexpr float kStep = 1;
    static constexpr float kOffset = 0;
    __device__ __forceinline__ static void pair(const uint32_t* low, const uint32_t* sign, int p, uint32_t& a,
                                                uint32_t& b) {
        constexpr uint32_t kPlus = bytes_of(13, 41, 73, 117);
        constexpr uint32_t kMinus = bytes_of(-13, -41, -73, -117);
        const uint32_t w = (p & 1) != 0 ? low[p / 2] >> 2 : low[p / 2];
        const uint32_t s = sign[p / 4];
        const uint32_t at2 = (p & 3) == 0 ? s << 2 : (p & 3) == 1 ? s << 1 : (p & 3) == 2 ? s : s >> 1;
        const uint32_t index = (w & 0x33333333U) | (at2 & 0x44444444U);
        a = prmt(kPlus, kMinus, index);
        b = prmt(kPlus, kMinus, index >> 16);
    }
};

template <>
struct Unpack<2> {
    static constexpr float kStep = 1;
    static constexpr float kOffset = 0;
    __device__ __forceinline__ static void pair(const uint32_t* low, const uint32_t*, int p, uint32_t& a, uint32_t& b) {
        constexpr uint32_t kLevels = bytes_of(35, 117, -35, -117);
        const uint32_t w = (p & 1) != 0 ? low[p / 2] >> 2 : low[p / 2];
        const uint32_t index = w & 0x33333333U;
        a = prmt(kLevels, kLevels, index);
        b = prmt(kLevels, kLevels, index >> 16);
    }
};

template <>
struct Unpack<8> {
    static constexpr float kStep = 1;
    static constexpr float kOffset = 0;
    __device__ __forceinline__ static void pair(const uint32_t* low, const uint32_t*, int p, uint32_t& a, uint32_t& b) {
        a = low[2 * p];
        b = low[2 * p + 1];
    }
};

// How a lane's words are loaded: as many m16 (or k32) steps at a time as fill whole chunks of every plane.
template <int D, int BITS>
struct LaneWords {
    static constexpr int kLow = low_width(BITS);
    static constexpr int kWords = words_per_lane(D, kLow);
    static constexpr int kChunk = chunk_words(D, kLow);
    static constexpr int kSignWords = BITS == 3 ? words_per_lane(D, 1) : 0;
    static constexpr int kPairs = D / 16; // of groups
    // Pairs in a part: 4 words of 4 bits hold 4 pairs, of 8 bits 2 pairs, of 2 bits 8 pairs.
    static constexpr int kPartPairs = kChunk * 32 / kLow / 8;
    static constexpr int kParts = kPairs / kPartPairs;
    static constexpr int kPartWords = kChunk;
    static constexpr int kPartSigns = BITS == 3 ? (kPartPairs + 3) / 4 : 0; // 1 or 2

    // Part `part` of a side that starts at `side` in shared memory.
    __device__ __forceinline__ static void load(const uint8_t* side, int lane, int part, uint32_t (&low)[kPartWords],
                                                uint32_t (&sign)[kPartSigns > 0 ? kPartSigns : 1]) {
        const uint8_t* const from = side + word_offset(D, kLow, lane, part * kPartWords);
        if constexpr (kChunk == 4) {
            const uint4 v = *reinterpret_cast<const uint4*>(from);
            low[0] = v.x;
            low[1] = v.y;
            low[2] = v.z;
            low[3] = v.w;
        } else if constexpr (kChunk == 2) {
            const uint2 v = *reinterpret_cast<const uint2*>(from);
            low[0] = v.x;
            low[1] = v.y;
        } else {
            low[0] = *reinterpret_cast<const uint32_t*>(from);
        }
        if constexpr (BITS == 3) {
            const uint8_t* const signs =
                side + plane_bytes(D, kLow) + word_offset(D, 1, lane, part * kPartSigns);
            if constexpr (kPartSigns == 2) {
                const uint2 v = *reinterpret_cast<const uint2*>(signs);
                sign[0] = v.x;
                sign[1] = v.y;
            } else {
                sign[0] = *reinterpret_cast<const uint32_t*>(signs);
            }
        }
    }
};

} // namespace turboquant::cuda
