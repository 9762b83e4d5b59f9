// The paged cache: two stores without exact rows whose tiles are handed out as pages, and exact rows beside them.
#include "turboquant/paged.h"

#include "cache/rows.h"
#include "cache/store_impl.h"
#include "capi/guard.h"
#include "codec/codec_tables.h"
#include "turboquant/store.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <string>

using turboquant::kTileRows;
using turboquant::PageMemory;
using turboquant::Side;
using turboquant::Status;
using turboquant::Store;

struct tq_paged {
    tq_paged_options options; // mu and lambda are not kept
    std::unique_ptr<Store> keys;
    std::unique_ptr<Store> values;
    PageMemory exact[2]; // keys, values: fp16 [sequence][sinks + ring][kv_head][channel]

    int64_t n_slots() const { return options.n_pages * options.page_size; }
    int64_t entries_a_sequence() const { return int64_t{options.sinks} + options.ring; }
    int64_t n_exact() const { return options.sequences * entries_a_sequence(); }
    const Store& store(int side) const { return side == 0 ? *keys : *values; }
    uint16_t* exact_row(int side, int64_t entry) const {
        return reinterpret_cast<uint16_t*>(exact[side].data()) + entry * keys->shape().row_elements();
    }
};

namespace {

using namespace turboquant::capi;
using turboquant::invalid;

constexpr int32_t kMaxSide = 1 << 20; // of what is counted in 32 bits, so that products fit

Status check(const tq_paged_options& o) {
    if (o.page_size < kTileRows || o.page_size % kTileRows != 0 || o.page_size > kMaxSide) {
        return invalid("tq_paged_options: page_size " + std::to_string(o.page_size) +
                       "; in host memory a page is a multiple of 64 tokens");
    }
    if (o.n_pages < 1 || o.n_pages > (int64_t{1} << 36) / o.page_size) { // tiles are counted in 32 bits
        return invalid("tq_paged_options: n_pages " + std::to_string(o.n_pages) +
                       "; 1 to 2^36 tokens in all can be served");
    }
    for (const int32_t bits : {o.key_bits, o.value_bits}) {
        if (bits > 8) { // a store takes 16 and 32: rows that are not compressed
            return invalid("tq_paged_options: " + std::to_string(bits) + " bits; pass 2, 3, 4, 5, 6 or 8");
        }
    }
    const bool exact = o.sinks > 0 || o.window > 0;
    if (o.sinks < 0 || o.window < 0 || o.ring < o.window || o.sequences < 0 || (exact && o.sequences < 1) ||
        (o.window == 0 && o.ring != 0) || std::max({o.sinks, o.ring, o.sequences}) > kMaxSide) {
        return invalid("tq_paged_options: sinks " + std::to_string(o.sinks) + ", window " + std::to_string(o.window) +
                       ", ring " + std::to_string(o.ring) + ", sequences " + std::to_string(o.sequences) +
                       "; exact rows need sequences, and a ring not smaller than the window");
    }
    return {};
}

turboquant::StoreShape shape_of(const tq_paged_options& o, Side side) {
    return {side, o.head_size, o.kv_heads, o.n_pages * o.page_size};
}

Status read_options(const tq_paged_options* in, tq_paged_options& o) {
    if (Status s = copy_struct(in, "tq_paged_options", o); !s.ok()) {
        return s;
    }
    if (Status s = check(o); !s.ok()) {
        return s;
    }
    for (const Side side : {Side::key, Side::value}) {
        size_t bytes = 0;
        if (Status s = Store::bytes(shape_of(o, side), {.bits = side == Side::key ? o.key_bits : o.value_bits}, bytes);
            !s.ok()) {
            return s;
        }
    }
    return {};
}

// Consecutive rows that are stored go to the stores together.
template <class Body>
Status for_stored_runs(const tq_paged_rows& rows, Body&& body) {
    for (int64_t i = 0; i < rows.n;) {
        if (rows.slots[i] < 0) {
            ++i;
            continue;
        }
        const int64_t begin = i;
        while (i < rows.n && rows.slots[i] >= 0) {
            ++i;
        }
        if (Status s = body(begin, i - begin); !s.ok()) {
            return s;
        }
    }
    return {};
}

void write_exact(const tq_paged& cache, const tq_paged_rows& rows) {
    alignas(64) uint16_t h[turboquant::kMaxHeadSize + 2 * turboquant::kVectorPadding];
    turboquant::HeadNotes notes;
    const int head_size = cache.options.head_size;
    for (int64_t i = 0; i < rows.n; ++i) {
        for (int side = 0; side < 2 && rows.exact_rows[i] >= 0; ++side) {
            const float* x = side == 0 ? rows.keys + i * rows.key_stride : rows.values + i * rows.value_stride;
            uint16_t* out = cache.exact_row(side, rows.exact_rows[i]);
            for (int head = 0; head < cache.options.kv_heads; ++head) {
                turboquant::round_head(cache.store(side).impl(), x + head * head_size, h, notes);
                std::copy_n(h, head_size, out + head * head_size);
            }
        }
    }
}

Status check_rows(const tq_paged& cache, const tq_paged_rows& r) {
    if (r.n < 0 || (r.n > 0 && (r.keys == nullptr || r.values == nullptr || r.slots == nullptr))) {
        return invalid("tq_paged_write: keys, values or slots are null, or n is negative");
    }
    const int elements = cache.keys->shape().row_elements();
    if (r.n > 1 && (r.key_stride < elements || r.value_stride < elements)) {
        return invalid("tq_paged_write: strides " + std::to_string(r.key_stride) + " and " +
                       std::to_string(r.value_stride) + "; rows have " + std::to_string(elements) + " elements");
    }
    for (int64_t i = 0; i < r.n; ++i) {
        if (r.slots[i] >= cache.n_slots()) {
            return invalid("tq_paged_write: slots[" + std::to_string(i) + "] is " + std::to_string(r.slots[i]) +
                           ", the cache has " + std::to_string(cache.n_slots()));
        }
        if (r.exact_rows != nullptr && r.exact_rows[i] >= cache.n_exact()) {
            return invalid("tq_paged_write: exact_rows[" + std::to_string(i) + "] is " +
                           std::to_string(r.exact_rows[i]) + ", the cache keeps " + std::to_string(cache.n_exact()));
        }
    }
    return {};
}

// One side of one slot into the outputs, [kv_head] each from the pointers on.
void read_slot(const Store::Impl& m, int64_t slot, uint8_t* codes, uint16_t* scales, float* rows, bool rotated) {
    const int d = m.shape.head_size;
    uint8_t own[turboquant::kMaxHeadSize];
    for (int head = 0; head < m.shape.kv_heads; ++head) {
        uint8_t* const c = codes != nullptr ? codes + head * d : own;
        const uint16_t* const s = m.tile_scales(head, slot / kTileRows) + slot % kTileRows;
        if (codes != nullptr || rotated) {
            turboquant::gather_codes(m, slot, head, c);
        }
        for (int b = 0; b < m.n_blocks; ++b) {
            const turboquant::RotationBlock& block = m.rotation.blocks()[static_cast<size_t>(b)];
            if (scales != nullptr) {
                scales[head * m.n_blocks + b] = s[b * kTileRows];
            }
            if (rows != nullptr && rotated) {
                turboquant::decode_block(c + block.offset, block.size, *m.book, s[b * kTileRows],
                                         rows + head * d + block.offset);
            }
        }
        if (rows != nullptr && !rotated) {
            turboquant::decode_head(m, m.conditioner, slot, head, rows + head * d);
        }
    }
}

Status check_attention(const tq_paged& cache, const tq_paged_attention& a) {
    const std::string call = "tq_paged_attend: ";
    if (a.batch < 0 || a.q_len < 1 || a.heads < 1 || a.heads % cache.options.kv_heads != 0) {
        return invalid(call + "batch " + std::to_string(a.batch) + ", q_len " + std::to_string(a.q_len) + ", heads " +
                       std::to_string(a.heads) + " over " + std::to_string(cache.options.kv_heads) +
                       " KV heads; there must be a query, and heads a multiple of the KV heads");
    }
    if (a.batch > 0 && (a.q == nullptr || a.out == nullptr || a.page_table == nullptr || a.lengths == nullptr)) {
        return invalid(call + "q, out, page_table or lengths is null");
    }
    if (a.softcap < 0 || a.sliding_window < 0 || !std::isfinite(a.scale) || !std::isfinite(a.softcap)) {
        return invalid(call + "softcap and sliding_window must not be negative, scale and softcap must be finite");
    }
    if (cache.n_exact() > 0 && a.batch > 0 && a.sequence_slots == nullptr) {
        return invalid(call + "a cache with exact rows needs sequence_slots");
    }
    if (a.prefill == 0 && cache.options.window > 0 &&
        cache.options.ring < cache.options.window + int64_t{a.q_len} - 1) {
        return invalid(call + "ring " + std::to_string(cache.options.ring) + " is less than window + q_len - 1 = " +
                       std::to_string(cache.options.window + int64_t{a.q_len} - 1));
    }
    const auto capacity = static_cast<int64_t>(a.table_pages) * cache.options.page_size;
    for (int32_t b = 0; b < a.batch; ++b) {
        if (a.lengths[b] < 0 || a.lengths[b] > capacity) {
            return invalid(call + "lengths[" + std::to_string(b) + "] is " + std::to_string(a.lengths[b]) +
                           ", the page table has room for " + std::to_string(capacity));
        }
        for (int64_t i = 0; i * cache.options.page_size < a.lengths[b]; ++i) {
            const int32_t page = a.page_table[b * a.page_table_stride + i];
            if (page < 0 || page >= cache.options.n_pages) {
                return invalid(call + "page_table[" + std::to_string(b) + ", " + std::to_string(i) + "] is " +
                               std::to_string(page) + ", the cache has " + std::to_string(cache.options.n_pages) +
                               " pages");
            }
        }
        if (a.sequence_slots != nullptr && cache.n_exact() > 0 &&
            (a.sequence_slots[b] < 0 || a.sequence_slots[b] >= cache.options.sequences)) {
            return invalid(call + "sequence_slots[" + std::to_string(b) + "] is " +
                           std::to_string(a.sequence_slots[b]) + ", the cache has exact rows of " +
                           std::to_string(cache.options.sequences) + " sequences");
        }
    }
    return {};
}

// The exact rows that some query of sequence b sees as such, in order.
void collect_exact(const tq_paged& cache, const tq_paged_attention& a, int32_t b, int64_t first_end,
                   std::vector<turboquant::GivenRow>& given) {
    given.clear();
    if (cache.n_exact() == 0) {
        return;
    }
    const tq_paged_options& o = cache.options;
    const int64_t length = a.lengths[b];
    const int64_t first_entry = a.sequence_slots[b] * cache.entries_a_sequence();
    const auto take = [&](int64_t position) {
        const int64_t entry = position < o.sinks ? position : o.sinks + (position - o.sinks) % o.ring;
        given.push_back({position, cache.exact_row(0, first_entry + entry), cache.exact_row(1, first_entry + entry)});
    };
    for (int64_t p = 0; p < std::min<int64_t>(o.sinks, length); ++p) {
        take(p);
    }
    const int64_t window_begin = o.window > 0 ? std::max(first_end - o.window, length - o.ring) : length;
    for (int64_t p = std::max<int64_t>(window_begin, o.sinks); p < length; ++p) {
        take(p);
    }
}

} // namespace

