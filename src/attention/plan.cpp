#include "attention/plan.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <string>

namespace turboquant::attention {
namespace {

constexpr int64_t kMinSplitTiles = 4; // a merge costs about as much as one tile
constexpr int64_t kFineSplitTiles = 32;
constexpr int kChunkFloats = 16 * 1024; // of one task's queries: they and their sums stay in the second-level cache

std::string shape_text(const Store& s) {
    const StoreShape& h = s.shape();
    return std::to_string(h.rows) + " rows x " + std::to_string(h.kv_heads) + " heads x " + std::to_string(h.head_size);
}

bool has_int_kernels(const Store::Impl& s, Side side) {
    return s.book != nullptr && s.n_blocks == 1 && s.shape.side == side && s.shape.head_size % 16 == 0 &&
           s.shape.head_size <= kMaxIntHead;
}

// Tiles in any order, and exact rows that the caller keeps.
Status check_paging(const Store& k, const Store& v, const AttentionCall& call) {
    const bool own_rows = k.impl().n_slots > 0 || v.impl().n_slots > 0;
    if (own_rows && (call.tiles != nullptr || call.n_given > 0)) {
        return invalid("attention: the stores keep exact rows of their own; tiles and given rows need stores without");
    }
    const int64_t n_tiles = k.impl().n_tiles;
    for (int64_t t = 0; call.tiles != nullptr && t * kTileRows < call.n_rows; ++t) {
        if (call.tiles[t] < 0 || call.tiles[t] >= n_tiles) {
            return invalid("attention: tiles[" + std::to_string(t) + "] is " + std::to_string(call.tiles[t]) +
                           ", outside the stores' " + std::to_string(n_tiles));
        }
    }
    if (call.n_given < 0 || (call.n_given > 0 && (call.given == nullptr || call.ranges == nullptr)) ||
        call.given_sinks < 0 || call.given_window < 0) {
        return invalid("attention: " + std::to_string(call.n_given) + " given rows with given " +
                       (call.given == nullptr ? "null" : "set") + " and ranges " +
                       (call.ranges == nullptr ? "null" : "set") + "; both must be set, and no count negative");
    }
    for (int64_t i = 0; i < call.n_given; ++i) {
        if (call.given[i].row < 0 || call.given[i].row >= call.n_rows || call.given[i].key == nullptr ||
            call.given[i].value == nullptr || (i > 0 && call.given[i].row <= call.given[i - 1].row)) {
            return invalid("attention: given[" + std::to_string(i) + "] is row " + std::to_string(call.given[i].row) +
                           " of " + std::to_string(call.n_rows) +
                           "; given rows must ascend, lie among them and have a key and a value");
        }
    }
    return {};
}

} // namespace

float alibi_slope(int head, int n_heads, float max_bias) {
    if (max_bias <= 0) {
        return 1;
    }
    const int ladder = static_cast<int>(std::bit_floor(static_cast<unsigned>(n_heads)));
    const float exponent =
        head < ladder ? max_bias / static_cast<float>(ladder) * static_cast<float>(head + 1)
                      : max_bias / 2 / static_cast<float>(ladder) * static_cast<float>(2 * (head - ladder) + 1);
    return std::exp2(-exponent);
}

Status check_call(const Store& k, const Store& v, const AttentionCall& call) {
    const StoreShape& ks = k.shape();
    const StoreShape& vs = v.shape();
    if (ks.kv_heads != vs.kv_heads || ks.rows != vs.rows) {
        return invalid("attention: keys are " + shape_text(k) + ", values " + shape_text(v) +
                       "; rows and heads must be the same");
    }
    if (ks.side != Side::key) {
        return invalid("attention: the first store holds values; pass the key store first");
    }
    if (call.n_heads <= 0 || call.n_heads % ks.kv_heads != 0) {
        return invalid("attention: " + std::to_string(call.n_heads) + " query heads over " +
                       std::to_string(ks.kv_heads) + " KV heads; the former must be a multiple of the latter");
    }
    if (Status s = check_paging(k, v, call); !s.ok()) {
        return s;
    }
    if (call.n_rows < 0 || (call.tiles == nullptr && call.n_rows > ks.rows)) {
        return invalid("attention: " + std::to_string(call.n_rows) + " rows asked of a store of " +
                       std::to_string(ks.rows));
    }
    if (call.value_size < 0 || call.value_size > vs.head_size) {
        return invalid("attention: value_size " + std::to_string(call.value_size) + " is outside 0.." +
                       std::to_string(vs.head_size) + ", the head size of the stored values");
    }
    if (vs.side == Side::key && call.value_size == 0) {
        return invalid("attention: the values are a key store of head size " + std::to_string(vs.head_size) +
                       "; say with value_size how many channels are values");
    }
    if (call.n_queries < 0 || (call.n_queries > 0 && (call.q == nullptr || call.out == nullptr))) {
        return invalid("attention: " + std::to_string(call.n_queries) + " queries with q " +
                       (call.q == nullptr ? "null" : "set") + " and out " + (call.out == nullptr ? "null" : "set") +
                       "; both must be set");
    }
    if (!std::isfinite(call.scale) || !std::isfinite(call.softcap) || !std::isfinite(call.max_bias)) {
        return invalid("attention: scale, softcap and max_bias must be finite");
    }
    return {};
}

Status make_plan(const Store& k, const Store& v, const AttentionCall& call, Isa isa, Plan& plan) {
    if (Status s = check_call(k, v, call); !s.ok()) {
        return s;
    }
    const auto& isas = available_isas();
    plan = {};
    plan.kernels = find_kernels(isa);
    if (plan.kernels == nullptr || std::find(isas.begin(), isas.end(), isa) == isas.end()) {
        return {StatusCode::unsupported, "attention: instruction set " + std::string(isa_name(isa)) +
                                             " is not available on this processor; use default_isa()"};
    }
    plan.k = &k.impl();
    plan.v = &v.impl();
    plan.call = &call;
    plan.group = call.n_heads / k.shape().kv_heads;
    plan.entries = call.n_queries * plan.group;

    plan.key_size = k.shape().head_size;
    plan.value_size = call.value_size > 0 ? call.value_size : v.shape().head_size;
    plan.sum_size = plan.value_size;
    plan.keyed_values = v.shape().side == Side::key;
    if (plan.v->book != nullptr) {
        for (const RotationBlock& block : plan.v->rotation.blocks()) {
            if (block.offset < plan.value_size) {
                plan.sum_size = block.offset + block.size;
            }
        }
    }
    plan.value_ld = round_up(plan.sum_size, 16);
    plan.int_keys = plan.kernels->int_scores != nullptr && has_int_kernels(*plan.k, Side::key);
    plan.int_values = plan.kernels->int_values != nullptr && has_int_kernels(*plan.v, Side::value);
    plan.shared_tile = &k == &v && !plan.int_keys;
    plan.key_mean = plan.k->book != nullptr && plan.k->conditioner.has_mean();
    plan.turning_mean = plan.key_mean && plan.k->conditioner.turns();
    plan.turning_values = plan.v->book != nullptr && plan.v->conditioner.turns();
    plan.value_mean = plan.v->book != nullptr && plan.v->conditioner.has_mean() && !plan.turning_values;

    constexpr float kLog2E = 1.44269504088896340736f;
    plan.query_factor = call.softcap > 0 ? call.scale / call.softcap : call.scale * kLog2E;
    plan.softcap_factor = call.softcap > 0 ? call.softcap * kLog2E : 0;

    const int widest = std::max(plan.key_size, plan.value_ld);
    plan.chunk = static_cast<int>(std::clamp<int64_t>(plan.entries, 1, std::clamp(kChunkFloats / widest, 16, 128)));
    if (plan.chunk < plan.entries && plan.chunk > plan.group) {
        plan.chunk -= plan.chunk % plan.group; // whole queries: their masks are read once
    }
    plan.n_chunks = (plan.entries + plan.chunk - 1) / plan.chunk;
    return {};
}

void plan_splits(int64_t most_tiles, int n_workers, Plan& plan) {
    const int64_t base = plan.k->shape.kv_heads * plan.n_chunks;
    const int64_t enough = 4 * n_workers;
    const auto at_most = [&](int64_t least_tiles) { return std::max<int64_t>(1, most_tiles / least_tiles); };
    plan.n_splits = 1;
    // Several tasks a worker, so that one that is held up does not hold up all; as long as a task outweighs its merge
    // and its queries' rotation by far.
    while (plan.n_splits < at_most(kFineSplitTiles) && base * plan.n_splits < enough) {
        ++plan.n_splits;
    }
    // Either an even share for every worker, or parts small enough that uneven shares do not matter.
    while (plan.n_splits < at_most(kMinSplitTiles) && base * plan.n_splits % n_workers != 0 &&
           base * plan.n_splits < enough) {
        ++plan.n_splits;
    }
}

} // namespace turboquant::attention
