// One row in and out of a store: what write(), rewrite() and write_native() share. Internal.
#pragma once

#include "cache/store_impl.h"
#include "codec/kernels.h"

#include <cstdint>

namespace turboquant {

// ---- the tag of an exact row -------------------------------------------------------------------------------------
// A saved row's: 64 bits in the lowest mantissa bits of its first 64 fp16 values, element i holding bit i: magic (24 bits),
// pinned (1), age (20, the low bits of the clock), position block (12, the largest for all beyond), checksum of these (7).

inline constexpr int kTagElements = 64;

struct Tag {
    uint64_t age = 0; // read back: kTagAgeBits of it
    bool pinned = false;
    int block = 0;
};
inline constexpr int kTagAgeBits = 20; // many times the largest window
inline constexpr int kTagBlockBits = 12;

uint64_t make_tag(const Tag& tag);
// Reads the tag back; false: no tag. `damaged`: the magic is there and the checksum is not right.
bool read_tag(const uint16_t* row, Tag& tag, bool& damaged);
// Sets the tag bits of elements [first, first + n) of a row, `values` being the first of them.
void put_tag(uint16_t* values, int first, int n, uint64_t tag);

// ---- one head's row ----------------------------------------------------------------------------------------------

struct HeadNotes {
    uint64_t saturated = 0;
    uint64_t nonfinite = 0;
};

// fp16 values of one head's row: rounded, clamped; all zeros when something is not finite. `h` has room for
// kMaxHeadSize + 2 * kVectorPadding.
void round_head(const Store::Impl& impl, const float* x, uint16_t* h, HeadNotes& notes);

// Clears the bits that a tag may take, which codes never depend on.
void clear_tag_bits(const Store::Impl& impl, int kv_head, uint16_t* h);

// Codes and scales of heads' rows from their fp16 values, several at a time, which the kernels like. Rows of one tile and
// head must not be written concurrently. Takes the mean of each row's entry.
class RowEncoder {
public:
    // Both must outlive it.
    RowEncoder(Store::Impl& impl, HeadNotes& notes) : impl_(impl), notes_(notes) {}
    RowEncoder(const RowEncoder&) = delete;
    RowEncoder& operator=(const RowEncoder&) = delete;

    // Where the next row's fp16 values go: finite, tag bits cleared, zeros up to 32 elements behind the head.
    uint16_t* next() { return h_[n_]; }
    // Takes what next() gave; it may be encoded later.
    void add(int64_t row, int kv_head);
    // Encodes what waits. To be called at the end.
    void flush();

private:
    Store::Impl& impl_;
    HeadNotes& notes_;
    int n_ = 0;
    int64_t row_[kEncodeItems];
    int head_[kEncodeItems];
    const float* mu_[kEncodeItems];
    // The mean of one head and entry that the store does not hold.
    int mean_entry_ = -1;
    int mean_head_ = -1;
    alignas(64) float mean_[kMaxHeadSize + kConditionerPadding];
    alignas(64) uint16_t h_[kEncodeItems][kMaxHeadSize + 2 * kVectorPadding];
    alignas(64) uint8_t codes_[kEncodeItems][kMaxHeadSize + 32];
};

// One row, `h` as above.
void encode_head(Store::Impl& impl, int64_t row, int kv_head, const uint16_t* h, HeadNotes& notes);

// Instead of codes: the fp16 row as llama.cpp's q4_0 would give it back (StoreOptions::emulate_q4_0).
void emulate_q4_0(Store::Impl& impl, int64_t row, int kv_head, const uint16_t* h);

// The entry of a position block, new if need be; 0 for values and pass-through.
int find_entry(Store::Impl& impl, int block);
void set_entry(Store::Impl& impl, int64_t row, int entry);

// The stored codes (head_size bytes, layout.h) of one head's row.
void gather_codes(const Store::Impl& impl, int64_t row, int kv_head, uint8_t* codes);
void scatter_codes(Store::Impl& impl, int64_t row, int kv_head, const uint8_t* codes); // padded with zeros to 32

// One head's row as its codes decode, conditioning undone: the store's own, or an earlier one that they were made with.
void decode_head(const Store::Impl& impl, const Conditioner& conditioner, int64_t row, int kv_head, float* x);

// ---- slots -------------------------------------------------------------------------------------------------------

// Frees a slot; the row falls back to its codes.
void release_slot(Store::Impl& impl, int slot);
// A free slot; there is one whenever the ring or the pins have room.
int free_slot(const Store::Impl& impl);
int oldest_ring_slot(const Store::Impl& impl);    // -1: the ring is empty
int longest_pinned_slot(const Store::Impl& impl); // -1: none
// Puts a row into a free slot. Its values (raw) are the caller's to write.
void take_slot(Store::Impl& impl, int slot, int64_t row, uint64_t age, bool pinned);

void set_bit(std::vector<uint64_t>& bits, int64_t row, bool value);

} // namespace turboquant