size_t tq_paged_page_bytes(const tq_paged_options* options) {
    size_t bytes = 0;
    guarded([&]() -> Status {
        tq_paged_options o{};
        if (Status s = read_options(options, o); !s.ok()) {
            return s;
        }
        turboquant::Rotation rotation;
        if (Status s = turboquant::Rotation::create(o.head_size, rotation); !s.ok()) {
            return s;
        }
        const size_t scale_bytes = rotation.blocks().size() * kTileRows * sizeof(uint16_t);
        bytes = static_cast<size_t>(o.kv_heads) * static_cast<size_t>(o.page_size / kTileRows) *
                (turboquant::make_tile_layout(Side::key, o.key_bits, o.head_size).tile_bytes +
                 turboquant::make_tile_layout(Side::value, o.value_bits, o.head_size).tile_bytes + 2 * scale_bytes);
        return {};
    });
    return bytes;
}

tq_status tq_paged_create(const tq_paged_options* options, tq_paged** cache) {
    return guarded([&]() -> Status {
        if (cache == nullptr) {
            return null_argument("tq_paged_create", "cache");
        }
        *cache = nullptr;
        tq_paged_options o{};
        if (Status s = read_options(options, o); !s.ok()) {
            return s;
        }
        auto made = std::make_unique<tq_paged>();
        turboquant::Conditioning conditioning;
        const auto elements = static_cast<size_t>(o.kv_heads) * static_cast<size_t>(o.head_size);
        if (o.mu != nullptr) {
            conditioning.mu.assign(o.mu, o.mu + elements);
        }
        if (o.lambda != nullptr) {
            conditioning.lambda.assign(o.lambda, o.lambda + elements);
        }
        if (Status s = Store::create(shape_of(o, Side::key), {.bits = o.key_bits}, conditioning, made->keys); !s.ok()) {
            return s;
        }
        if (Status s = Store::create(shape_of(o, Side::value), {.bits = o.value_bits}, {}, made->values); !s.ok()) {
            return s;
        }
        o.mu = nullptr;
        o.lambda = nullptr;
        made->options = o;
        for (PageMemory& exact : made->exact) {
            if (!exact.allocate(static_cast<size_t>(made->n_exact()) * elements * sizeof(uint16_t))) {
                return {turboquant::StatusCode::out_of_memory,
                        "tq_paged_create: no memory for " + std::to_string(made->n_exact()) + " exact rows"};
            }
        }
        *cache = made.release();
        return {};
    });
}

