// Store::condition(): the rows of a store encoded anew with other means and factors.
#include "cache/condition.h"

#include "cache/rows.h"

#include <algorithm>
#include <cstring>
#include <new>

namespace turboquant {

Status check_store_conditioning(const Conditioning& conditioning, const StoreShape& shape) {
    if (shape.side == Side::value && !conditioning.rope.empty()) {
        return invalid("values do not turn with their position; condition them without RoPE pairs");
    }
    return check_conditioning(conditioning, shape.head_size, shape.kv_heads);
}

namespace {

// The fp16 values of rows whose latest version the staging holds; null for others.
class StagedRows {
public:
    StagedRows(const Store& store, const Staging* staging) : width_(store.shape().row_elements()) {
        if (staging == nullptr || staging->owner != &store ||
            staging->raw.size() != staging->row.size() * static_cast<size_t>(width_)) {
            return;
        }
        for (int64_t e = 0; e < staging->size(); ++e) { // later entries are later versions
            entries_[staging->row[static_cast<size_t>(e)]] = staging->raw.data() + e * width_;
        }
    }
    const uint16_t* find(int64_t row) const {
        const auto found = entries_.find(row);
        return found == entries_.end() ? nullptr : found->second;
    }

private:
    int width_;
    std::unordered_map<int64_t, const uint16_t*> entries_;
};

// The ring is cut down to the window (the oldest rows leave) and its slots moved to memory of that size.
Status shrink_ring(Store::Impl& m) {
    while (m.n_ring > m.options.window) {
        release_slot(m, oldest_ring_slot(m));
    }
    const int n_slots = m.options.window + m.options.sink_slots;
    const size_t row_bytes = static_cast<size_t>(m.shape.row_elements()) * sizeof(uint16_t);
    PageMemory raw;
    if (!raw.allocate(static_cast<size_t>(n_slots) * row_bytes)) {
        return {StatusCode::out_of_memory, "condition: no memory for " + std::to_string(n_slots) + " exact rows"};
    }
    int to = 0;
    for (int from = 0; from < m.n_slots; ++from) {
        const auto f = static_cast<size_t>(from);
        if (m.slot_row[f] < 0) {
            continue;
        }
        const auto t = static_cast<size_t>(to);
        std::memcpy(raw.data() + t * row_bytes, m.raw(from), row_bytes);
        m.slot_row[t] = m.slot_row[f];
        m.slot_age[t] = m.slot_age[f];
        m.slot_pinned[t] = m.slot_pinned[f];
        m.slot_pin_order[t] = m.slot_pin_order[f];
        ++to;
    }
    const auto slots = static_cast<size_t>(n_slots);
    std::fill(m.slot_row.begin() + to, m.slot_row.end(), -1);
    std::fill(m.slot_pinned.begin() + to, m.slot_pinned.end(), uint8_t{0});
    m.slot_row.resize(slots);
    m.slot_age.resize(slots);
    m.slot_pinned.resize(slots);
    m.slot_pin_order.resize(slots);
    m.slot_raw.swap(raw);
    m.n_slots = n_slots;
    m.ring_rows = m.options.window;
    const auto ring = static_cast<size_t>(m.ring_rows);
    std::vector<int32_t>().swap(m.ring_order);
    m.ring_order.reserve(ring);
    std::vector<int32_t>(ring).swap(m.batch_slots);
    return {};
}

// One head's rows, in order. `before`: what their codes were made with.
void encode_again(Store::Impl& m, const Conditioner& before, const StagedRows& staged, int head, HeadNotes& notes) {
    alignas(64) uint16_t h[kMaxHeadSize + 2 * kVectorPadding];
    float x[kMaxHeadSize];
    const ptrdiff_t head_at = static_cast<ptrdiff_t>(head) * m.shape.head_size;
    for (int64_t row = 0; row < m.shape.rows; ++row) {
        if (row % kTileRows == 0 && m.written_rows[static_cast<size_t>(row / kTileRows)] == 0) {
            row += kTileRows - 1;
            continue;
        }
        if (!m.is_written(row)) {
            continue;
        }
        const int slot = m.find_slot(row);
        const uint16_t* raw = slot >= 0 ? m.raw(slot) : staged.find(row);
        if (raw != nullptr) {
            std::fill(std::begin(h), std::end(h), uint16_t{0});
            std::copy_n(raw + head_at, m.shape.head_size, h);
        } else {
            if (m.coded()) {
                decode_head(m, before, row, head, x);
            } else {
                const auto* const plain = reinterpret_cast<const uint16_t*>(m.plain_row(head, row));
                std::transform(plain, plain + m.shape.head_size, x, from_half);
            }
            round_head(m, x, h, notes);
        }
        clear_tag_bits(m, head, h);
        encode_head(m, row, head, h, notes);
    }
}

} // namespace

Status Store::condition(const Conditioning& conditioning, const Staging* staging, const ParallelFor& parallel) {
    Impl& m = *impl_;
    if (Status status = check_store_conditioning(conditioning, m.shape); !status.ok()) {
        return {status.code(), "condition: " + status.message()};
    }
    if (!m.quantised()) {
        return {};
    }
    try {
        Conditioner now;
        now.set(conditioning, m.rotation, m.shape.kv_heads);
        for (const int block : m.blocks) {
            now.add_block(block);
        }
        const StagedRows staged(*this, staging);
        if (now.record() != m.conditioner.record()) {
            std::swap(m.conditioner, now);
            m.mean_entry = -1;
            std::vector<HeadNotes> notes(static_cast<size_t>(m.shape.kv_heads));
            const auto one_head = [&](int64_t head, int) {
                encode_again(m, now, staged, static_cast<int>(head), notes[static_cast<size_t>(head)]);
            };
            if (parallel.run != nullptr) {
                parallel(m.shape.kv_heads, one_head);
            } else {
                for (int head = 0; head < m.shape.kv_heads; ++head) {
                    one_head(head, 0);
                }
            }
        }
        if (m.calibrating) {
            if (Status status = shrink_ring(m); !status.ok()) {
                return status;
            }
            m.calibrating = false;
            m.options.calibration_rows = 0;
        }
    } catch (const std::bad_alloc&) {
        return {StatusCode::out_of_memory, "condition: no memory for the new means; use a smaller context"};
    }
    return {};
}

} // namespace turboquant
