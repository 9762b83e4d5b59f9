// What a store is made of, for the kernels. Internal: not installed.
#pragma once

#include "cache/conditioner.h"
#include "codec/kernels.h"
#include "turboquant/store.h"

#include <cstdint>
#include <unordered_map>
#include <vector>

namespace turboquant {

// Anonymous zero pages, 64-byte aligned at least; reserved, not touched.
class PageMemory {
public:
    PageMemory() = default;
    ~PageMemory();
    PageMemory(const PageMemory&) = delete;
    PageMemory& operator=(const PageMemory&) = delete;
    bool allocate(size_t bytes); // false: out of memory. Contents are zero.
    void zero();                 // gives the pages back; contents are zero again
    void swap(PageMemory& other);
    uint8_t* data() const { return data_; }
    size_t size() const { return size_; }

private:
    uint8_t* data_ = nullptr;
    size_t size_ = 0;
};

inline constexpr size_t kNarrowEntries = 256; // position blocks that a byte tells apart: 65,536 positions

struct Store::Impl {
    StoreShape shape;
    StoreOptions options;
    StoreCounters counters;

    // Codes (options.bits 2..8). Layout: turboquant/layout.h.
    Rotation rotation;
    const Codebook* book = nullptr; // null for pass-through
    TileLayout tile;
    PlaneShape plane_shapes[2]; // of the tile's planes
    const EncodeTable* encode_table = nullptr;
    int64_t n_tiles = 0; // ceil(rows / 64)
    int n_blocks = 0;    // rotation blocks = scales a row and head
    PageMemory codes;    // [kv_head][n_tiles][tile.tile_bytes]
    PageMemory scales;   // fp16 [kv_head][n_tiles][n_blocks][64]

    Conditioner conditioner;
    bool calibrating = false; // condition() is awaited
    // Position blocks met so far, and for each row (keys with codes only) which of them it is in: its mean's.
    std::vector<int> blocks; // [entry]; the first is block 0
    std::unordered_map<int, uint16_t> block_entries;
    PageMemory row_entries;     // entry_size bytes each, [n_tiles * 64]; empty for values and pass-through
    int entry_size = 1;         // 2 once there are more than kNarrowEntries
    Rotation emulated_rotation; // of the rows, head by head (emulate_q4_0)
    // The mean of one entry, [kv_head][channel] and padding: that of the rows written last.
    int mean_entry = -1;
    std::vector<float> mean;
    const CodecKernels* kernels = nullptr;

    // Pass-through rows (options.bits 16 or 32): [kv_head][n_tiles * 64][head_size] fp16 or fp32.
    PageMemory plain;

    // Exact rows. Slot s holds row slot_row[s] (-1: free) as fp16 slot_raw[s][row_elements].
    int ring_rows = 0; // the ring's size: the window, or more while calibrating
    int n_slots = 0;   // ring_rows + sink_slots
    std::vector<int64_t> slot_row;
    std::vector<uint64_t> slot_age; // the clock when the row was written; later is larger
    std::vector<uint8_t> slot_pinned;
    std::vector<uint64_t> slot_pin_order; // pin_clock when it was pinned; the smallest gives way first
    PageMemory slot_raw;
    int n_ring = 0;   // slots in use and not pinned: at most ring_rows
    int n_pinned = 0; // at most sink_slots
    uint64_t pin_clock = 0;
    uint64_t clock = 0; // age of the latest row written; the first row gets 1

    // Bit r of entry t is row 64 t + r.
    std::vector<uint64_t> exact_rows;   // has a slot
    std::vector<uint64_t> written_rows; // was written and not cleared

    // Scratch of write(): bits of the rows of the batch; ring slots by age; the slot of each of the last ring_rows rows.
    std::vector<uint64_t> batch_rows;
    std::vector<int32_t> ring_order;
    std::vector<int32_t> batch_slots;

    const uint8_t* tile_codes(int kv_head, int64_t t) const {
        return codes.data() +
               (static_cast<size_t>(kv_head) * static_cast<size_t>(n_tiles) + static_cast<size_t>(t)) * tile.tile_bytes;
    }
    const uint16_t* tile_scales(int kv_head, int64_t t) const {
        return reinterpret_cast<const uint16_t*>(scales.data()) +
               (static_cast<size_t>(kv_head) * static_cast<size_t>(n_tiles) + static_cast<size_t>(t)) *
                   static_cast<size_t>(n_blocks) * kTileRows;
    }
    const uint16_t* raw(int slot) const {
        return reinterpret_cast<const uint16_t*>(slot_raw.data()) +
               static_cast<size_t>(slot) * static_cast<size_t>(shape.row_elements());
    }

    uint8_t* tile_codes(int kv_head, int64_t t) {
        return const_cast<uint8_t*>(static_cast<const Impl*>(this)->tile_codes(kv_head, t));
    }
    uint16_t* tile_scales(int kv_head, int64_t t) {
        return const_cast<uint16_t*>(static_cast<const Impl*>(this)->tile_scales(kv_head, t));
    }
    uint16_t* raw(int slot) { return const_cast<uint16_t*>(static_cast<const Impl*>(this)->raw(slot)); }
    // One head's row of `plain`.
    uint8_t* plain_row(int kv_head, int64_t row) const {
        const size_t index =
            static_cast<size_t>(kv_head) * static_cast<size_t>(n_tiles) * kTileRows + static_cast<size_t>(row);
        return plain.data() + index * static_cast<size_t>(shape.head_size) * static_cast<size_t>(options.bits / 8);
    }

    bool coded() const { return book != nullptr; }
    // Rows lose something: they have conditioning and exact rows. Otherwise they pass through.
    bool quantised() const { return coded() || options.emulate_q4_0; }
    bool in_range(int64_t row) const { return row >= 0 && row < shape.rows; }
    bool is_written(int64_t row) const { return (written_rows[static_cast<size_t>(row / 64)] >> (row % 64) & 1U) != 0; }
    bool is_exact(int64_t row) const { return (exact_rows[static_cast<size_t>(row / 64)] >> (row % 64) & 1U) != 0; }
    int find_slot(int64_t row) const; // -1: the row is not exact
    // Entries of the 64 rows of tile t, Entry being uint8_t or uint16_t as entry_size says. Only where there are row_entries.
    template <class Entry>
    const Entry* tile_entries(int64_t t) const {
        return reinterpret_cast<const Entry*>(row_entries.data()) + t * kTileRows;
    }
    int row_entry(int64_t row) const {
        if (row_entries.size() == 0) {
            return 0;
        }
        return entry_size == 1 ? row_entries.data()[row] : reinterpret_cast<const uint16_t*>(row_entries.data())[row];
    }
    int row_block(int64_t row) const { return blocks[static_cast<size_t>(row_entry(row))]; }
};

} // namespace turboquant
