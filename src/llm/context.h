// A llama_context with the cache that was chosen: what a session and a server's engine both start from.
#pragma once

#include "llm/kv_choice.h"
#include "llm/model.h"
#include "llm/plan.h"

#include <cstdint>
#include <memory>

namespace turboquant::llm {

constexpr int64_t kBatch = 512; // tokens a call of libllama: progress and Ctrl-C come in between

struct ContextOptions {
    KvChoice kv;
    CachePlan plan;          // of one sequence: its length and the head sizes
    int sequences = 1;       // each with a cache of its own, plan.context tokens long
    int64_t batch = kBatch;  // most tokens of a call of llama_decode
    int threads = 0;         // 0: default_threads()
    bool full_cache = false; // sliding layers keep all rows, so that going back is exact
    ggml_abort_callback abort = nullptr;
    void* abort_data = nullptr;
};

// Frees a context, then the threads that were attached to it.
class ContextDeleter {
public:
    ContextDeleter() = default;
    explicit ContextDeleter(ggml_threadpool_t threads) : threads_(threads) {}
    void operator()(llama_context* context) const;

private:
    ggml_threadpool_t threads_ = nullptr;
};
using ContextHandle = std::unique_ptr<llama_context, ContextDeleter>;

// llama_init_from_model() and threads of the context's own (params.n_threads of them). Without these the host makes and
// frees a pool for every part of every graph, and the plug-in makes parts of two a layer. Null where libllama refuses.
ContextHandle new_context(llama_model* model, const llama_context_params& params);

struct Context {
    ContextHandle handle;
    int64_t kv_bytes = 0;     // as allocated (libllama's log), all sequences together
    int64_t kv_f16_bytes = 0; // the same cells in f16
    int64_t exact_rows = 0;   // latest rows of a sequence that are exact while earlier ones are codes
    int64_t window = 0;       // of sliding layers, beyond which they forget; 0: none, or they keep all rows

    // Cuts a sequence of `size` tokens to its first `keep` (< size), or to fewer, so that the next `exact_rows` tokens are written
    // again: how many it holds now. 0: nothing is kept, or the memory cannot go back that far (recurrent state, sliding layers
    // that have forgotten); the sequence is then good for nothing but to be cleared.
    int64_t cut(llama_seq_id sequence, int64_t size, int64_t keep) const;
};

// Error in one line when libllama or the plug-in refuses, or the model does not write text. The model must outlive the
// context. Not thread-safe (environment, log).
Context make_context(const Model& model, const ContextOptions& options);

} // namespace turboquant::llm
