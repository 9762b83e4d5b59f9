// The compressed store: one layer's keys or values of one stream (one sequence, or several that share a cache), for all
// KV heads. Rows are addressed by index and may be (over)written in any order at any time.
//
// Every row always has codes. Some rows are kept exact (fp16) besides: up to `window` most recently written ones in a
// ring, and up to `sink_slots` pinned ones. Attention takes the exact row where there is one. When a row leaves the
// ring nothing is written: its codes were there all along.
//
// A row is rounded to fp16 first, and the codes are taken from the rounded row, so an exact fp16 row is all there is
// to know about it: saving and restoring it loses nothing.
//
// Thread-safety: const members may run concurrently with each other; others need the store to themselves.
#pragma once

#include "turboquant/codec.h"
#include "turboquant/conditioning.h"
#include "turboquant/layout.h"
#include "turboquant/parallel.h"
#include "turboquant/status.h"

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

namespace turboquant {

struct StoreShape {
    Side side = Side::key;
    int head_size = 0; // 4..1024, a multiple of 4
    int kv_heads = 0;
    int64_t rows = 0; // capacity
    int row_elements() const { return head_size * kv_heads; }
};

struct StoreOptions {
    int bits = 4;       // 2, 3, 4, 5, 6, 8: codes. 16, 32: pass-through rows in fp16 / fp32, no codec (tests, peers)
    int window = 0;     // rows in the ring of exact rows; ignored (0) for pass-through
    int sink_slots = 0; // rows that may be pinned at once; ignored (0) for pass-through
    // > 0: the conditioning comes later, from the first rows themselves: until condition() is called the ring holds this
    // many rows if that is more than the window. Ignored for pass-through.
    int calibration_rows = 0;
    // For comparisons only: with bits 16, each stored row is what llama.cpp's q4_0 (after a Hadamard rotation, as it does
    // for its own cache) would give back, within our conditioning and with our exact rows. Takes fp16's memory.
    bool emulate_q4_0 = false;
};

struct StoreCounters {
    uint64_t rows_written = 0;
    uint64_t saturated = 0; // (row, head) parts with values above fp16, and rotation blocks with such a scale
    uint64_t nonfinite = 0; // (row, head) parts with NaN or infinity, stored as zeros
};

class Store;

// The exact rows that one batch of writes needs between its write and its attention, so that a query in the middle of
// a prompt sees its own `window` latest rows exact although the ring has moved on. One object can serve all layers in
// turn. It holds the ring as it was before the batch (oldest first, less the rows that the batch overwrites), then the
// batch. Empty when the store keeps no exact rows. Reused without allocating once grown.
struct Staging {
    const Store* owner = nullptr; // the store last written through it
    int64_t batch_begin = 0;      // entries [batch_begin, size) are the batch, in order of writing
    std::vector<int64_t> row;
    std::vector<uint64_t> age;
    std::vector<uint16_t> raw; // [entry][row_elements] fp16
    int64_t size() const { return static_cast<int64_t>(row.size()); }
};

class Store {
public:
    // Bytes that a store of this shape takes: codes, scales, exact slots and their index. From the shape alone. Without
    // the calibration rows, which condition() gives back.
    static Status bytes(const StoreShape& shape, const StoreOptions& options, size_t& bytes);

    // Memory is reserved, not touched: pages that no row was written to cost nothing.
    static Status create(const StoreShape& shape, const StoreOptions& options, const Conditioning& conditioning,
                         std::unique_ptr<Store>& out);
    ~Store();
    Store(const Store&) = delete;
    Store& operator=(const Store&) = delete;

    const StoreShape& shape() const;
    const StoreOptions& options() const;
    const Conditioning& conditioning() const;
    const Rotation& rotation() const;
    const StoreCounters& counters() const;
    size_t bytes() const;

    // Writes n rows; row i is x + i*stride (floats, [kv_head][channel]) and goes to index[i]. staging may be null,
    // and should be for a single row: the ring then says all that its query needs, and filling it copies the ring.
    // An index out of range or a repeated index in one call: invalid_argument and nothing is written.
    // position: of each row in its sequence, which chooses the block mean (conditioning.h); null: the index. It need not
    // be right: a row remembers its block, and only its error depends on how well the mean fits.
    Status write(const float* x, int64_t stride, const int64_t* index, int64_t n, const ParallelFor& parallel,
                 Staging* staging, const int32_t* position = nullptr);

