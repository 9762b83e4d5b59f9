// A model file, its vocabulary and its tokens. RAII over llama_model.
#pragma once

#include "llm/kv_choice.h"

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include <llama.h>

namespace turboquant::llm {

using Token = llama_token;
// How many tokens both begin with.
int64_t common_prefix(std::span<const Token> a, std::span<const Token> b);
// Fraction done, 0..1.
using Progress = std::function<void(double)>;

struct ModelDeleter {
    void operator()(llama_model* model) const { llama_model_free(model); }
};
using ModelHandle = std::unique_ptr<llama_model, ModelDeleter>;

// "llama 135M Q4_1": architecture, parameters, type of the weights.
std::string describe_model(const llama_model* model);

// --model, else TURBOQUANT_MODEL, else the model that set-up installed. UsageError if there is none.
std::string resolve_model_path(const std::string& given);

// Throws Error unless `path` is a readable file that starts like a GGUF: one line, before libllama writes five.
void check_model_file(const std::string& path);

class Model {
public:
    // turboquant: all layers' caches go to the plug-in's device (loaded here); weights stay with the CPU either way.
    static Model load(const std::string& path, bool turboquant, const Progress& progress);

    llama_model* get() const { return handle_.get(); }
    const llama_vocab* vocab() const { return llama_model_get_vocab(handle_.get()); }
    const std::string& path() const { return path_; }
    bool turboquant() const { return turboquant_; }
    int trained_context() const { return llama_model_n_ctx_train(handle_.get()); }
    // Architecture, type, parameters, bytes and vocabulary in words; equal for equal models.
    std::string identity() const;
    // A scalar of the GGUF's metadata, as text; empty if absent.
    std::string metadata(const char* key) const;

    // Error when the model has no vocabulary that text could be turned into.
    // parse_special: "<|im_end|>" and the like become the control tokens that they name, else they stay text.
    std::vector<Token> tokenize(std::string_view text, bool with_special_start, bool parse_special = true) const;
    // Bytes of one token; control tokens are empty, unless `special` asks for their names. Not necessarily whole characters.
    std::string piece(Token token, bool special = false) const;
    int vocabulary() const { return llama_vocab_n_tokens(vocab()); }
    bool ends_answer(Token token) const { return llama_vocab_is_eog(vocab(), token); }

private:
    ModelHandle handle_;
    std::string path_;
    bool turboquant_ = false;
};

} // namespace turboquant::llm
