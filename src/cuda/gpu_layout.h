// Where the code of (token, channel) lies in a page: chosen so that what a lane of a warp loads is, after unpacking,
// the fragment that it owes the tensor core. docs/cuda.md draws it. Plain C++, host and device.
//
//   page : [kv_head][page_size / 16 tiles]
//   tile : 16 tokens of one head: keys, values, scales
//
// Keys and values of a tile: 32 lanes of d/8 groups of 4 codes. A group is one 32-bit register of the A operand of
// mma.m16n8k32: for keys rows are tokens and columns are channels, for values rows are channels and columns are tokens.
//   key   (token n, channel c), r = c % (d/4):
//         lane 4 (n % 8) + c / (d/4), group r/8 * 4 + n/8 * 2 + r/4 % 2, element c % 4
//   value (token n, channel c):
//         lane 4 (c % 8) + n % 8 / 2, group c/16 * 2 + c % 16 / 8,       element n % 2 * 2 + n / 8
//
// Groups are packed into words, a word 4, 8, 16 or 32 codes: 8 and 4 bits as they are, 2 bits likewise, 3 bits as a
// plane of the low 2 bits and a plane of signs. Elements of a group lie a nibble apart, as prmt's selector wants them.
// A lane's words of a plane come in chunks of at most 4 (16 bytes), chunk-major: [chunk][lane][word].
//
// Scales: for g in 0..7: fp16 of (key g, key g + 8, value g, value g + 8).
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define TQ_HD __host__ __device__
#else
#define TQ_HD
#endif

namespace turboquant::cuda {

inline constexpr int kTileTokens = 16;
inline constexpr int kLanes = 32;
inline constexpr int kScaleBytes = kTileTokens * 4;

// A plane of `width` bits: 1, 2, 4 or 8.
struct WordPlace {
    int word; // of the lane's words of this plane
    int bit;  // lowest bit of the field
};
TQ_HD constexpr WordPlace word_place(int width, int group, int element) {
    switch (width) {
    case 8: return {group, element * 8};
    case 4: return {group / 2, group % 2 * 16 + element * 4};
    case 2: return {group / 4, group % 2 * 16 + element * 4 + group % 4 / 2 * 2};
    default: return {group / 8, group % 2 * 16 + element * 4 + group % 8 / 2};
    }
}
TQ_HD constexpr int words_per_lane(int head_size, int width) {
    return head_size / 8 * width / 8;
}
TQ_HD constexpr int chunk_words(int head_size, int width) {
    return words_per_lane(head_size, width) < 4 ? words_per_lane(head_size, width) : 4;
}
// Byte of a lane's word from the plane's start.
TQ_HD constexpr int word_offset(int head_size, int width, int lane, int word) {
    const int chunk = chunk_words(head_size, width);
    return ((word / chunk * kLanes + lane) * chunk + word % chunk) * 4;
}
TQ_HD constexpr int plane_bytes(int head_size, int width) {
    return words_per_lane(head_size, width) * kLanes * 4;
}

TQ_HD constexpr int low_width(int bits) { // of the first plane
    return bits == 3 ? 2 : bits;
}
TQ_HD constexpr int side_bytes(int head_size, int bits) {
    return head_size * kTileTokens * bits / 8;
}
TQ_HD constexpr int tile_bytes(int head_size, int key_bits, int value_bits) {
    return side_bytes(head_size, key_bits) + side_bytes(head_size, value_bits) + kScaleBytes;
}

struct CodePlace {
    int lane;
    int group;
    int element;
};
TQ_HD constexpr CodePlace key_place(int head_size, int token, int channel) {
    const int quarter = head_size / 4;
    const int rest = channel % quarter;
    return {token % 8 * 4 + channel / quarter, rest / 8 * 4 + token / 8 * 2 + rest / 4 % 2, channel % 4};
}
TQ_HD constexpr CodePlace value_place(int token, int channel) {
    return {channel % 8 * 4 + token % 8 / 2, channel / 16 * 2 + channel % 16 / 8, token % 2 * 2 + token / 8};
}
// Fp16 index of a token's key scale in the tile's scales; the value scale is 2 further.
TQ_HD constexpr int scale_index(int token) {
    return token % 8 * 4 + token / 8;
}

} // namespace turboquant::cuda