void tq_paged_destroy(tq_paged* cache) {
    delete cache;
}

int32_t tq_paged_blocks(const tq_paged* cache) {
    return cache == nullptr ? 0 : cache->keys->impl().n_blocks;
}

tq_status tq_paged_write(tq_paged* cache, const tq_paged_rows* rows) {
    return guarded([&]() -> Status {
        if (cache == nullptr) {
            return null_argument("tq_paged_write", "cache");
        }
        tq_paged_rows r{};
        if (Status s = copy_struct(rows, "tq_paged_rows", r); !s.ok()) {
            return s;
        }
        if (Status s = check_rows(*cache, r); !s.ok()) {
            return s;
        }
        if (r.exact_rows != nullptr) {
            write_exact(*cache, r);
        }
        const turboquant::ParallelFor parallel = parallel_for(r.parallel);
        return for_stored_runs(r, [&](int64_t begin, int64_t n) {
            Status s =
                cache->keys->write(r.keys + begin * r.key_stride, r.key_stride, r.slots + begin, n, parallel, nullptr);
            return !s.ok() ? s
                           : cache->values->write(r.values + begin * r.value_stride, r.value_stride, r.slots + begin, n,
                                                  parallel, nullptr);
        });
    });
}

tq_status tq_paged_read(const tq_paged* cache, const int64_t* slots, int64_t n, uint8_t* codes, uint16_t* scales,
                        float* rows, int32_t rotated, const tq_parallel* parallel) {
    return guarded([&]() -> Status {
        if (cache == nullptr || n < 0 || (n > 0 && slots == nullptr)) {
            return invalid("tq_paged_read: cache or slots are null, or n is negative");
        }
        for (int64_t i = 0; i < n; ++i) {
            if (slots[i] >= cache->n_slots()) {
                return invalid("tq_paged_read: slots[" + std::to_string(i) + "] is " + std::to_string(slots[i]) +
                               ", the cache has " + std::to_string(cache->n_slots()));
            }
        }
        const int64_t elements = cache->keys->shape().row_elements();
        const auto read = [&](int64_t index, int) {
            const int side = index < n ? 0 : 1;
            const int64_t slot = slots[index - side * n];
            const Store::Impl& m = cache->store(side).impl();
            const int64_t scales_a_row = int64_t{m.shape.kv_heads} * m.n_blocks;
            uint8_t* const c = codes == nullptr ? nullptr : codes + index * elements;
            uint16_t* const s = scales == nullptr ? nullptr : scales + index * scales_a_row;
            float* const x = rows == nullptr ? nullptr : rows + index * elements;
            if (slot >= 0) {
                read_slot(m, slot, c, s, x, rotated != 0);
                return;
            }
            std::fill_n(c, c == nullptr ? 0 : elements, uint8_t{0});
            std::fill_n(s, s == nullptr ? 0 : scales_a_row, uint16_t{0});
            std::fill_n(x, x == nullptr ? 0 : elements, 0.0F);
        };
        (parallel == nullptr ? turboquant::ParallelFor{} : parallel_for(*parallel))(2 * n, read);
        return {};
    });
}

