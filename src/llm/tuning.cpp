#include "llm/tuning.h"

#include "llm/error.h"
#include "llm/evaluation.h"
#include "llm/plugin.h"
#include "llm/session.h"

#include <algorithm>
#include <chrono>
#include <filesystem>
#include <future>

#include <fmt/format.h>
#include <ggml-backend.h>

namespace turboquant::llm {
namespace {

// How long a user waits at a model's first load. From 64 rows on the statistics serve (docs/quality.md): a machine that is
// so slow that 512 tokens take very long makes do with fewer.
constexpr double kPatience = 8; // seconds
constexpr int64_t kPatienceTokens = 512;
constexpr double kLastPatience = 20;
constexpr int64_t kFewestTokens = 128;
constexpr int64_t kHurriedStep = 128; // tokens between two looks at the clock

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) {
    return std::chrono::duration<double>(Clock::now() - start).count();
}

// The plug-in's side of tuning (src/ggml/tuner.h).
class Tuner {
public:
    Tuner() {
        ggml_backend_reg_t reg = ggml_backend_dev_backend_reg(load_plugin());
        start_ = reinterpret_cast<Start>(ggml_backend_reg_get_proc_address(reg, "turboquant_tune_start"));
        write_ = reinterpret_cast<Write>(ggml_backend_reg_get_proc_address(reg, "turboquant_tune_write"));
        if (start_ == nullptr || write_ == nullptr) {
            throw Error(fmt::format("{}: too old to tune with; rebuild it", find_plugin()));
        }
        if (const char* problem = start_()) {
            throw Error(problem);
        }
    }
    // Ends the collection whatever happened: writing to nowhere does.
    ~Tuner() {
        if (!written_) {
            write_("", "", "");
        }
    }
    Tuner(const Tuner&) = delete;
    Tuner& operator=(const Tuner&) = delete;

    void write(const std::string& path, const std::string& model, const std::string& text) {
        written_ = true;
        if (const char* problem = write_(path.c_str(), model.c_str(), text.c_str())) {
            throw Error(problem);
        }
    }

private:
    using Start = const char* (*)();
    using Write = const char* (*)(const char* path, const char* model, const char* text);
    Start start_ = nullptr;
    Write write_ = nullptr;
    bool written_ = false;
};

bool enough(bool hurry, int64_t tokens, double seconds) {
    return hurry && ((tokens >= kPatienceTokens && seconds >= kPatience) ||
                     (tokens >= kFewestTokens && seconds >= kLastPatience));
}

// The text in chunks that the model can read in one go, spread over all of it.
std::vector<std::vector<Token>> tuning_chunks(const Model& model, std::string_view text, const TuneOptions& options) {
    const std::vector<Token> tokens = model.tokenize(text, false, false);
    const auto there = static_cast<int64_t>(tokens.size());
    const int64_t wanted = std::min(there, options.tokens);
    const int64_t length =
        std::min({wanted, kTuningTokens, static_cast<int64_t>(std::max(1, model.trained_context()))});
    if (there < kLeastTuningTokens) {
        throw Error(fmt::format("{}: has {} tokens, tuning needs {} or more; use a longer text", options.text_name,
                                there, kLeastTuningTokens));
    }
    std::vector<std::vector<Token>> chunks;
    for (const int64_t start : chunk_starts(there, length, wanted / length)) {
        chunks.emplace_back(tokens.begin() + start, tokens.begin() + start + length);
        if (llama_vocab_get_add_bos(model.vocab())) {
            chunks.back().front() = llama_vocab_bos(model.vocab());
        }
    }
    return chunks;
}

Tuned tune_here(const Model& model, const ModelPlan& plan, std::string_view text, const TuneOptions& options) {
    const std::vector<std::vector<Token>> chunks = tuning_chunks(model, text, options);
    const auto length = static_cast<int64_t>(chunks.front().size());
    const int64_t total = length * static_cast<int64_t>(chunks.size());
    const int64_t step = options.hurry ? kHurriedStep : kBatch;
    const CachePlan cache = plan.plan(length);
    if (cache.layers.empty()) {
        throw Error(fmt::format("{}: has no KV cache, so there is nothing to tune", model.path()));
    }
    const Clock::time_point start = Clock::now();
    const TemporaryProfile file;
    Tuned result;
    Tuner tuner;
    SessionOptions session_options;
    session_options.kv = parse_kv("16/16");
    session_options.plan = cache;
    session_options.threads = options.threads;
    session_options.interrupt = options.interrupt;
    Session session(model, session_options);
    while (result.tokens < total && !enough(options.hurry, result.tokens, seconds_since(start))) {
        const std::vector<Token>& chunk = chunks[static_cast<size_t>(result.tokens / length)];
        const int64_t read = std::min(length, result.tokens % length + step);
        if (!session.read({chunk.begin(), chunk.begin() + read}, {})) { // reads what it does not hold yet
            throw Error("stopped by Ctrl-C");
        }
        result.tokens += read - result.tokens % length;
        if (options.progress) {
            options.progress(static_cast<double>(result.tokens) / static_cast<double>(total));
        }
    }
    result.seconds = seconds_since(start);
    tuner.write(file.path(), model.identity(), fmt::format("{}, {} tokens", options.text_name, result.tokens));
    result.profile = load_profile(file.path(), cache);
    return result;
}

} // namespace

// In a thread that ends: OpenMP keeps a pool of threads for each thread that computed, and once all pools together have more
// threads than the machine has cores, waiting threads go to sleep at every barrier. `tq serve` answers from another thread
// than this one's caller: its answers took up to twice as long until the next start.
Tuned tune(const Model& model, const ModelPlan& plan, std::string_view text, const TuneOptions& options) {
    return std::async(std::launch::async, [&] { return tune_here(model, plan, text, options); }).get();
}

std::string keep_profile(const Model& model, const Profile& profile) {
    const std::string path = cached_profile_path(model.path()).string();
    if (const Status status = write_profile(path, profile); !status.ok()) {
        throw Error(status.message());
    }
    return path;
}

std::unique_ptr<TemporaryProfile> prepare_profile(const Model& model, const ModelPlan& plan, const ProfileFlags& flags,
                                                  const TuneOptions& options, KvChoice& kv, const Notice& notice) {
    if (find_profile(model.path(), flags, plan.plan(1), kv, notice)) {
        return nullptr;
    }
    TuneOptions built_in = options;
    built_in.text_name = kBuiltInText;
    const Tuned tuned = tune(model, plan, calibration_text(), built_in);
    const std::string how =
        fmt::format("first load of {}: keys measured on {} tokens in {:.1f} s",
                    std::filesystem::path(model.path()).filename().string(), format_count(tuned.tokens), tuned.seconds);
    std::string why;
    try {
        const std::string path = keep_profile(model, tuned.profile);
        notice(fmt::format("{}; profile {}", how, path));
        use_profile(path, tuned.profile, kv);
        return nullptr;
    } catch (const Error& error) {
        why = error.what();
    }
    auto file = std::make_unique<TemporaryProfile>();
    if (const Status status = write_profile(file->path(), tuned.profile); !status.ok()) {
        throw Error(status.message());
    }
    notice(fmt::format("{}; the profile is not kept: {}", how, why));
    use_profile(file->path(), tuned.profile, kv);
    return file;
}

} // namespace turboquant::llm
