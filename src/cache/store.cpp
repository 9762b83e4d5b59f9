#include "turboquant/store.h"

#include "cache/condition.h"
#include "cache/rows.h"
#include "codec/codec_tables.h"

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstring>
#include <new>
#include <stdexcept>
#include <string>

namespace turboquant {

namespace {

constexpr int64_t kMaxRows = int64_t{1} << 40;
constexpr int kMaxHeads = 65535; // two bytes in a native row
constexpr int kMaxSlots = 1 << 20;
// Below this many (row, head) parts, waking other threads costs more than it saves.
constexpr int64_t kParallelParts = 64;

std::string describe(const StoreShape& shape, const StoreOptions& options) {
    return std::string(shape.side == Side::key ? "keys" : "values") + ", head size " + std::to_string(shape.head_size) +
           ", " + std::to_string(shape.kv_heads) + " heads, " + std::to_string(shape.rows) + " rows, " +
           std::to_string(options.bits) + " bits, window " + std::to_string(options.window) + ", " +
           std::to_string(options.sink_slots) + " sink slots" +
           (options.calibration_rows > 0 ? ", " + std::to_string(options.calibration_rows) + " to calibrate from" : "");
}

Status check(const StoreShape& shape, const StoreOptions& options) {
    const std::string what = "store (" + describe(shape, options) + "): ";
    if (shape.head_size < 4 || shape.head_size > kMaxHeadSize || shape.head_size % 4 != 0) {
        return invalid(what + "the head size must be a multiple of 4 in 4.." + std::to_string(kMaxHeadSize));
    }
    if (shape.kv_heads < 1 || shape.kv_heads > kMaxHeads) {
        return invalid(what + "heads must be in 1.." + std::to_string(kMaxHeads));
    }
    if (shape.rows < 1 || shape.rows > kMaxRows) {
        return invalid(what + "rows must be in 1..2^40");
    }
    if (find_codebook(options.bits) == nullptr && options.bits != 16 && options.bits != 32) {
        return invalid(what + "bits must be one of 2, 3, 4, 5, 6, 8 (codes), 16 or 32 (pass-through)");
    }
    if (options.emulate_q4_0 && (options.bits != 16 || shape.head_size % 32 != 0)) {
        return invalid(what + "emulating q4_0 takes bits 16 and a head size that is a multiple of 32");
    }
    if (options.window < 0 || options.window > kMaxSlots || options.sink_slots < 0 || options.sink_slots > kMaxSlots ||
        options.calibration_rows < 0 || options.calibration_rows > kMaxSlots) {
        return invalid(what + "window, sink slots and calibration rows must be in 0.." + std::to_string(kMaxSlots));
    }
    // In floating point, as the product of the limits above does not fit 64 bits.
    if (static_cast<double>(shape.rows + kTileRows) * shape.row_elements() * 4.0 > 0x1p60) {
        return {StatusCode::out_of_memory, what + "larger than the address space; use fewer rows"};
    }
    return {};
}

// Everything that a store allocates. bytes() adds it up, create() allocates it.
struct Plan {
    int64_t n_tiles = 0;
    int n_slots = 0;
    size_t code_bytes = 0;
    size_t scale_bytes = 0;
    size_t plain_bytes = 0;
    size_t raw_bytes = 0;
    size_t entry_bytes = 0;
    int entry_size = 1; // a sequence from position 0 on never needs more; others may (find_entry)
};

// What the options come to: exact rows need a codec and room for the tag.
StoreOptions effective(const StoreShape& shape, StoreOptions options) {
    if ((options.bits > 8 && !options.emulate_q4_0) || shape.row_elements() < kTagElements) {
        options.window = 0;
        options.sink_slots = 0;
        options.calibration_rows = 0;
    }
    return options;
}

// `options` as effective() gives them.
Plan make_plan(const StoreShape& shape, const StoreOptions& options, const Rotation& rotation) {
    Plan plan;
    plan.n_tiles = (shape.rows + kTileRows - 1) / kTileRows;
    const size_t head_tiles = static_cast<size_t>(plan.n_tiles) * static_cast<size_t>(shape.kv_heads);
    if (options.bits > 8) {
        plan.plain_bytes =
            head_tiles * kTileRows * static_cast<size_t>(shape.head_size) * static_cast<size_t>(options.bits / 8);
    } else {
        plan.code_bytes = head_tiles * make_tile_layout(shape.side, options.bits, shape.head_size).tile_bytes;
        plan.scale_bytes = head_tiles * rotation.blocks().size() * kTileRows * sizeof(uint16_t);
    }
    plan.n_slots = std::max(options.window, options.calibration_rows) + options.sink_slots;
    plan.raw_bytes = static_cast<size_t>(plan.n_slots) * static_cast<size_t>(shape.row_elements()) * sizeof(uint16_t);
    if (shape.side == Side::key && (options.bits <= 8 || options.emulate_q4_0)) {
        plan.entry_size = plan.n_tiles * kTileRows > static_cast<int64_t>(kNarrowEntries) * kPositionBlock ? 2 : 1;
        plan.entry_bytes = static_cast<size_t>(plan.n_tiles) * kTileRows * static_cast<size_t>(plan.entry_size);
    }
    return plan;
}

template <class T>
size_t vector_bytes(const std::vector<T>& v) {
    return v.size() * sizeof(T);
}

size_t plan_bytes(const Plan& plan, const StoreOptions& options) {
    const size_t slot_index = 2 * sizeof(uint64_t) + sizeof(int64_t) + sizeof(uint8_t);
    return plan.code_bytes + plan.scale_bytes + plan.plain_bytes + plan.raw_bytes + plan.entry_bytes +
           static_cast<size_t>(plan.n_slots) * slot_index +
           2 * static_cast<size_t>(std::max(options.window, options.calibration_rows)) * sizeof(int32_t) +
           3 * static_cast<size_t>(plan.n_tiles) * sizeof(uint64_t);
}

bool same(const Store::Impl& a, const Store::Impl& b) {
    return a.shape.side == b.shape.side && a.shape.head_size == b.shape.head_size &&
           a.shape.kv_heads == b.shape.kv_heads && a.shape.rows == b.shape.rows && a.options.bits == b.options.bits &&
           a.ring_rows == b.ring_rows && a.options.sink_slots == b.options.sink_slots &&
           a.calibrating == b.calibrating && a.options.emulate_q4_0 == b.options.emulate_q4_0 &&
           a.conditioner.record() == b.conditioner.record();
}

std::string row_range(const Store::Impl& impl, int64_t row) {
    return "row " + std::to_string(row) + " is not in 0.." + std::to_string(impl.shape.rows - 1);
}

} // namespace

Store::Store(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Store::~Store() = default;

const StoreShape& Store::shape() const {
    return impl_->shape;
}
const StoreOptions& Store::options() const {
    return impl_->options;
}
const Conditioning& Store::conditioning() const {
    return impl_->conditioner.conditioning();
}
bool Store::calibrating() const {
    return impl_->calibrating;
}
uint32_t Store::conditioning_id() const {
    return impl_->conditioner.id();
}
const Rotation& Store::rotation() const {
    return impl_->rotation;
}
const StoreCounters& Store::counters() const {
    return impl_->counters;
}

Status Store::bytes(const StoreShape& shape, const StoreOptions& options, size_t& bytes) {
    if (Status status = check(shape, options); !status.ok()) {
        return status;
    }
    Rotation rotation;
    if (Status status = Rotation::create(shape.head_size, rotation); !status.ok()) {
        return status;
    }
    StoreOptions used = effective(shape, options);
    used.calibration_rows = 0;
    bytes = plan_bytes(make_plan(shape, used, rotation), used);
    return {};
}

size_t Store::bytes() const {
    const Impl& m = *impl_;
    return m.codes.size() + m.scales.size() + m.plain.size() + m.slot_raw.size() + vector_bytes(m.slot_row) +
           vector_bytes(m.slot_age) + vector_bytes(m.slot_pinned) + vector_bytes(m.slot_pin_order) +
           vector_bytes(m.batch_rows) + vector_bytes(m.exact_rows) + vector_bytes(m.written_rows) +
           m.ring_order.capacity() * sizeof(int32_t) + vector_bytes(m.batch_slots) + m.row_entries.size();
}

Status Store::create(const StoreShape& shape, const StoreOptions& options, const Conditioning& conditioning,
                     std::unique_ptr<Store>& out) {
    if (Status status = check(shape, options); !status.ok()) {
        return status;
    }
    if (Status status = check_store_conditioning(conditioning, shape); !status.ok()) {
        return {status.code(), "store (" + describe(shape, options) + "): " + status.message()};
    }
    Isa isa = Isa::portable;
    if (Status status = default_isa(isa); !status.ok()) {
        return status;
    }
    const Status out_of_memory = {StatusCode::out_of_memory,
                                  "store (" + describe(shape, options) + "): no memory; use fewer rows or fewer bits"};
    try {
        auto impl = std::make_unique<Impl>();
        Impl& m = *impl;
        m.shape = shape;
        m.options = effective(shape, options);
        m.kernels = &codec_kernels(isa);
        if (Status status = Rotation::create(shape.head_size, m.rotation); !status.ok()) {
            return status;
        }
        const Plan plan = make_plan(shape, m.options, m.rotation);
        m.n_tiles = plan.n_tiles;
        m.n_slots = plan.n_slots;
        m.calibrating = m.options.calibration_rows > 0;
        m.ring_rows = std::max(m.options.window, m.options.calibration_rows);
        m.book = find_codebook(m.options.bits);
        if (m.coded()) {
            m.tile = make_tile_layout(shape.side, m.options.bits, shape.head_size);
            m.n_blocks = static_cast<int>(m.rotation.blocks().size());
            m.encode_table = &encode_table(m.options.bits);
            for (int p = 0; p < m.tile.n_planes; ++p) {
                const Plane& plane = m.tile.planes[p];
                const int fields = 8 / plane.width;
                m.plane_shapes[p] = {plane.width, plane.shift,
                                     (shape.side == Side::key ? plane.padded_channels : kTileRows) / (4 * fields)};
            }
        }
        if (m.options.emulate_q4_0) {
            // llama.cpp rotates keys over the head and values in parts of 64.
            const bool parts = shape.side == Side::value && shape.head_size % 64 == 0;
            if (Status status = Rotation::create(parts ? 64 : shape.head_size, m.emulated_rotation); !status.ok()) {
                return status;
            }
        }
        m.entry_size = plan.entry_size;
        if (!m.row_entries.allocate(plan.entry_bytes)) {
            return out_of_memory;
        }
        // Pass-through rows have none, but are asked for it.
        m.conditioner.set(conditioning, m.rotation, shape.kv_heads);
        find_entry(m, 0);
        if (m.blocks.empty()) { // values and pass-through: one entry for all
            m.blocks.push_back(0);
            m.conditioner.add_block(0);
        }
        const auto slots = static_cast<size_t>(m.n_slots);
        m.slot_row.assign(slots, -1);
        m.slot_age.resize(slots);
        m.slot_pinned.resize(slots);
        m.slot_pin_order.resize(slots);
        m.ring_order.reserve(static_cast<size_t>(m.ring_rows));
        m.batch_slots.resize(static_cast<size_t>(m.ring_rows));
        m.exact_rows.resize(static_cast<size_t>(m.n_tiles));
        m.written_rows.resize(static_cast<size_t>(m.n_tiles));
        m.batch_rows.resize(static_cast<size_t>(m.n_tiles));
        if (!m.codes.allocate(plan.code_bytes) || !m.scales.allocate(plan.scale_bytes) ||
            !m.plain.allocate(plan.plain_bytes) || !m.slot_raw.allocate(plan.raw_bytes)) {
            return out_of_memory;
        }
        out.reset(new Store(std::move(impl)));
    } catch (const std::bad_alloc&) {
        return out_of_memory;
    } catch (const std::length_error&) {
        return out_of_memory;
    }
    return {};
}

// ---- write -------------------------------------------------------------------------------------------------------

namespace {

// One batch, after its slots are settled: what the tasks need.
struct Batch {
    Store::Impl* impl = nullptr;
    const float* x = nullptr;
    int64_t stride = 0;
    const int64_t* index = nullptr;
    int64_t n = 0;
    int64_t first_in_ring = 0;  // rows from here on have slots: batch_slots[i - first_in_ring]
    uint16_t* staged = nullptr; // [n][row_elements] or null
};

void write_plain_head(Store::Impl& m, int64_t row, int kv_head, const float* x, HeadNotes& notes) {
    uint16_t h[kMaxHeadSize + 2 * kVectorPadding];
    const auto n = static_cast<size_t>(m.shape.head_size);
    uint8_t* const out = m.plain_row(kv_head, row);
    if (m.options.bits == 16) {
        round_head(m, x, h, notes);
        std::memcpy(out, h, n * sizeof(uint16_t));
        return;
    }
    if (std::all_of(x, x + n, [](float v) { return std::isfinite(v); })) {
        std::memcpy(out, x, n * sizeof(float));
    } else {
        std::memset(out, 0, n * sizeof(float));
        ++notes.nonfinite;
    }
}

void write_head(const Batch& batch, int64_t i, int kv_head, RowEncoder& encoder, HeadNotes& notes) {
    Store::Impl& m = *batch.impl;
    const int head_size = m.shape.head_size;
    const int head_at = kv_head * head_size;
    const float* const x = batch.x + i * batch.stride + head_at;
    const int64_t row = batch.index[i];
    if (!m.quantised()) {
        write_plain_head(m, row, kv_head, x, notes);
        return;
    }
    uint16_t* const h = encoder.next();
    round_head(m, x, h, notes);
    uint16_t* const slot = i >= batch.first_in_ring
                               ? m.raw(m.batch_slots[static_cast<size_t>(i - batch.first_in_ring)]) + head_at
                               : nullptr;
    uint16_t* const staged = batch.staged != nullptr ? batch.staged + i * m.shape.row_elements() + head_at : nullptr;
    clear_tag_bits(m, kv_head, h);
    for (uint16_t* const to : {slot, staged}) {
        if (to != nullptr) {
            std::memcpy(to, h, static_cast<size_t>(head_size) * sizeof(uint16_t));
        }
    }
    encoder.add(row, kv_head);
}

// All heads of all rows. Tasks are (head, tiles t with t % parts == part): a tile of a head belongs to one task.
void run_batch(const Batch& batch, const ParallelFor& parallel, StoreCounters& counters) {
    const int heads = batch.impl->shape.kv_heads;
    if (batch.n * heads < kParallelParts || parallel.run == nullptr || parallel.n_workers <= 1) {
        HeadNotes notes;
        RowEncoder encoder(*batch.impl, notes);
        for (int64_t i = 0; i < batch.n; ++i) {
            for (int head = 0; head < heads; ++head) {
                write_head(batch, i, head, encoder, notes);
            }
        }
        encoder.flush();
        counters.saturated += notes.saturated;
        counters.nonfinite += notes.nonfinite;
        return;
    }
    const int64_t tiles = std::min(batch.n, batch.impl->n_tiles);
    const int64_t parts = std::clamp<int64_t>((4 * parallel.n_workers + heads - 1) / heads, 1, tiles);
    std::atomic<uint64_t> saturated = 0;
    std::atomic<uint64_t> nonfinite = 0;
    parallel(heads * parts, [&](int64_t task, int) {
        const int head = static_cast<int>(task / parts);
        const int64_t part = task % parts;
        HeadNotes notes;
        RowEncoder encoder(*batch.impl, notes);
        for (int64_t i = 0; i < batch.n; ++i) {
            if (batch.index[i] / kTileRows % parts == part) {
                write_head(batch, i, head, encoder, notes);
            }
        }
        encoder.flush();
        saturated += notes.saturated;
        nonfinite += notes.nonfinite;
    });
    counters.saturated += saturated;
    counters.nonfinite += nonfinite;
}

// Marks the batch's rows in batch_rows; an error leaves no mark behind.
Status mark_batch(Store::Impl& m, const int64_t* index, int64_t n) {
    Status status;
    int64_t marked = 0;
    for (; marked < n; ++marked) {
        const int64_t row = index[marked];
        if (!m.in_range(row)) {
            status = invalid("write: index[" + std::to_string(marked) + "]: " + row_range(m, row));
            break;
        }
        uint64_t& word = m.batch_rows[static_cast<size_t>(row / 64)];
        if ((word >> (row % 64) & 1U) != 0) {
            status = invalid("write: row " + std::to_string(row) + " comes twice in one call; write it once");
            break;
        }
        word |= uint64_t{1} << (row % 64);
    }
    if (!status.ok()) {
        for (int64_t i = 0; i < marked; ++i) {
            m.batch_rows[static_cast<size_t>(index[i] / 64)] = 0;
        }
    }
    return status;
}

// Ring slots that the batch does not overwrite, oldest first, into ring_order.
void order_ring(Store::Impl& m) {
    m.ring_order.clear();
    for (int s = 0; s < m.n_slots; ++s) {
        const auto i = static_cast<size_t>(s);
        const int64_t row = m.slot_row[i];
        if (row >= 0 && m.slot_pinned[i] == 0 &&
            (m.batch_rows[static_cast<size_t>(row / 64)] >> (row % 64) & 1U) == 0) {
            m.ring_order.push_back(s);
        }
    }
    std::sort(m.ring_order.begin(), m.ring_order.end(), [&m](int32_t a, int32_t b) {
        return m.slot_age[static_cast<size_t>(a)] < m.slot_age[static_cast<size_t>(b)];
    });
}

// Room for the ring and the batch. May throw std::bad_alloc.
void size_staging(const Store::Impl& m, int64_t n, Staging& staging) {
    const size_t entries = m.n_slots > 0 ? m.ring_order.size() + static_cast<size_t>(n) : 0;
    staging.row.resize(entries);
    staging.age.resize(entries);
    staging.raw.resize(entries * static_cast<size_t>(m.shape.row_elements()));
}

void fill_staging(const Store::Impl& m, const int64_t* index, int64_t n, Staging& staging) {
    const auto elements = static_cast<size_t>(m.shape.row_elements());
    size_t entry = 0;
    for (const int32_t s : m.ring_order) {
        staging.row[entry] = m.slot_row[static_cast<size_t>(s)];
        staging.age[entry] = m.slot_age[static_cast<size_t>(s)];
        std::memcpy(staging.raw.data() + entry * elements, m.raw(s), elements * sizeof(uint16_t));
        ++entry;
    }
    staging.batch_begin = static_cast<int64_t>(entry);
    for (int64_t i = 0; i < n; ++i, ++entry) {
        staging.row[entry] = index[i];
        staging.age[entry] = m.clock + 1 + static_cast<uint64_t>(i);
    }
}

// Gives the last ring_rows rows of the batch their slots, the oldest of the ring making room (ring_order says which,
// except for a single row, where a sort is not worth it).
void settle_slots(Store::Impl& m, const int64_t* index, int64_t n, int64_t first_in_ring) {
    for (int64_t i = 0; i < n; ++i) {
        if (const int slot = m.find_slot(index[i]); slot >= 0) {
            release_slot(m, slot);
        }
    }
    size_t next_oldest = 0;
    int next_free = 0;
    for (int64_t i = first_in_ring; i < n; ++i) {
        int slot = -1;
        if (m.n_ring < m.ring_rows) {
            while (m.slot_row[static_cast<size_t>(next_free)] >= 0) {
                ++next_free;
            }
            slot = next_free;
        } else {
            slot = n == 1 ? oldest_ring_slot(m) : m.ring_order[next_oldest++];
            release_slot(m, slot);
        }
        take_slot(m, slot, index[i], m.clock + 1 + static_cast<uint64_t>(i), false);
        m.batch_slots[static_cast<size_t>(i - first_in_ring)] = slot;
    }
}

// The position block of every row of the batch, and the mean of one of them at hand.
Status assign_entries(Store::Impl& m, const int64_t* index, const int32_t* position, int64_t n) {
    if (m.row_entries.size() == 0 || n == 0) {
        return {};
    }
    try {
        int block = -1;
        int entry = 0;
        for (int64_t i = 0; i < n; ++i) {
            const int row_block = position_block(position != nullptr ? position[i] : index[i]);
            entry = row_block == block ? entry : find_entry(m, row_block);
            block = row_block;
            set_entry(m, index[i], entry);
        }
        if (m.conditioner.turns() && entry != m.mean_entry) {
            m.mean.resize(static_cast<size_t>(m.shape.row_elements()) + kConditionerPadding);
            for (int head = 0; head < m.shape.kv_heads; ++head) {
                m.conditioner.head_mean(head, entry, m.mean.data() + static_cast<ptrdiff_t>(head) * m.shape.head_size);
            }
            m.mean_entry = entry;
        }
    } catch (const std::bad_alloc&) {
        return {StatusCode::out_of_memory, "write: no memory for the means of position blocks; use a smaller context"};
    }
    return {};
}

} // namespace

Status Store::write(const float* x, int64_t stride, const int64_t* index, int64_t n, const ParallelFor& parallel,
                    Staging* staging, const int32_t* position) {
    Impl& m = *impl_;
    if (n < 0 || (n > 0 && (x == nullptr || index == nullptr)) || (n > 1 && stride < m.shape.row_elements())) {
        return invalid("write: " + std::to_string(n) + " rows, stride " + std::to_string(stride) +
                       "; pass rows at least " + std::to_string(m.shape.row_elements()) + " floats apart");
    }
    if (Status status = mark_batch(m, index, n); !status.ok()) {
        return status;
    }
    if (m.n_slots > 0 && (n > 1 || staging != nullptr)) {
        order_ring(m);
    }
    Status status;
    if (staging != nullptr) {
        try {
            size_staging(m, n, *staging);
        } catch (const std::bad_alloc&) {
            status = {StatusCode::out_of_memory,
                      "write: no memory to stage " + std::to_string(n) + " rows; write fewer at a time"};
            *staging = Staging();
        }
    }
    for (int64_t i = 0; i < n; ++i) {
        m.batch_rows[static_cast<size_t>(index[i] / 64)] = 0;
    }
    if (!status.ok()) {
        return status;
    }

    Batch batch;
    batch.impl = &m;
    batch.x = x;
    batch.stride = stride;
    batch.index = index;
    batch.n = n;
    batch.first_in_ring = std::max<int64_t>(0, n - m.ring_rows);
    if (staging != nullptr) {
        staging->owner = this;
        staging->batch_begin = 0;
        if (m.n_slots > 0) {
            fill_staging(m, index, n, *staging);
            batch.staged = staging->raw.data() + staging->batch_begin * m.shape.row_elements();
        }
    }
    settle_slots(m, index, n, batch.first_in_ring);
    for (int64_t i = 0; i < n; ++i) {
        set_bit(m.written_rows, index[i], true);
    }
    if (Status assigned = assign_entries(m, index, position, n); !assigned.ok()) {
        return assigned;
    }
    m.clock += static_cast<uint64_t>(n);
    m.counters.rows_written += static_cast<uint64_t>(n);
    run_batch(batch, parallel, m.counters);
    return {};
}

// ---- single rows -------------------------------------------------------------------------------------------------

Status Store::pin(int64_t row, const Staging* staging) {
    Impl& m = *impl_;
    if (!m.in_range(row)) {
        return invalid("pin: " + row_range(m, row));
    }
    if (m.options.sink_slots == 0) {
        return {};
    }
    int slot = m.find_slot(row);
    if (slot >= 0 && m.slot_pinned[static_cast<size_t>(slot)] != 0) {
        return {};
    }
    const auto elements = static_cast<size_t>(m.shape.row_elements());
    const uint16_t* staged = nullptr;
    uint64_t age = 0;
    if (slot >= 0) {
        age = m.slot_age[static_cast<size_t>(slot)];
    } else if (staging != nullptr && staging->owner == this && m.is_written(row) &&
               staging->raw.size() == staging->row.size() * elements && staging->age.size() == staging->row.size()) {
        for (size_t e = staging->row.size(); e-- > 0 && staged == nullptr;) {
            if (staging->row[e] == row) {
                staged = staging->raw.data() + e * elements;
                age = staging->age[e];
            }
        }
    }
    if (slot < 0 && staged == nullptr) {
        return invalid("pin: row " + std::to_string(row) +
                       " is no longer exact; pin it right after its write, with "
                       "the staging of that write");
    }
    if (m.n_pinned == m.options.sink_slots) {
        release_slot(m, longest_pinned_slot(m));
    }
    if (slot >= 0) {
        release_slot(m, slot); // it keeps its values and changes sides
    } else {
        slot = free_slot(m);
        std::memcpy(m.raw(slot), staged, elements * sizeof(uint16_t));
    }
    take_slot(m, slot, row, age, true);
    return {};
}

Status Store::rewrite(int64_t row, const float* x, int64_t shift) {
    Impl& m = *impl_;
    if (!m.in_range(row)) {
        return invalid("rewrite: " + row_range(m, row));
    }
    if (x == nullptr) {
        return invalid("rewrite: row " + std::to_string(row) + ": no values");
    }
    HeadNotes notes;
    const int slot = m.find_slot(row);
    if (shift != 0) { // where in its block the row is was not kept: as good as the middle
        set_entry(
            m, row,
            find_entry(m, position_block(int64_t{m.row_block(row)} * kPositionBlock + kPositionBlock / 2 + shift)));
    }
    alignas(64) uint16_t h[kMaxHeadSize + 2 * kVectorPadding];
    for (int head = 0; head < m.shape.kv_heads; ++head) {
        const int head_at = head * m.shape.head_size;
        if (!m.quantised()) {
            write_plain_head(m, row, head, x + head_at, notes);
            continue;
        }
        round_head(m, x + head_at, h, notes);
        clear_tag_bits(m, head, h);
        if (slot >= 0) {
            std::memcpy(m.raw(slot) + head_at, h, static_cast<size_t>(m.shape.head_size) * sizeof(uint16_t));
        }
        encode_head(m, row, head, h, notes);
    }
    set_bit(m.written_rows, row, true);
    m.counters.saturated += notes.saturated;
    m.counters.nonfinite += notes.nonfinite;
    return {};
}

Status Store::read(int64_t row, float* x) const {
    const Impl& m = *impl_;
    if (!m.in_range(row)) {
        return invalid("read: " + row_range(m, row));
    }
    const int elements = m.shape.row_elements();
    if (!m.is_written(row)) {
        std::fill(x, x + elements, 0.0F);
        return {};
    }
    if (const int slot = m.find_slot(row); slot >= 0) {
        const uint16_t* const raw = m.raw(slot);
        std::transform(raw, raw + elements, x, from_half);
        return {};
    }
    const auto head_size = static_cast<size_t>(m.shape.head_size);
    for (int head = 0; head < m.shape.kv_heads; ++head) {
        float* const to = x + static_cast<size_t>(head) * head_size;
        if (m.coded()) {
            decode_head(m, m.conditioner, row, head, to);
        } else if (m.options.bits == 32) {
            std::memcpy(to, m.plain_row(head, row), head_size * sizeof(float));
        } else {
            const auto* const h = reinterpret_cast<const uint16_t*>(m.plain_row(head, row));
            std::transform(h, h + head_size, to, from_half);
        }
    }
    return {};
}

bool Store::is_written(int64_t row) const {
    return impl_->in_range(row) && impl_->is_written(row);
}

bool Store::is_exact(int64_t row) const {
    return impl_->in_range(row) && impl_->is_exact(row);
}

bool Store::is_pinned(int64_t row) const {
    const int slot = is_exact(row) ? impl_->find_slot(row) : -1;
    return slot >= 0 && impl_->slot_pinned[static_cast<size_t>(slot)] != 0;
}

// ---- whole store -------------------------------------------------------------------------------------------------

Status Store::copy_from(const Store& source) {
    Impl& m = *impl_;
    const Impl& from = *source.impl_;
    if (&m == &from) {
        return {};
    }
    if (!same(m, from)) {
        return invalid("copy: this store is (" + describe(m.shape, m.options) + "), the source (" +
                       describe(from.shape, from.options) + "); they must agree, and so must mu and lambda");
    }
    if (m.entry_size != from.entry_size) {
        if (!m.row_entries.allocate(from.row_entries.size())) {
            return {StatusCode::out_of_memory,
                    "copy: no memory for the position blocks of rows; use a smaller context"};
        }
        m.entry_size = from.entry_size;
    }
    // Only tiles with rows: pages that neither store has written stay untouched.
    const auto scale_bytes = static_cast<size_t>(m.n_blocks) * kTileRows * sizeof(uint16_t);
    const size_t plain_bytes =
        m.coded() ? 0 : static_cast<size_t>(m.shape.head_size) * kTileRows * static_cast<size_t>(m.options.bits / 8);
    for (int64_t t = 0; t < m.n_tiles; ++t) {
        const auto i = static_cast<size_t>(t);
        if ((m.written_rows[i] | from.written_rows[i]) == 0) {
            continue;
        }
        if (from.row_entries.size() != 0) {
            const size_t bytes = kTileRows * static_cast<size_t>(m.entry_size);
            std::memcpy(m.row_entries.data() + i * bytes, from.row_entries.data() + i * bytes, bytes);
        }
        for (int head = 0; head < m.shape.kv_heads; ++head) {
            if (m.coded()) {
                std::memcpy(m.tile_codes(head, t), from.tile_codes(head, t), m.tile.tile_bytes);
                std::memcpy(m.tile_scales(head, t), from.tile_scales(head, t), scale_bytes);
            } else {
                std::memcpy(m.plain_row(head, t * kTileRows), from.plain_row(head, t * kTileRows), plain_bytes);
            }
        }
    }
    for (int s = 0; s < m.n_slots; ++s) {
        if (from.slot_row[static_cast<size_t>(s)] >= 0) {
            std::memcpy(m.raw(s), from.raw(s), static_cast<size_t>(m.shape.row_elements()) * sizeof(uint16_t));
        }
    }
    m.slot_row = from.slot_row;
    m.slot_age = from.slot_age;
    m.slot_pinned = from.slot_pinned;
    m.slot_pin_order = from.slot_pin_order;
    m.n_ring = from.n_ring;
    m.n_pinned = from.n_pinned;
    m.pin_clock = from.pin_clock;
    m.clock = from.clock;
    m.exact_rows = from.exact_rows;
    m.written_rows = from.written_rows;
    m.blocks = from.blocks;
    m.block_entries = from.block_entries;
    m.conditioner = from.conditioner;
    m.mean_entry = -1;
    return {};
}

void Store::clear() {
    Impl& m = *impl_;
    m.codes.zero();
    m.scales.zero();
    m.plain.zero();
    m.slot_raw.zero();
    m.row_entries.zero();
    std::fill(m.slot_row.begin(), m.slot_row.end(), -1);
    std::fill(m.slot_pinned.begin(), m.slot_pinned.end(), uint8_t{0});
    std::fill(m.exact_rows.begin(), m.exact_rows.end(), uint64_t{0});
    std::fill(m.written_rows.begin(), m.written_rows.end(), uint64_t{0});
    m.n_ring = 0;
    m.n_pinned = 0;
    m.pin_clock = 0;
    m.clock = 0;
}

} // namespace turboquant
