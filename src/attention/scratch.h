// Memory that attend() works in: grows, never shrinks, is carved up anew for each call. Internal: not installed.
#pragma once

#include "attention/plan.h"
#include "attention/visibility.h"

#include <cstddef>
#include <cstdint>
#include <deque>
#include <new>
#include <vector>

namespace turboquant::attention {

// 64-byte aligned memory that only grows. Contents are lost when it does.
class Arena {
public:
    Arena() = default;
    Arena(Arena&& other) noexcept : data_(other.data_), size_(other.size_) {
        other.data_ = nullptr;
        other.size_ = 0;
    }
    Arena(const Arena&) = delete;
    Arena& operator=(const Arena&) = delete;
    ~Arena() { release(); }

    void reserve(size_t bytes) {
        if (bytes > size_) {
            release();
            data_ = static_cast<std::byte*>(::operator new (bytes, std::align_val_t{64}));
            size_ = bytes;
        }
    }
    std::byte* data() { return data_; }

private:
    void release() {
        if (data_ != nullptr) {
            ::operator delete (data_, std::align_val_t{64});
        }
        data_ = nullptr;
        size_ = 0;
    }
    std::byte* data_ = nullptr;
    size_t size_ = 0;
};

// Hands out consecutive aligned arrays of an arena. With base null it only counts.
class Carver {
public:
    explicit Carver(std::byte* base) : base_(base) {}
    template <class T>
    void take(T*& p, int64_t n) {
        p = base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + used_);
        used_ += (static_cast<size_t>(n) * sizeof(T) + 63) / 64 * 64;
    }
    size_t used() const { return used_; }

private:
    std::byte* base_ = nullptr;
    size_t used_ = 0;
};

// What the entries of a task have found so far. Strides between entries: plan.value_ld.
struct Sums {
    RowState* row = nullptr;
    float* coded = nullptr; // sum of p * value in the codes' rotated basis
    float* exact = nullptr; // sum of p * value of exact rows, plain basis
    void carve(Carver& c, const Plan& plan, int64_t entries, bool has_exact) {
        c.take(row, entries);
        c.take(coded, entries * plan.value_ld);
        c.take(exact, has_exact ? entries * plan.value_ld : 0);
    }
};

// One worker's arrays. m counts a task's entries.
struct Scratch {
    float* query = nullptr;                // [m][key_size] rotated, query_factor folded in
    float* plain_query = nullptr;          // [m][key_size] the same not rotated, for exact rows
    float* query_mean = nullptr;           // [m] <q, mean> of the tile's rows; 0 where they differ in it
    float* constant_mean = nullptr;        // [m] the part of it that channels which do not turn make
    float* turning_query = nullptr;        // [m][2 * pairs] the rest: the dot product of this with a block's phases
    int mean_entry = -1;                   // block entry that query_mean is of; -1: none
    IntWord* query_words = nullptr;        // [m][query_words_ld]
    float* query_mul = nullptr;            // [m]
    int32_t* query_sum = nullptr;          // [m]
    float* scores = nullptr;               // [m][64] scores, then probabilities
    uint8_t* live = nullptr;               // [m] has probabilities in this tile
    IntWord* weight_words = nullptr;       // [m][16]
    float* weight_mul = nullptr;           // [m]
    int32_t* weight_sum = nullptr;         // [m]
    float* rescale = nullptr;              // [m]
    float* bias = nullptr;                 // [query][64] the mask
    Sight* sight = nullptr;                // [query]
    uint64_t* seen = nullptr;              // [query] rows of the tile that it sees; kept where the tile has exact rows
    uint64_t* exact_bits = nullptr;        // [query] those of them that are exact for it
    const uint16_t** exact_rows = nullptr; // [64] rows of the tile that are exact for some query
    uint8_t* exact_at = nullptr;           // [64] which rows of the tile they are
    float* exact_scores = nullptr;         // [m][64] their scores, then their probabilities
    uint8_t* bytes = nullptr;              // a tile's codes
    float* scale = nullptr;                // [64]
    float* key_tile = nullptr;             // [key_size][64]
    float* keyed_value_tile = nullptr;     // [v head size][64] of a key store that serves as values
    float* value_tile = nullptr;           // [64][value_ld]
    float* vector = nullptr;               // 2 * max(key_size, v head size): one vector on its way through a rotation
    Sums sums;                             // used where a task covers all tiles

