// Attention over compressed stores: out = softmax(scale * q K^T + mask) V, with the codes attended to as they are.
// The query is rotated once, values are summed in the rotated basis, the sum is rotated back once.
#pragma once

#include "turboquant/isa.h"
#include "turboquant/parallel.h"
#include "turboquant/status.h"
#include "turboquant/store.h"

#include <cstdint>
#include <memory>
#include <span>

namespace turboquant {

// Rows [begin, end) of a call.
struct RowRange {
    int64_t begin = 0;
    int64_t end = 0;
};

// A row that the caller keeps exact, outside of the stores: fp16 [kv_head][channel] each.
struct GivenRow {
    int64_t row = 0;
    const uint16_t* key = nullptr;
    const uint16_t* value = nullptr;
};

// One attention call. Strides are in elements. Pointers are borrowed for the call.
struct AttentionCall {
    const float* q = nullptr; // (query i, head h, channel c) at q[i*q_query_stride + h*q_head_stride + c]
    int64_t q_query_stride = 0;
    int64_t q_head_stride = 0;
    int64_t n_queries = 0; // 1 for decoding, hundreds for a prompt
    int n_heads = 0;       // a multiple of the stores' kv_heads; head h asks KV head h / (n_heads / kv_heads)

    int64_t n_rows = 0; // rows [0, n_rows) are attended to, less what the mask hides. Hide rows never written:
                        // they count as zero codes, that is zeros, or mu where there is one
    const uint16_t* mask = nullptr; // fp16, added to the scores; (query i, row r) at mask[i*mask_query_stride + r];
    int64_t mask_query_stride = 0;  // -inf hides. Null: every row is seen.

    // What query i sees at most, besides the mask: rows ranges[i], cut to [0, n_rows). Null: every row.
    const RowRange* ranges = nullptr;

    // Stores whose tiles are handed out as pages: row r of this call (in n_rows, mask, ranges and given) is row r % 64 of
    // the stores' tile tiles[r / 64]. Null: rows are where they are called. With tiles, n_rows may exceed the stores' rows
    // (a tile may come twice), and the stores must not keep exact rows of their own.
    const int32_t* tiles = nullptr;

    // Exact rows for stores that keep none (window and sink slots 0), ascending by row, each once. A given row is exact
    // for query i if it is among the first `given_sinks`, or the latest `given_window` before ranges[i].end (which must be
    // set); otherwise its codes count.
    const GivenRow* given = nullptr;
    int64_t n_given = 0;
    int64_t given_sinks = 0;
    int64_t given_window = 0;

    float scale = 1;
    float softcap = 0;  // > 0: score = softcap * tanh(score / softcap), before the mask
    float max_bias = 0; // > 0: ALiBi; the mask is multiplied by the head's slope
    const float* sink_logits =
        nullptr; // [n_heads] or null: one more logit a head that takes probability, gives nothing

    float* out = nullptr; // (query i, head h, channel c) at out[i*out_query_stride + h*out_head_stride + c]
    int64_t out_query_stride = 0;
    int64_t out_head_stride = 0;

    // The batch that these queries belong to: query i's own row is staging entry batch_begin + staging_offset + i. A
    // row is then exact for a query if it is pinned, or among the `window` latest written up to the query's own row.
    // Null, not this store's, or older than its last write: the rows that are exact in the store are exact for every
    // query.
    const Staging* k_staging = nullptr;
    const Staging* v_staging = nullptr;
    int64_t staging_offset = 0;

    // MLA: values are the first `value_size` channels of the key rows (pass the key store as v). 0: v's head size.
    int value_size = 0;
};

// Scratch memory of attend(): grows to what the calls need and is then reused, so that nothing is allocated per token.
// Not thread-safe: one per caller.
class AttentionWorkspace {
public:
    AttentionWorkspace();
    ~AttentionWorkspace();
    AttentionWorkspace(const AttentionWorkspace&) = delete;
    AttentionWorkspace& operator=(const AttentionWorkspace&) = delete;
    struct Impl;
    Impl& impl() { return *impl_; }

private:
    std::unique_ptr<Impl> impl_;
};

// Error against exact attention over the decoded rows: some 1e-6 of the output on the portable path, below 5e-4 where
// integer kernels serve (avx2, avx512), whose queries and probabilities have 16 bits. That holds while scale * |q / lambda|
// |lambda (k - mu)| stays below 4 sqrt(head size), and grows with it: scores of 30 to 45 at head sizes 64 to 128.
// k and v: same rows and kv_heads. A query that sees no row gets zeros (with sink logits too). Deterministic for the
// same inputs, instruction set and number of workers. Errors name the shapes. Reads the stores only.
Status attend(const Store& k, const Store& v, const AttentionCall& call, AttentionWorkspace& workspace,
              const ParallelFor& parallel, Isa isa);

// One of several calls that are made together. The stores are borrowed, as the call's pointers are.
struct AttentionJob {
    const Store* keys = nullptr;
    const Store* values = nullptr;
    AttentionCall call;
};

// attend() of each job, to the last bit, but the work of all is shared out together: for the sequences of a batch, whose
// single queries are too little for all threads. Outputs must not overlap; stores may be the same. Errors are one job's; all
// outputs are undefined then.
Status attend_all(std::span<const AttentionJob> jobs, AttentionWorkspace& workspace, const ParallelFor& parallel,
                  Isa isa);

// The plain version that all others are tested against: one row after the other in double precision, no threads.
Status attend_reference(const Store& k, const Store& v, const AttentionCall& call);

} // namespace turboquant