tq_status tq_paged_attend(const tq_paged* cache, const tq_paged_attention* attention, tq_workspace* workspace) {
    return guarded([&]() -> Status {
        if (cache == nullptr || workspace == nullptr) {
            return null_argument("tq_paged_attend", cache == nullptr ? "cache" : "workspace");
        }
        tq_paged_attention a{};
        if (Status s = copy_struct(attention, "tq_paged_attention", a); !s.ok()) {
            return s;
        }
        if (Status s = check_attention(*cache, a); !s.ok()) {
            return s;
        }
        turboquant::Isa isa{};
        if (Status s = turboquant::default_isa(isa); !s.ok()) {
            return s;
        }
        const tq_paged_options& o = cache->options;
        const turboquant::ParallelFor parallel = parallel_for(a.parallel);
        const int64_t tiles_a_page = o.page_size / kTileRows;
        const auto batch = static_cast<size_t>(a.batch);
        std::vector<turboquant::RowRange>& ranges = workspace->ranges;
        ranges.resize(batch * static_cast<size_t>(a.q_len));
        workspace->tiles.resize(std::max(workspace->tiles.size(), batch));
        workspace->given.resize(std::max(workspace->given.size(), batch));
        workspace->jobs.clear();

        turboquant::AttentionCall call;
        call.q_query_stride = a.q_query;
        call.q_head_stride = a.q_head;
        call.n_queries = a.q_len;
        call.n_heads = a.heads;
        call.out_query_stride = a.out_query;
        call.out_head_stride = a.out_head;
        call.scale = a.scale != 0 ? a.scale : 1 / std::sqrt(static_cast<float>(o.head_size));
        call.softcap = a.softcap;
        call.sink_logits = a.sink_logits;
        call.given_sinks = o.sinks;
        call.given_window = o.window;
        for (int32_t b = 0; b < a.batch; ++b) {
            const int64_t length = a.lengths[b];
            const int64_t first_end = a.not_causal != 0 ? length : length - a.q_len + 1;
            turboquant::RowRange* range = ranges.data() + static_cast<ptrdiff_t>(b) * a.q_len;
            for (int32_t i = 0; i < a.q_len; ++i) {
                const int64_t end = a.not_causal != 0 ? length : first_end + i;
                range[i] = {a.sliding_window > 0 ? std::max<int64_t>(end - a.sliding_window, 0) : 0, end};
            }
            std::vector<int32_t>& tiles = workspace->tiles[static_cast<size_t>(b)];
            std::vector<turboquant::GivenRow>& given = workspace->given[static_cast<size_t>(b)];
            tiles.clear();
            const int32_t* pages = a.page_table + b * a.page_table_stride;
            for (int64_t t = 0; t * kTileRows < length; ++t) {
                tiles.push_back(static_cast<int32_t>(pages[t / tiles_a_page] * tiles_a_page + t % tiles_a_page));
            }
            collect_exact(*cache, a, b, first_end, given);
            call.q = a.q + b * a.q_batch;
            call.out = a.out + b * a.out_batch;
            call.n_rows = length;
            call.tiles = tiles.data();
            call.ranges = range;
            call.given = given.data();
            call.n_given = static_cast<int64_t>(given.size());
            workspace->jobs.push_back({cache->keys.get(), cache->values.get(), call});
        }
        return turboquant::attend_all(workspace->jobs, workspace->workspace, parallel, isa);
    });
}
