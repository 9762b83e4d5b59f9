// A host for the plug-in's tests: loads models and decodes tokens through libllama's public API only, either stock (the
// CPU's f16 cache) or with the plug-in's device. Paths come from the environment, which ctest sets (tests/plugin.cmake):
//
//   TQ_TEST_PLUGIN    libggml-turboquant.so          TQ_TEST_TINY      folder of models from tests/models/make_models.py
//   TQ_TEST_SMOLLM2   SmolLM2-135M-Instruct GGUF     TQ_TEST_CHILD     the plugin_child program
//   TQ_TEST_GEMMA     Gemma-3-270M GGUF              TQ_TEST_PYTHON    Python with gguf and llama-cpp-python
//   TQ_TEST_CACHE     folder for files that tests derive from models
#pragma once

#include "llama.h"

#include <gtest/gtest.h>

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace tqtest {

// The variable's value; empty if unset.
std::string environment(const char* name);

// What the plug-in stores. Applied to the TURBOQUANT_* variables when a context is created.
struct Cache {
    std::string kv = "16/16"; // pass-through
    int window = 0;
    int sinks = 0;
    int sink_sequences = 8;
    bool calibrate = true;
    std::string profile = {}; // path; empty: none
};
void set_cache(const Cache& cache);

// The lines of ours that the host logs while this lives. One at a time.
class LogCapture {
public:
    LogCapture();
    ~LogCapture();
    LogCapture(const LogCapture&) = delete;
    LogCapture& operator=(const LogCapture&) = delete;
    // Lines with all the words.
    int count(const std::vector<std::string>& words) const;
    const std::vector<std::string>& lines() const { return lines_; }
    void add(const char* text);

private:
    std::vector<std::string> lines_;
};

// Loads the plug-in into this process once and gives its device; null (and a test failure) if that does not work.
ggml_backend_dev_t plugin_device();

enum class Host { stock, plugin };

struct ModelFree {
    void operator()(llama_model* model) const { llama_model_free(model); }
};
struct ContextFree {
    void operator()(llama_context* context) const { llama_free(context); }
};
using Model = std::unique_ptr<llama_model, ModelFree>;
using Context = std::unique_ptr<llama_context, ContextFree>;

// Null if the host refused.
Model load_model(const std::string& path, Host host, bool no_alloc = false);
Model load_tiny(const std::string& name, Host host);

struct Shape {
    uint32_t n_ctx = 512;
    uint32_t n_ubatch = 256;
    uint32_t n_seq_max = 1;
    bool unified = false;
    bool swa_full = true;
    ggml_type type = GGML_TYPE_F16;
    int threads = 1; // spinning threads cost more than they give on tiny models
};

// Null if the host refused. `cache` does not matter for a stock model.
Context make_context(llama_model* model, const Shape& shape, const Cache& cache);

using Tokens = std::vector<llama_token>;
// Reproducible tokens in [0, vocabulary).
Tokens random_tokens(int n, int vocabulary, uint32_t seed);
Tokens tokenize(const llama_model* model, const std::string& text, bool special);
std::string text_of(const llama_model* model, const Tokens& tokens);
int vocabulary_of(const llama_model* model);

// [token][vocabulary]
using Logits = std::vector<float>;

struct Feed {
    llama_seq_id sequence = 0;
    llama_pos begin = 0; // position of the first token
    int chunk = 0;       // tokens a call of llama_decode; 0: all
};
// Decodes tokens and returns the logits after each of them. A failed decode: empty.
Logits decode(llama_context* context, const Tokens& tokens, const Feed& feed = {});

// Decodes several sequences together, `per_sequence` tokens of each in every batch. Result: logits of each.
std::vector<Logits> decode_together(llama_context* context, const std::vector<Tokens>& sequences, int per_sequence);

// Greedy continuation: decodes `prompt` (logits of its last token), then up to n tokens; stops at an end token.
Tokens generate(llama_context* context, const Tokens& prompt, int n, const Feed& feed = {});

struct Difference {
    double relative = 0; // rms(a - b) / rms(b - mean of its row), over everything
    double mean_kld = 0; // of softmax(b) against softmax(a)
    double max_kld = 0;
    double same_top = 0; // share of positions with the same most likely token
};
Difference compare(const Logits& a, const Logits& reference, int vocabulary);
bool all_finite(const Logits& logits);

// A sequence's state as llama_state_seq_get_data gives it.
std::vector<uint8_t> sequence_state(llama_context* context, llama_seq_id sequence);
bool restore_sequence(llama_context* context, llama_seq_id sequence, const std::vector<uint8_t>& state);
std::vector<uint8_t> whole_state(llama_context* context);

// Where a layer's rows lie in such a state (plain KV caches of one stream; not sliding-window or hybrid models).
struct StateRows {
    size_t offset = 0;
    size_t row_bytes = 0;
};
struct StateMap {
    std::vector<llama_pos> positions; // of row i
    std::vector<StateRows> keys;      // per layer
    std::vector<StateRows> values;
};
// False (and a test failure) if the state is not laid out like that.
bool map_state(const std::vector<uint8_t>& state, StateMap& map);

// Runs a program with extra environment "NAME=value" ("NAME" alone unsets it) and returns when it has ended, or was
// killed after `seconds`. `status` is its exit code, or minus the signal that ended it.
struct Outcome {
    int status = 0;
    std::string out; // stdout
    std::string err; // stderr
};
Outcome run_program(const std::vector<std::string>& command, const std::vector<std::string>& environment, int seconds);

} // namespace tqtest

// Skips the test when a model or tool is not there.
#define TQ_REQUIRE_ENVIRONMENT(name)                                                                                   \
    do {                                                                                                               \
        if (tqtest::environment(name).empty()) {                                                                       \
            GTEST_SKIP() << name " is not set: see tests/plugin.cmake";                                                \
        }                                                                                                              \
    } while (false)
