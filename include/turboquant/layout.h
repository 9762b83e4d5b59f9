// The stored format: where the code of (row, head, channel) lies. One source of truth for the store, the CPU kernels
// and (later) the GPU side. Measured reasons: docs/format.md.
//
// A store holds one layer's keys or values of one stream, for all KV heads, head-major: all rows of head 0, then all of
// head 1. Rows come in tiles of 64. Codes and scales lie in two separate arrays:
//
//   codes : [kv_head][tile][plane][line of 64 bytes]         64-byte aligned, read strictly in order by the kernels
//   scales: [kv_head][tile][rotation block][64 rows]         fp16, one per row and rotation block
//
// Planes. A b-bit code is split into fields that divide a byte: 2 = {2}, 3 = {2,1}, 4 = {4}, 5 = {4,1}, 6 = {4,2},
// 8 = {8}; the first plane holds the low bits. A plane of w bits packs F = 8/w fields a byte, field f in bits
// [f*w, (f+1)*w).
//
// Code values. Bits 2..6: sign-magnitude, code = sign << (b-1) | m, meaning (sign ? -1 : +1) * level[m]; level is the
// integer codebook (codec.h). 8 bits: the two's complement integer itself, -127..127.
//
// Key plane ("a 32-bit lane is a row"; what a 4-byte dot product reduces). Channels are padded to a multiple of 4F:
// Dp. For each half tile u (rows 32u..32u+31), for each channel group g in 0..Dp/(4F)-1: two lines, rows 16 each.
// Byte b of lane l of line (u, g, j), field f  =  row 32u + 16j + l, channel 4F*g + 4f + b.
// No byte is shared by two rows.
//
// Value plane ("a 32-bit lane is a channel"). Channels are padded to a multiple of 16: Dp. For each channel group
// h in 0..Dp/16-1, for each row group g in 0..64/(4F)-1: one line.
// Byte b of lane l of line (h, g), field f  =  channel 16h + l, row 4F*g + 4f + b.
// For w < 8 a byte is shared by F rows (4 apart): writers of rows of one tile and head must not run concurrently.
// Padding channels and rows never written hold code 0 (and scale 0).
#pragma once

#include <cstddef>
#include <cstdint>

namespace turboquant {

inline constexpr int kTileRows = 64;
inline constexpr int kLineBytes = 64;

enum class Side { key, value };

struct Plane {
    int width = 0;     // bits a field
    int shift = 0;     // where the field's bits go in the code
    size_t offset = 0; // bytes from the tile's start
    int padded_channels = 0;
};

// Shape of one tile of one head: everything that indexing needs. Plain data, computed once per store.
struct TileLayout {
    Side side = Side::key;
    int bits = 0;
    int head_size = 0;
    int n_planes = 0;
    Plane planes[2];
    size_t tile_bytes = 0; // codes of 64 rows of one head; a multiple of 64
};

constexpr int round_up(int x, int multiple) {
    return (x + multiple - 1) / multiple * multiple;
}

// bits: 2, 3, 4, 5, 6 or 8; head_size >= 1. The caller has checked them.
constexpr TileLayout make_tile_layout(Side side, int bits, int head_size) {
    TileLayout t;
    t.side = side;
    t.bits = bits;
    t.head_size = head_size;
    const int low = bits == 3 ? 2 : (bits == 5 || bits == 6) ? 4 : bits;
    const int widths[2] = {low, bits - low};
    int shift = 0;
    for (int p = 0; p < 2 && widths[p] > 0; ++p) {
        Plane& plane = t.planes[t.n_planes++];
        plane.width = widths[p];
        plane.shift = shift;
        plane.offset = t.tile_bytes;
        plane.padded_channels = round_up(head_size, side == Side::key ? 4 * (8 / widths[p]) : 16);
        t.tile_bytes += static_cast<size_t>(plane.padded_channels) * kTileRows * static_cast<size_t>(widths[p]) / 8;
        shift += widths[p];
    }
    return t;
}

struct FieldPosition {
    size_t byte = 0; // from the plane's start
    int bit = 0;     // lowest bit of the field in that byte
};

// row in 0..63, channel in 0..padded_channels-1.
constexpr FieldPosition field_position(Side side, const Plane& plane, int row, int channel) {
    const int fields = 8 / plane.width;
    if (side == Side::key) {
        const int groups = plane.padded_channels / (4 * fields);
        const int half = row / 32;
        const int line = row % 32 / 16;
        const int lane = row % 16;
        const int group = channel / (4 * fields);
        const int field = channel % (4 * fields) / 4;
        const int byte = channel % 4;
        return {static_cast<size_t>(((half * groups + group) * 2 + line) * kLineBytes + lane * 4 + byte),
                field * plane.width};
    }
    const int row_groups = kTileRows / (4 * fields);
    const int group = row / (4 * fields);
    const int field = row % (4 * fields) / 4;
    const int byte = row % 4;
    return {static_cast<size_t>((channel / 16 * row_groups + group) * kLineBytes + channel % 16 * 4 + byte),
            field * plane.width};
}

} // namespace turboquant
