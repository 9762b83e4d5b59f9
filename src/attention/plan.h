// How one attention call is cut into tasks, and what each task needs to know. Internal: not installed.
//
// Per KV head the query heads of its group and the queries form one list: entry m is head m % group of query
// m / group. A task is (KV head, chunk of that list, range of the tiles that the chunk sees); the parts of one entry that
// different ranges found are merged in order afterwards.
#pragma once

#include "attention/exact_rows.h"
#include "attention/kernels.h"
#include "cache/store_impl.h"
#include "turboquant/attention.h"

#include <cstdint>

namespace turboquant::attention {

struct Plan {
    const Kernels* kernels = nullptr;
    const Store::Impl* k = nullptr;
    const Store::Impl* v = nullptr;
    const AttentionCall* call = nullptr;

    int group = 0;       // query heads a KV head
    int64_t entries = 0; // n_queries * group
    int chunk = 0;       // entries a task
    int64_t n_chunks = 0;
    int64_t n_splits = 1; // ranges of a chunk's visible tiles

    int key_size = 0;
    int value_size = 0;    // channels given out
    int sum_size = 0;      // channels summed: value_size, or up to its rotation block's end
    int value_ld = 0;      // sum_size rounded up to 16
    bool int_keys = false; // integer kernels serve the side
    bool int_values = false;
    bool keyed_values = false;   // v is a key store (MLA)
    bool shared_tile = false;    // the key tile unpacked for the scores serves the values
    bool key_mean = false;       // k has a mean
    bool turning_mean = false;   // it depends on the position block
    bool value_mean = false;     // v has a mean, the same for all rows
    bool turning_values = false; // v is a key store whose mean depends on the position block

    // Scores are kept in log2 units. score = query_factor * <q, k>, then softcap_factor * tanh if that is > 0.
    float query_factor = 0;
    float softcap_factor = 0;

    int64_t tasks() const { return k->shape.kv_heads * n_chunks * n_splits; }
};

// Checks the call and fills the plan, all but n_splits. Errors name shapes.
Status make_plan(const Store& k, const Store& v, const AttentionCall& call, Isa isa, Plan& plan);
// n_splits for chunks of at most `most_tiles` visible tiles.
void plan_splits(int64_t most_tiles, int n_workers, Plan& plan);
// The checks alone.
Status check_call(const Store& k, const Store& v, const AttentionCall& call);

// ALiBi: what the mask is multiplied by for a head. Head h of n gets 2^(-max_bias (h+1)/n) for n a power of two;
// otherwise the heads behind the largest power of two take the odd steps of twice as fine a ladder (Press et al.,
// arXiv 2108.12409, appendix A; ggml's flash_attn_ext does the same). 1 without ALiBi.
float alibi_slope(int head, int n_heads, float max_bias);

} // namespace turboquant::attention
