#include "llm/model.h"

#include "llm/error.h"
#include "llm/log.h"
#include "llm/plugin.h"

#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <limits>

#include <fmt/format.h>

namespace turboquant::llm {

std::string describe_model(const llama_model* model) {
    char architecture[64] = {};
    if (llama_model_meta_val_str(model, "general.architecture", architecture, sizeof architecture) < 0) {
        architecture[0] = '\0';
    }
    const auto parameters = static_cast<double>(llama_model_n_params(model));
    const char* unit = parameters >= 1e9 ? "B" : parameters >= 1e6 ? "M" : "K";
    const double value = parameters / (parameters >= 1e9 ? 1e9 : parameters >= 1e6 ? 1e6 : 1e3);
    return fmt::format("{} {:.{}f}{} {}", architecture, value, value < 10 ? 1 : 0, unit,
                       llama_ftype_name(llama_model_ftype(model)));
}

std::string resolve_model_path(const std::string& given) {
    if (!given.empty()) {
        return given;
    }
    if (const char* path = std::getenv("TURBOQUANT_MODEL"); path != nullptr && *path != '\0') {
        return path;
    }
#ifdef TURBOQUANT_DEFAULT_MODEL
    if (*TURBOQUANT_DEFAULT_MODEL != '\0') {
        return TURBOQUANT_DEFAULT_MODEL;
    }
#endif
    throw UsageError("no model: give one with -m FILE.gguf or set TURBOQUANT_MODEL");
}

void check_model_file(const std::string& path) {
    std::error_code failed;
    const auto status = std::filesystem::status(path, failed);
    if (!std::filesystem::exists(status)) {
        throw Error(fmt::format("{}: no such model file; check the path given with -m", path));
    }
    if (!std::filesystem::is_regular_file(status)) {
        throw Error(fmt::format("{}: not a file; -m takes a GGUF file", path));
    }
    std::ifstream file(path, std::ios::binary);
    if (!file) {
        throw Error(fmt::format("{}: cannot be opened: {}; check its permissions", path, std::strerror(errno)));
    }
    char magic[4] = {};
    file.read(magic, sizeof magic);
    if (file.gcount() != sizeof magic || std::memcmp(magic, "GGUF", sizeof magic) != 0) {
        throw Error(fmt::format("{}: not a GGUF file; -m takes a model in GGUF format", path));
    }
}

Model Model::load(const std::string& path, bool turboquant, const Progress& progress) {
    check_model_file(path);
    llama_model_params params = llama_model_default_params();
    ggml_backend_dev_t devices[2] = {nullptr, nullptr};
    params.n_gpu_layers = 0;
    if (turboquant) {
        devices[0] = load_plugin();
        params.n_gpu_layers = 999;
    }
    params.devices = devices;
    params.progress_callback = [](float fraction, void* user) {
        const auto& report = *static_cast<const Progress*>(user);
        if (report) {
            report(fraction);
        }
        return true;
    };
    params.progress_callback_user_data = const_cast<Progress*>(&progress);
    const LogCapture log;
    Model model;
    model.handle_.reset(llama_model_load_from_file(path.c_str(), params));
    if (!model.handle_) {
        throw Error(fmt::format("{}: cannot be loaded: {}; check that the file is complete and that this libllama "
                                "knows its architecture",
                                path, log.reason("libllama gave no reason")));
    }
    model.path_ = path;
    model.turboquant_ = turboquant;
    return model;
}

std::string Model::identity() const {
    return fmt::format("{}, {} parameters, {} bytes, {} tokens", describe_model(get()), llama_model_n_params(get()),
                       llama_model_size(get()), llama_vocab_n_tokens(vocab()));
}

std::string Model::metadata(const char* key) const {
    const int32_t length = llama_model_meta_val_str(get(), key, nullptr, 0);
    if (length < 0) {
        return {};
    }
    std::string value(static_cast<size_t>(length) + 1, '\0');
    llama_model_meta_val_str(get(), key, value.data(), value.size());
    value.resize(static_cast<size_t>(length));
    return value;
}

std::vector<Token> Model::tokenize(std::string_view text, bool with_special_start, bool parse_special) const {
    if (llama_vocab_type(vocab()) == LLAMA_VOCAB_TYPE_NONE) {
        throw Error(fmt::format("{}: has no vocabulary, so it cannot read text; use another model", path_));
    }
    if (text.size() > static_cast<size_t>(std::numeric_limits<int32_t>::max())) {
        throw Error(fmt::format("the prompt has {} bytes; shorten it to below 2 GiB", text.size()));
    }
    const auto bytes = static_cast<int32_t>(text.size());
    std::vector<Token> tokens(text.size() + 8);
    int32_t n = llama_tokenize(vocab(), text.data(), bytes, tokens.data(), static_cast<int32_t>(tokens.size()),
                               with_special_start, parse_special);
    if (n < 0 && n != std::numeric_limits<int32_t>::min()) {
        tokens.resize(static_cast<size_t>(-n));
        n = llama_tokenize(vocab(), text.data(), bytes, tokens.data(), static_cast<int32_t>(tokens.size()),
                           with_special_start, parse_special);
    }
    if (n < 0) {
        throw Error("the prompt cannot be turned into tokens; shorten it");
    }
    tokens.resize(static_cast<size_t>(n));
    return tokens;
}

std::string Model::piece(Token token, bool special) const {
    std::string text(32, '\0');
    int32_t n = llama_token_to_piece(vocab(), token, text.data(), static_cast<int32_t>(text.size()), 0, special);
    if (n < 0) {
        text.resize(static_cast<size_t>(-n));
        n = llama_token_to_piece(vocab(), token, text.data(), static_cast<int32_t>(text.size()), 0, special);
    }
    text.resize(static_cast<size_t>(n < 0 ? 0 : n));
    return text;
}

int64_t common_prefix(std::span<const Token> a, std::span<const Token> b) {
    const auto end = a.begin() + static_cast<std::ptrdiff_t>(std::min(a.size(), b.size()));
    return std::mismatch(a.begin(), end, b.begin()).first - a.begin();
}

} // namespace turboquant::llm
