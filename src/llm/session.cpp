#include "llm/session.h"

#include "llm/error.h"
#include "llm/log.h"
#include "llm/utf8.h"

#include <algorithm>

#include <fmt/format.h>

namespace turboquant::llm {
namespace {

double seconds_since(int64_t start_us) {
    return static_cast<double>(llama_time_us() - start_us) * 1e-6;
}

} // namespace

const char* stop_name(Stop stop) {
    switch (stop) {
    case Stop::end: return "end";
    case Stop::limit: return "limit";
    case Stop::context: return "context";
    case Stop::interrupted: return "interrupted";
    }
    return "";
}

Session::Session(const Model& model, const SessionOptions& options) : model_(model), options_(options) {
    context_ = make_context(model, {.kv = options_.kv,
                                    .plan = options_.plan,
                                    .batch = kBatch,
                                    .threads = options_.threads,
                                    .full_cache = options_.full_cache,
                                    .abort = [](void* self) { return static_cast<Session*>(self)->interrupted(); },
                                    .abort_data = this});
}

Session::~Session() = default;

int64_t Session::context_size() const {
    return llama_n_ctx(context_.handle.get());
}

bool Session::interrupted() const {
    return options_.interrupt != nullptr && options_.interrupt->load();
}

// 0: done. 2: interrupted. 1: no room. The mirror of the cache follows whatever was kept. Error on failure.
// outputs: for each token whether its scores are wanted; null: the last one's.
int Session::decode(const Token* tokens, int64_t n, int8_t* outputs) {
    const LogCapture log;
    // llama_batch_get_one takes a pointer to non-const, but only reads.
    llama_batch batch = llama_batch_get_one(const_cast<Token*>(tokens), static_cast<int32_t>(n));
    batch.logits = outputs;
    const int result = llama_decode(context_.handle.get(), batch);
    if (result == 0) {
        cached_.insert(cached_.end(), tokens, tokens + n);
        return 0;
    }
    const llama_pos last = llama_memory_seq_pos_max(llama_get_memory(context_.handle.get()), 0);
    const auto kept = std::clamp<int64_t>(last + 1 - static_cast<int64_t>(cached_.size()), 0, n);
    cached_.insert(cached_.end(), tokens, tokens + kept);
    if (result < 0) {
        throw Error(fmt::format("the model failed after {} tokens: {}; run with --verbose for libllama's log",
                                cached_.size(), log.reason("libllama gave no reason")));
    }
    return result;
}

// Makes the cache hold a prefix of `tokens`, as long as it can be used (Context::cut) but at most `most` of them; returns its length.
int64_t Session::keep_common(const std::vector<Token>& tokens, int64_t most) {
    const int64_t common = std::min(most, common_prefix(cached_, tokens));
    const auto size = static_cast<int64_t>(cached_.size());
    if (common == size) {
        return common;
    }
    const int64_t kept = context_.cut(0, size, common);
    if (kept == 0) {
        clear();
        return 0;
    }
    cached_.resize(static_cast<size_t>(kept));
    return kept;
}

bool Session::read(const std::vector<Token>& tokens, const Progress& progress) {
    return read_from(tokens, static_cast<int64_t>(tokens.size()) - 1, {}, {}, progress);
}

bool Session::score(const std::vector<Token>& tokens, const std::vector<int64_t>& wanted, const OnScores& on_scores,
                    const Progress& progress) {
    return read_from(tokens, wanted.front(), wanted, on_scores, progress);
}

bool Session::read_from(const std::vector<Token>& tokens, int64_t most, const std::vector<int64_t>& wanted,
                        const OnScores& on_scores, const Progress& progress) {
    const auto n = static_cast<int64_t>(tokens.size());
    if (n < 1) {
        throw UsageError("the prompt is empty; give some text");
    }
    if (n > context_size()) {
        throw Error(fmt::format("the prompt has {} tokens, the context holds {}; shorten it or use --ctx {}",
                                format_count(n), format_count(context_size()), (n + 512 + 255) / 256 * 256));
    }
    read_from_us_ = llama_time_us();
    stats_ = {};
    stats_.prompt_tokens = n;
    const int64_t start = keep_common(tokens, most);
    size_t next = 0; // of wanted
    std::vector<int8_t> outputs;
    for (int64_t at = start; at < n; at += kBatch) {
        if (progress && n - start > kBatch) {
            progress(static_cast<double>(at - start) / static_cast<double>(n - start));
        }
        const int64_t count = std::min(kBatch, n - at);
        const size_t first = next;
        if (on_scores) {
            outputs.assign(static_cast<size_t>(count), 0);
            for (; next < wanted.size() && wanted[next] < at + count; ++next) {
                outputs[static_cast<size_t>(wanted[next] - at)] = 1;
            }
        }
        const int result = interrupted() ? 2 : decode(tokens.data() + at, count, on_scores ? outputs.data() : nullptr);
        if (result == 2) {
            return false;
        }
        if (result != 0) {
            throw Error(fmt::format("the context of {} has no room for the prompt's {} tokens; use a larger --ctx",
                                    format_count(context_size()), format_count(n)));
        }
        if (next > first) {
            on_scores(first, next - first, llama_get_logits(context_.handle.get()));
        }
    }
    if (progress && n - start > kBatch) {
        progress(1);
    }
    llama_synchronize(context_.handle.get());
    stats_.read_tokens = n - start;
    stats_.read_seconds = seconds_since(read_from_us_);
    return true;
}

Answer Session::generate(llama_sampler* sampler, int64_t limit, const std::function<void(const std::string&)>& on_text,
                         const std::function<bool()>& on_full) {
    Answer answer;
    answer.stats = stats_;
    Stats& stats = answer.stats;
    Utf8Stream characters;
    const auto emit = [&](const std::string& text) {
        answer.text += text;
        if (on_text && !text.empty()) {
            on_text(text);
        }
    };
    int64_t first_us = 0;
    int64_t last_us = 0;
    for (;;) {
        if (limit >= 0 && stats.answer_tokens >= limit) {
            answer.stop = Stop::limit;
            break;
        }
        if (interrupted()) {
            answer.stop = Stop::interrupted;
            break;
        }
        if (!answer.undecoded.empty()) {
            if (static_cast<int64_t>(cached_.size()) >= context_size() && !(on_full && on_full())) {
                answer.stop = Stop::context;
                break;
            }
            const int result = decode(answer.undecoded.data(), 1);
            if (result != 0) {
                answer.stop = result == 2 ? Stop::interrupted : Stop::context;
                break;
            }
            answer.undecoded.clear();
        }
        const Token token = llama_sampler_sample(sampler, context_.handle.get(), -1);
        last_us = llama_time_us();
        if (first_us == 0) {
            first_us = last_us;
            stats.first_token_seconds = seconds_since(read_from_us_);
        }
        if (model_.ends_answer(token)) {
            answer.stop = Stop::end;
            break;
        }
        ++stats.answer_tokens;
        answer.undecoded = {token};
        emit(characters.push(model_.piece(token)));
    }
    emit(characters.finish());
    stats.answer_seconds = static_cast<double>(last_us - first_us) * 1e-6;
    stats.context_used = static_cast<int64_t>(cached_.size());
    stats.context_size = context_size();
    stats.kv_bytes = context_.kv_bytes;
    stats.kv_f16_bytes = context_.kv_f16_bytes;
    return answer;
}

bool Session::can_shift() const {
    // Recurrent layers have no rows that could be left out.
    return llama_memory_can_shift(llama_get_memory(context_.handle.get())) && !llama_model_is_recurrent(model_.get()) &&
           !llama_model_is_hybrid(model_.get());
}

bool Session::shift(int64_t keep, int64_t discard) {
    llama_memory_t memory = llama_get_memory(context_.handle.get());
    const auto size = static_cast<int64_t>(cached_.size());
    if (!can_shift() || keep < 0 || discard <= 0 || keep + discard > size ||
        !llama_memory_seq_rm(memory, 0, static_cast<llama_pos>(keep), static_cast<llama_pos>(keep + discard))) {
        return false;
    }
    llama_memory_seq_add(memory, 0, static_cast<llama_pos>(keep + discard), -1, static_cast<llama_pos>(-discard));
    cached_.erase(cached_.begin() + keep, cached_.begin() + keep + discard);
    return true;
}

void Session::clear() {
    llama_memory_clear(llama_get_memory(context_.handle.get()), true);
    cached_.clear();
}

std::vector<uint8_t> Session::state() const {
    std::vector<uint8_t> bytes(llama_state_seq_get_size(context_.handle.get(), 0));
    bytes.resize(llama_state_seq_get_data(context_.handle.get(), bytes.data(), bytes.size(), 0));
    return bytes;
}

bool Session::restore(const std::vector<uint8_t>& state, const std::vector<Token>& tokens) {
    clear();
    if (state.empty() || static_cast<int64_t>(tokens.size()) > context_size()) {
        return false;
    }
    llama_memory_t memory = llama_get_memory(context_.handle.get());
    if (llama_state_seq_set_data(context_.handle.get(), state.data(), state.size(), 0) == 0 ||
        llama_memory_seq_pos_max(memory, 0) + 1 != static_cast<llama_pos>(tokens.size())) {
        clear();
        return false;
    }
    cached_ = tokens;
    return true;
}

} // namespace turboquant::llm
