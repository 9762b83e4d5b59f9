#include "attention/exact_rows.h"

#include <algorithm>

namespace turboquant::attention {

// A row's age is its place: a query sees exact the `given_window` rows before its range ends.
void ExactRows::take_given(const AttentionCall& call, bool keys) {
    window_ = static_cast<uint64_t>(call.given_window);
    for (int64_t i = 0; i < call.n_given; ++i) {
        const GivenRow& r = call.given[i];
        rows_.push_back({r.row, static_cast<uint64_t>(r.row), r.row < call.given_sinks, keys ? r.key : r.value});
    }
    given_ages_.resize(static_cast<size_t>(call.n_queries));
    for (int64_t i = 0; i < call.n_queries; ++i) { // an empty range wraps to an age that no row is near
        given_ages_[static_cast<size_t>(i)] = static_cast<uint64_t>(call.ranges[i].end) - 1;
    }
    query_ages_ = given_ages_.data();
}

Status ExactRows::collect(const Store& store, const Staging* staging, const AttentionCall& call, Side role) {
    const Store::Impl& s = store.impl();
    rows_.clear();
    query_ages_ = nullptr;
    window_ = static_cast<uint64_t>(s.ring_rows);
    if (call.n_given > 0) {
        take_given(call, role == Side::key);
        return {};
    }
    if (s.n_slots == 0) {
        return {};
    }
    if (staging != nullptr &&
        (staging->owner != &store || staging->batch_begin >= staging->size() || staging->age.back() != s.clock)) {
        staging = nullptr;
    }
    if (staging != nullptr) {
        const int64_t batch = staging->size() - staging->batch_begin;
        if (call.staging_offset < 0 || call.staging_offset > batch - call.n_queries) {
            return invalid("attention: queries " + std::to_string(call.staging_offset) + ".." +
                           std::to_string(call.staging_offset + call.n_queries) + " of a " +
                           (role == Side::key ? "key" : "value") + " batch of " + std::to_string(batch) +
                           " rows; pass the batch that the queries' rows were written in");
        }
        query_ages_ = staging->age.data() + staging->batch_begin + call.staging_offset;
    }
    uint64_t oldest = 0;
    uint64_t newest = 0;
    if (query_ages_ != nullptr && call.n_queries > 0) {
        const auto [low, high] = std::minmax_element(query_ages_, query_ages_ + call.n_queries);
        oldest = *low;
        newest = *high;
    }
    const auto some_query_wants = [&](uint64_t age) {
        return age <= newest && (age >= oldest || oldest - age < window_);
    };

    for (int slot = 0; slot < s.n_slots; ++slot) {
        const int64_t row = s.slot_row[static_cast<size_t>(slot)];
        if (row < 0 || row >= call.n_rows) {
            continue;
        }
        const uint64_t age = s.slot_age[static_cast<size_t>(slot)];
        const bool always = query_ages_ == nullptr || s.slot_pinned[static_cast<size_t>(slot)] != 0;
        rows_.push_back({row, age, always, s.raw(slot)});
    }
    if (staging != nullptr) {
        const size_t width = static_cast<size_t>(s.shape.row_elements());
        for (int64_t e = 0; e < staging->size(); ++e) {
            const int64_t row = staging->row[static_cast<size_t>(e)];
            if (row < 0 || row >= call.n_rows ||
                (s.written_rows[static_cast<size_t>(row / 64)] >> (row % 64) & 1) == 0) {
                continue;
            }
            rows_.push_back({row, staging->age[static_cast<size_t>(e)], false,
                             staging->raw.data() + static_cast<size_t>(e) * width});
        }
    }
    // Of a row's versions only the latest is live; of equal age the slot's, which may have been rewritten since.
    // (A stable sort would allocate.)
    const auto* slots_begin = reinterpret_cast<const uint16_t*>(s.slot_raw.data());
    const auto* slots_end = slots_begin + static_cast<size_t>(s.n_slots) * static_cast<size_t>(s.shape.row_elements());
    const auto in_slot = [&](const ExactRow& r) { return r.raw >= slots_begin && r.raw < slots_end; };
    std::sort(rows_.begin(), rows_.end(), [&](const ExactRow& a, const ExactRow& b) {
        if (a.row != b.row) {
            return a.row < b.row;
        }
        return a.age != b.age ? a.age > b.age : in_slot(a) && !in_slot(b);
    });
    rows_.erase(
        std::unique(rows_.begin(), rows_.end(), [](const ExactRow& a, const ExactRow& b) { return a.row == b.row; }),
        rows_.end());
    if (query_ages_ != nullptr) {
        std::erase_if(rows_, [&](const ExactRow& r) { return !r.always && !some_query_wants(r.age); });
    }
    return {};
}

size_t ExactRows::first_at_or_after(int64_t row) const {
    const auto at = std::lower_bound(rows_.begin(), rows_.end(), row,
                                     [](const ExactRow& r, int64_t wanted) { return r.row < wanted; });
    return static_cast<size_t>(at - rows_.begin());
}

uint64_t ExactRows::bits(size_t begin, size_t end, int64_t first_row, int64_t query) const {
    uint64_t bits = 0;
    for (size_t i = begin; i < end; ++i) {
        if (exact_for(rows_[i], query)) {
            bits |= uint64_t{1} << (rows_[i].row - first_row);
        }
    }
    return bits;
}

} // namespace turboquant::attention
