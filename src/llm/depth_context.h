// A context brought to a depth, for measuring how fast it decodes and reads prompts there. RAII over llama_context.
//
// A deep cache is expensive to reach: reading a prompt of 32K tokens takes minutes on a few cores. So a piece (the tile) is
// read, and its state restored as often as the depth needs; all copies then belong to sequence 0. Its cells' positions
// repeat, and what is decoded next stands behind the first tile's; it attends to all of them, which is what its speed
// depends on. The tokens are random: the speed of these models does not depend on them.
#pragma once

#include "llm/context.h"
#include "llm/kv_choice.h"
#include "llm/model.h"

#include <atomic>
#include <cstdint>
#include <memory>
#include <random>
#include <string>
#include <vector>

namespace turboquant::llm {

struct DepthOptions {
    KvChoice kv;
    std::string head_size; // shared_head_size() of the plan
    int64_t capacity = 0;  // cells: the deepest depth and what is measured there
    int64_t tile = 2048;   // tokens; 0: all of every depth is read
    int threads = 0;       // 0: default_threads()
    const std::atomic<bool>* interrupt = nullptr;
};

class DepthContext {
public:
    // Error in one line when libllama or the plug-in refuses. The model must outlive the object.
    DepthContext(const Model& model, const DepthOptions& options);
    ~DepthContext();
    DepthContext(const DepthContext&) = delete;
    DepthContext& operator=(const DepthContext&) = delete;

    // Whether tiles say what reading would: not where layers slide or are recurrent, whose state is no longer for more tokens.
    static bool can_tile(const Model& model);

    // Brings sequence 0 to `depth` cells, at most the capacity. Depths below the one it is at start from nothing. Error: the
    // state cannot be restored, sequence 0 does not hold all the copies, "stopped by Ctrl-C".
    void fill(int64_t depth, const Progress& progress);
    int64_t depth() const { return depth_; }
    int64_t copies() const { return copies_; } // tiles of which all but one are restored; at most 1: all of it was read

    // Seconds for n tokens one after the other, scores of each computed, and for n tokens as one prompt. Both begin at the
    // depth that fill() made and leave it so.
    double decode(int64_t n);
    double read(int64_t n);
    // The scores after one more token, which is then taken back. Borrowed until the next call.
    const float* scores(Token token);

    int threads() const { return threads_; }
    llama_context* get() const { return ctx_.get(); }

private:
    void append(int64_t n, int64_t batch, const Progress& progress);
    void take_back();
    void save();
    void restore_tile();
    std::vector<Token> random_tokens(int64_t n);
    int decode_tokens(std::vector<Token>& tokens);

    const Model& model_;
    DepthOptions options_;
    int threads_ = 0;
    ContextHandle ctx_;
    std::mt19937 random_{1};
    std::vector<uint8_t> tile_;  // state of one
    std::vector<uint8_t> saved_; // state at the depth, where rows cannot be taken back
    int64_t depth_ = 0;
    int64_t copies_ = 0;
    llama_pos end_ = 0; // the next position of sequence 0
};

} // namespace turboquant::llm