    // Sets or replaces the conditioning and encodes all rows anew: from their fp16 values where they are exact or in
    // `staging` (which may be null), else from what their codes decode to. Ends calibration: the ring shrinks to the
    // window, its memory goes back. Rounds mu and lambda to fp16 (storable()). Pass-through: does nothing.
    Status condition(const Conditioning& conditioning, const Staging* staging, const ParallelFor& parallel);
    // Whether condition() is still awaited.
    bool calibrating() const;
    // Of conditioning(): what native rows carry. 0: none.
    uint32_t conditioning_id() const;

    // Keeps a row exact until it is overwritten (attention sinks). Its fp16 values come from the ring, or from
    // `staging` where the ring has lost them; in neither: invalid_argument. A pinned row stays as it is. With all slots
    // taken the longest pinned row gives way (it falls back to its codes). No slots at all: does nothing.
    Status pin(int64_t row, const Staging* staging);

    // Replaces a row's values without changing what it is: ring place, age and pinning stay (context shift). A row that
    // was never written gets codes and no place in the ring. shift: by how many positions the row has moved.
    Status rewrite(int64_t row, const float* x, int64_t shift = 0);

    // The row as attention sees it (exact where exact), [kv_head][channel] floats, conditioning undone. Zeros for a
    // row never written.
    Status read(int64_t row, float* x) const;
    bool is_written(int64_t row) const; // written and not cleared since
    bool is_exact(int64_t row) const;
    bool is_pinned(int64_t row) const;

    // A row for keeping elsewhere, written to out[0..native_row_bytes()): reading it back with write_native gives
    // the same codes, scales and exactness bit by bit. An exact row is its fp16 values; the lowest mantissa bits of
    // its first 64 elements, which the store keeps at zero, say what it is (age, pinned, block). 2 * row_elements()
    // bytes (fp32 pass-through: 4 *); a codec row of fewer than 64 elements may need more and is never exact. The room
    // behind a row's codes holds a piece of the conditioning, so that some rows together bring all of it.
    // A never written (or cleared) row is all zero bytes; all zero bytes clear a row.
    size_t native_row_bytes() const;
    void read_native(int64_t row, uint8_t* out) const;
    // `in` is what read_native gave, from a store of the same shape, bits and conditioning (window and sinks may
    // differ: an exact row that finds no place, or is older than all of a full ring, is kept as codes). Error (row
    // unchanged) when it says it is a native row but does not fit this store (other bits, other shape, damaged).
    // not_native is set when it is no native row at all: the caller may take it as plain values.
    // age_shift is added to the age of an exact row.
    Status write_native(int64_t row, const uint8_t* in, bool& not_native, int64_t age_shift = 0);

    // What a row of codes says about its conditioning. False: it is not a row of codes of this format.
    struct NativePiece {
        uint32_t conditioning_id = 0;
        int block = 0; // position block of the row
        int index = 0; // which piece, of how many; 0 of 0: the row has none
        int count = 0;
        const uint8_t* data = nullptr; // borrowed from `in`; all pieces in order: write_conditioning(), then zeros
        size_t size = 0;
    };
    bool native_piece(const uint8_t* in, NativePiece& out) const;

    // The age shift that makes the exact rows among these n native rows (`stride` bytes apart) younger than every row of
    // this store, among themselves as old as they were: what a host wants that restores a sequence after it removed
    // rows, which the store is never told. 0 when there are none, or they are that already. Never negative.
    int64_t restored_age_shift(const uint8_t* rows, size_t stride, int64_t n) const;

    // Everything of `source` (same shape, options and conditioning) becomes this store's, except its counters.
    Status copy_from(const Store& source);
    // Back to the state after create(), except the counters. Gives the pages back.
    void clear();

    struct Impl;
    const Impl& impl() const { return *impl_; } // for the kernels (src/cache/store_impl.h)
    Impl& impl() { return *impl_; }

private:
    explicit Store(std::unique_ptr<Impl> impl);
    std::unique_ptr<Impl> impl_;
};

} // namespace turboquant
