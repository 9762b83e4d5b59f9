// The C interface over the C++ one: arguments checked, exceptions and messages turned into codes.
#include "turboquant/turboquant.h"

#include "capi/guard.h"
#include "turboquant/store.h"

#include <algorithm>
#include <memory>
#include <string>

struct tq_store {
    std::unique_ptr<turboquant::Store> store;
};
struct tq_batch {
    turboquant::Staging staging;
};

namespace {

using namespace turboquant::capi;
using turboquant::invalid;
using turboquant::Status;

struct Options {
    turboquant::StoreShape shape;
    turboquant::StoreOptions options;
    turboquant::Conditioning conditioning;
};

Status read_options(const tq_store_options* in, bool with_conditioning, Options& out) {
    tq_store_options o{};
    if (Status s = copy_struct(in, "tq_store_options", o); !s.ok()) {
        return s;
    }
    if (o.side != TQ_KEY && o.side != TQ_VALUE) {
        return invalid("tq_store_options: side " + std::to_string(o.side) + " is neither TQ_KEY nor TQ_VALUE");
    }
    out.shape = {o.side == TQ_KEY ? turboquant::Side::key : turboquant::Side::value, o.head_size, o.kv_heads, o.rows};
    out.options = {.bits = o.bits == 0 ? 4 : o.bits, .window = o.window, .sink_slots = o.sink_slots};
    size_t bytes = 0;
    if (Status s = turboquant::Store::bytes(out.shape, out.options, bytes); !s.ok()) {
        return s; // before the shape is trusted to say how long mu and lambda are
    }
    const auto elements = static_cast<size_t>(out.shape.row_elements());
    if (with_conditioning && o.mu != nullptr) {
        out.conditioning.mu.assign(o.mu, o.mu + elements);
    }
    if (with_conditioning && o.lambda != nullptr) {
        out.conditioning.lambda.assign(o.lambda, o.lambda + elements);
    }
    if (o.n_rope < 0 || o.n_rope > out.shape.head_size / 2 || (o.n_rope > 0 && o.rope == nullptr)) {
        return invalid("tq_store_options: n_rope " + std::to_string(o.n_rope) + " with rope " +
                       (o.rope == nullptr ? "null" : "set") + "; pass at most head_size / 2 pairs");
    }
    for (int i = 0; with_conditioning && i < o.n_rope; ++i) {
        out.conditioning.rope.push_back({o.rope[i].first, o.rope[i].second, o.rope[i].theta});
    }
    return {};
}

} // namespace

const char* tq_version(void) {
    return TURBOQUANT_VERSION;
}

const char* tq_last_error(void) {
    return last_error();
}

tq_status tq_store_bytes(const tq_store_options* options, size_t* bytes) {
    return guarded([&]() -> Status {
        if (bytes == nullptr) {
            return null_argument("tq_store_bytes", "bytes");
        }
        Options o;
        if (Status s = read_options(options, false, o); !s.ok()) {
            return s;
        }
        return turboquant::Store::bytes(o.shape, o.options, *bytes);
    });
}

tq_status tq_store_create(const tq_store_options* options, tq_store** store) {
    return guarded([&]() -> Status {
        if (store == nullptr) {
            return null_argument("tq_store_create", "store");
        }
        *store = nullptr;
        Options o;
        if (Status s = read_options(options, true, o); !s.ok()) {
            return s;
        }
        auto made = std::make_unique<tq_store>();
        if (Status s = turboquant::Store::create(o.shape, o.options, o.conditioning, made->store); !s.ok()) {
            return s;
        }
        *store = made.release();
        return {};
    });
}

void tq_store_destroy(tq_store* store) {
    delete store;
}

size_t tq_store_size(const tq_store* store) {
    return store == nullptr ? 0 : store->store->bytes();
}

tq_status tq_store_write(tq_store* store, const float* x, int64_t stride, const int64_t* rows, int64_t n_rows,
                         tq_batch* batch) {
    return tq_store_write_at(store, x, stride, rows, nullptr, n_rows, batch);
}

