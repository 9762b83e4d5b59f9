// The operations on compressed KV tensors: writing rows, attention, and the turning of keys when a context is shifted.
#pragma once

#include "kv_buffer.h"
#include "rope.h"

#include "turboquant/attention.h"
#include "turboquant/status.h"

#include <vector>

namespace turboquant::plugin {

// What one back end (one context) keeps between operations. Not shared, not thread-safe: ggml computes one graph of a
// back end at a time.
class OpContext {
public:
    OpContext() = default;
    ~OpContext();
    OpContext(const OpContext&) = delete;
    OpContext& operator=(const OpContext&) = delete;

    void set_threads(int n) { n_threads_ = n < 1 ? 1 : n; }

    // SET_ROWS into a KV tensor: rows fp32 or fp16, indices i64 or i32, flat over streams.
    Status set_rows(const ggml_tensor* op);
    // FLASH_ATTN_EXT over KV tensors.
    Status flash_attention(const ggml_tensor* op);
    // ROPE in place on a key tensor: rows whose shift is 0 keep every bit.
    Status rope(const ggml_tensor* op);

private:
    // The rows that a SET_ROWS wrote to one stream of a tensor: the batch its attention is about to ask for.
    struct Batch {
        const Store* store = nullptr;
        std::vector<int64_t> cells;
        Staging staging;
        bool staged = false;
        // Of keys, while statistics of them are collected: the rows as they came, and their positions.
        std::vector<float> keys;
        std::vector<int32_t> positions;
    };
    // Neighbouring rows of a SET_ROWS that go to one stream.
    struct Run {
        int64_t stream = 0;
        int64_t begin = 0;
        int64_t end = 0;
        Batch* batch = nullptr;
        bool first_visit = false;
        Status status;
    };
    // Finds the runs of n rows; cells_[i]: row i's cell in its stream.
    Status find_runs(const ggml_tensor* indices, int64_t n, KvTensor& tensor);
    std::vector<Batch>& batches(Side side) { return batches_[side == Side::key ? 0 : 1]; }
    Status learn_rope(KvBuffer& buffer, KvTensor& tensor, const RopeTrace& trace);
    // Of the rows that a key tensor is about to get; null if unknown.
    const int32_t* batch_positions(const KvTensor& tensor, const RopeTrace& trace, int64_t n);
    // Statistics of the keys that this attention's batch has written and of its queries; conditions the stores when the
    // key tensor's source is complete.
    Status observe(const ggml_tensor* op, KvBuffer& buffer, KvTensor& tensor, int64_t first_stream);
    Batch* find_batch(Side side, int64_t stream, const Store* store, int64_t n_queries);
    Status pin_first_rows(const ggml_tensor* mask, int64_t stream_in_batch, int64_t n_queries, int64_t n_rows, Store& k,
                          Store* v, Batch* k_batch, Batch* v_batch, int sinks);
    ggml_backend_t cpu();
    ParallelFor parallel() const;

    int n_threads_ = 1;
    std::vector<Batch> batches_[2];
    AttentionWorkspace workspace_;
    std::vector<float> rows_;
    std::vector<int64_t> cells_;
    std::vector<Run> runs_;
    std::vector<AttentionJob> jobs_;
    RopeTrace trace_;
    std::vector<int32_t> signature_;
    ggml_backend_t cpu_ = nullptr;
    // Inputs of a graph are overwritten after their last use in it, so positions are read at the first key tensor that
    // an evaluation writes, and kept for the others. A tensor written again is a new evaluation.
    std::vector<const KvTensor*> written_;
    const ggml_tensor* positions_tensor_ = nullptr;
    std::vector<int32_t> positions_;
};

// Can this operation run here? It touches no KV tensor of ours: false (views: true). It does: true, or throws
// std::runtime_error with a sentence for the user, because answering "no" would make the host abort. Learns head
// sizes. Thread-safe.
bool supports_op(const ggml_tensor* op);

} // namespace turboquant::plugin
