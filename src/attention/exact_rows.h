// Which rows of a store are exact for which query of a call. Internal: not installed.
#pragma once

#include "cache/store_impl.h"
#include "turboquant/attention.h"

#include <cstdint>
#include <vector>

namespace turboquant::attention {

struct ExactRow {
    int64_t row = 0;
    uint64_t age = 0;
    bool always = false;           // exact for every query
    const uint16_t* raw = nullptr; // fp16 [kv_head][channel]
};

// The rows that are exact for at least one query of a call, in order of their index. Reused between calls.
class ExactRows {
public:
    // role: whether these are the call's keys or its values. Errors: a staging offset outside the batch. A staging that is
    // not the store's, or older than its last write, counts as none. May throw bad_alloc.
    Status collect(const Store& store, const Staging* staging, const AttentionCall& call, Side role);

    bool empty() const { return rows_.empty(); }
    size_t size() const { return rows_.size(); }
    const ExactRow& operator[](size_t i) const { return rows_[i]; }
    size_t first_at_or_after(int64_t row) const; // index of an entry, size() if there is none

    bool exact_for(const ExactRow& r, int64_t query) const { return r.always || in_window(r.age, query_ages_[query]); }
    // Bit r: row first_row + r is exact for the query. Entries [begin, end) lie in that tile.
    uint64_t bits(size_t begin, size_t end, int64_t first_row, int64_t query) const;

private:
    // Among the window_ latest rows written up to the query's own. Later rows wrap to huge differences.
    bool in_window(uint64_t age, uint64_t query_age) const { return query_age - age < window_; }

    std::vector<ExactRow> rows_;
    void take_given(const AttentionCall& call, bool keys);

    const uint64_t* query_ages_ = nullptr; // of each query's own row; null without staging
    std::vector<uint64_t> given_ages_;     // these, for the rows that a call gives
    uint64_t window_ = 0;
};

} // namespace turboquant::attention