    int query_words_ld = 0;

    void carve(Carver& c, const Plan& plan, bool exact_keys, bool exact_values) {
        const int64_t m = plan.chunk;
        const int64_t queries = m / plan.group + 2; // a chunk may begin and end within a query's heads
        const int64_t dk = plan.key_size;
        const int64_t dv = plan.v->shape.head_size;
        const int64_t widest = round_up(static_cast<int>(dk > dv ? dk : dv), 16);
        query_words_ld = round_up(plan.key_size, 32) / 4;
        c.take(query, m * dk);
        c.take(plain_query, exact_keys ? m * dk : 0);
        mean_entry = -1;
        const int64_t phases = 2 * (plan.turning_mean ? plan.k->conditioner.n_pairs() : 0);
        c.take(query_mean, m);
        c.take(constant_mean, m);
        c.take(turning_query, m * phases);
        c.take(query_words, plan.int_keys ? m * query_words_ld : 0);
        c.take(query_mul, m);
        c.take(query_sum, m);
        c.take(scores, m * kTileRows);
        c.take(live, m);
        c.take(weight_words, m * (kTileRows / 4));
        c.take(weight_mul, m);
        c.take(weight_sum, m);
        c.take(rescale, m);
        c.take(bias, queries * kTileRows);
        c.take(sight, queries);
        const bool exact = exact_keys || exact_values;
        c.take(seen, queries);
        c.take(exact_bits, queries);
        c.take(exact_rows, exact ? kTileRows : 0);
        c.take(exact_at, exact ? kTileRows : 0);
        c.take(exact_scores, exact ? m * kTileRows : 0);
        c.take(bytes, widest * kTileRows);
        c.take(scale, kTileRows);
        c.take(key_tile, plan.int_keys ? 0 : dk * kTileRows);
        c.take(keyed_value_tile, plan.keyed_values ? dv * kTileRows : 0);
        c.take(value_tile, plan.int_values ? 0 : static_cast<int64_t>(plan.value_ld) * kTileRows);
        c.take(vector, 2 * widest);
        sums.carve(c, plan, m, exact_values);
    }
};

} // namespace turboquant::attention

namespace turboquant {

namespace attention {

// One of the calls that are worked on together.
struct Job {
    const Store* keys = nullptr;
    const Store* values = nullptr;
    Plan plan;
    ExactRows exact_keys;
    ExactRows exact_values;
    Visibility visibility;
    const LevelTables* key_tables = nullptr; // of the workspace
    const LevelTables* value_tables = nullptr;
    size_t scratch_bytes = 0; // of a worker
    Arena partial_arena;
    std::vector<Sums> partials; // [kv_head][split], each of all entries
    int64_t first_task = 0;     // among the tasks of all jobs
    int64_t first_merge = 0;
    Status status;
};

// Made when they are first asked for.
struct SideTables {
    static constexpr int kWidths = 9;
    LevelTables at[kWidths]; // [bits]
    bool made[kWidths] = {};
};

struct Worker {
    Arena arena;
    Scratch scratch;
    const Job* job = nullptr; // that scratch is carved for

    Scratch& scratch_for(const Job& wanted) {
        if (job != &wanted) {
            job = &wanted;
            Carver carver(arena.data());
            scratch.carve(carver, wanted.plan, !wanted.exact_keys.empty(), !wanted.exact_values.empty());
        }
        return scratch;
    }
};

} // namespace attention

struct AttentionWorkspace::Impl {
    attention::SideTables key_tables;
    attention::SideTables value_tables;
    const attention::Kernels* kernels = nullptr; // that the tables are for
    std::vector<attention::Worker> workers;
    std::deque<attention::Job> jobs; // some more than the call has, perhaps
    std::vector<attention::Job*> order;
};

} // namespace turboquant