tq_status tq_store_write_at(tq_store* store, const float* x, int64_t stride, const int64_t* rows,
                            const int32_t* positions, int64_t n_rows, tq_batch* batch) {
    return guarded([&]() -> Status {
        if (store == nullptr) {
            return null_argument("tq_store_write", "store");
        }
        if (n_rows < 0) {
            return invalid("tq_store_write: " + std::to_string(n_rows) + " rows");
        }
        if (n_rows > 0 && (x == nullptr || rows == nullptr)) {
            return null_argument("tq_store_write", x == nullptr ? "x" : "rows");
        }
        return store->store->write(x, stride, rows, n_rows, {}, batch == nullptr ? nullptr : &batch->staging,
                                   positions);
    });
}

tq_status tq_store_pin(tq_store* store, int64_t row, const tq_batch* batch) {
    return guarded([&]() -> Status {
        if (store == nullptr) {
            return null_argument("tq_store_pin", "store");
        }
        return store->store->pin(row, batch == nullptr ? nullptr : &batch->staging);
    });
}

tq_status tq_store_read(const tq_store* store, int64_t row, float* x) {
    return guarded([&]() -> Status {
        if (store == nullptr || x == nullptr) {
            return null_argument("tq_store_read", store == nullptr ? "store" : "x");
        }
        return store->store->read(row, x);
    });
}

tq_status tq_store_clear(tq_store* store) {
    return guarded([&]() -> Status {
        if (store == nullptr) {
            return null_argument("tq_store_clear", "store");
        }
        store->store->clear();
        return {};
    });
}

tq_status tq_batch_create(tq_batch** batch) {
    return guarded([&]() -> Status {
        if (batch == nullptr) {
            return null_argument("tq_batch_create", "batch");
        }
        *batch = nullptr;
        *batch = new tq_batch;
        return {};
    });
}

void tq_batch_destroy(tq_batch* batch) {
    delete batch;
}

tq_status tq_workspace_create(tq_workspace** workspace) {
    return guarded([&]() -> Status {
        if (workspace == nullptr) {
            return null_argument("tq_workspace_create", "workspace");
        }
        *workspace = nullptr;
        *workspace = new tq_workspace;
        return {};
    });
}

void tq_workspace_destroy(tq_workspace* workspace) {
    delete workspace;
}

tq_status tq_attend(const tq_store* keys, const tq_store* values, const tq_attention* call, tq_workspace* workspace) {
    return guarded([&]() -> Status {
        if (keys == nullptr || values == nullptr || workspace == nullptr) {
            return null_argument("tq_attend", keys == nullptr ? "keys" : values == nullptr ? "values" : "workspace");
        }
        tq_attention c{};
        if (Status s = copy_struct(call, "tq_attention", c); !s.ok()) {
            return s;
        }
        turboquant::Isa isa{};
        if (Status s = turboquant::default_isa(isa); !s.ok()) {
            return s;
        }
        turboquant::AttentionCall a;
        a.q = c.q;
        a.q_query_stride = c.q_query_stride;
        a.q_head_stride = c.q_head_stride;
        a.n_queries = c.n_queries;
        a.n_heads = c.n_heads;
        a.n_rows = c.n_rows;
        a.mask = c.mask;
        a.mask_query_stride = c.mask_query_stride;
        a.scale = c.scale;
        a.softcap = c.softcap;
        a.max_bias = c.max_bias;
        a.sink_logits = c.sink_logits;
        a.out = c.out;
        a.out_query_stride = c.out_query_stride;
        a.out_head_stride = c.out_head_stride;
        a.k_staging = c.key_batch == nullptr ? nullptr : &c.key_batch->staging;
        a.v_staging = c.value_batch == nullptr ? nullptr : &c.value_batch->staging;
        a.staging_offset = c.batch_offset;
        a.value_size = c.value_size;
        return turboquant::attend(*keys->store, *values->store, a, workspace->workspace, parallel_for(c.parallel), isa);
    });
}
