// One timeline of tokens and its KV cache. RAII over llama_context (sequence 0 of it). Not thread-safe.
#pragma once

#include "llm/context.h"
#include "llm/kv_choice.h"
#include "llm/model.h"
#include "llm/plan.h"
#include "llm/sampling.h"

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

namespace turboquant::llm {

struct SessionOptions {
    KvChoice kv;
    CachePlan plan;                               // of the context wanted: its length and the head sizes
    int threads = 0;                              // 0: default_threads()
    bool full_cache = false;                      // sliding layers keep all rows, so that going back is exact
    const std::atomic<bool>* interrupt = nullptr; // becomes true: stop what is running. Must outlive the session.
};

enum class Stop { end, limit, context, interrupted };
const char* stop_name(Stop stop);

struct Stats {
    int64_t prompt_tokens = 0; // of the whole prompt
    int64_t read_tokens = 0;   // of it, not in the cache before
    double read_seconds = 0;
    int64_t answer_tokens = 0;
    double answer_seconds = 0; // from the first token to the last
    double first_token_seconds = 0;
    int64_t context_used = 0;
    int64_t context_size = 0;
    int64_t kv_bytes = 0;     // as allocated (libllama's log)
    int64_t kv_f16_bytes = 0; // the same cells in f16

    double read_speed() const { return read_seconds > 0 ? static_cast<double>(read_tokens) / read_seconds : 0; }
    double answer_speed() const {
        return answer_seconds > 0 ? static_cast<double>(answer_tokens - 1) / answer_seconds : 0;
    }
};

struct Answer {
    std::string text; // whole characters
    Stop stop = Stop::end;
    std::vector<Token> undecoded; // chosen and part of the text, but not yet in the cache (at most one)
    Stats stats;
};

class Session {
public:
    // Error in one line when libllama or the plug-in refuses. The model must outlive the session.
    Session(const Model& model, const SessionOptions& options);
    ~Session();
    Session(const Session&) = delete;
    Session& operator=(const Session&) = delete;

    const Model& model() const { return model_; }
    const KvChoice& kv() const { return options_.kv; }
    int64_t context_size() const;
    const std::vector<Token>& cached() const { return cached_; } // the tokens that are in the cache, in order
    int64_t kv_bytes() const { return context_.kv_bytes; }
    int64_t kv_f16_bytes() const { return context_.kv_f16_bytes; }

    // Brings the cache to exactly `tokens`, reading only what it does not hold yet (at least the last one, whose scores
    // the next generate() needs; where the cache went further, the rows that were exact there too). 1 <= size <= context_size(), else Error with the numbers. False: interrupted, the
    // cache then holds what had been read. progress: fraction of the tokens that had to be read.
    bool read(const std::vector<Token>& tokens, const Progress& progress);

    // As read(), and gives the model's scores (logits) after each of the positions `wanted` (ascending, below size; not
    // empty), which are read again where the cache holds them. They come in batches: row i of `logits` (vocabulary
    // floats each, valid during the call) belongs to wanted[first + i].
    using OnScores = std::function<void(size_t first, size_t n, const float* logits)>;
    bool score(const std::vector<Token>& tokens, const std::vector<int64_t>& wanted, const OnScores& on_scores,
               const Progress& progress);

    // Chooses tokens until the model ends its answer, `limit` of them (< 0: no limit) or the context is full; then
    // on_full may make room (true: go on). on_text gets whole characters as they come. Only after read().
    Answer generate(llama_sampler* sampler, int64_t limit, const std::function<void(const std::string&)>& on_text,
                    const std::function<bool()>& on_full);

    // Whether shift() works on this model.
    bool can_shift() const;
    // Forgets the tokens [keep, keep + discard) and moves the later ones down. False (and nothing changed): cannot.
    bool shift(int64_t keep, int64_t discard);

    void clear();

    // The cache's contents as bytes, and back. restore: false (cache then empty) when they do not fit this cache.
    std::vector<uint8_t> state() const;
    bool restore(const std::vector<uint8_t>& state, const std::vector<Token>& tokens);

private:
    bool interrupted() const;
    int decode(const Token* tokens, int64_t n, int8_t* outputs = nullptr);
    int64_t keep_common(const std::vector<Token>& tokens, int64_t most);
    bool read_from(const std::vector<Token>& tokens, int64_t most, const std::vector<int64_t>& wanted,
                   const OnScores& on_scores, const Progress& progress);

    const Model& model_;
    SessionOptions options_;
    Context context_;
    std::vector<Token> cached_;
    int64_t read_from_us_ = 0; // when the current question came
    Stats stats_;
};

} // namespace turboquant::llm
