#include "serve/http/openai_response.h"

#include "llm/utf8.h"

#include <algorithm>
#include <ctime>

namespace turboquant::serve {
namespace {

using nlohmann::json;

// What OpenAI's API says where a probability is zero: JSON has no infinity.
constexpr double kLeastLogprob = -9999;

double finite(double logprob) {
    return std::max(logprob, kLeastLogprob);
}

std::string as_text(const std::string& bytes) {
    llm::Utf8Stream characters;
    std::string text = characters.push(bytes);
    return text + characters.finish();
}

size_t count_characters(const std::string& text) {
    return static_cast<size_t>(
        std::count_if(text.begin(), text.end(), [](char c) { return (static_cast<unsigned char>(c) & 0xC0) != 0x80; }));
}

json candidate_json(const Candidate& candidate) {
    json bytes = json::array();
    for (const char byte : candidate.bytes) {
        bytes.push_back(static_cast<unsigned char>(byte));
    }
    return {{"token", as_text(candidate.bytes)}, {"logprob", finite(candidate.logprob)}, {"bytes", bytes}};
}

json chat_logprobs(const std::vector<TokenScore>& scores) {
    json content = json::array();
    for (const TokenScore& score : scores) {
        json entry = candidate_json(score.chosen);
        entry["top_logprobs"] = json::array();
        for (const Candidate& candidate : score.top) {
            entry["top_logprobs"].push_back(candidate_json(candidate));
        }
        content.push_back(std::move(entry));
    }
    return {{"content", content}, {"refusal", nullptr}};
}

json legacy_logprobs(const std::vector<TokenScore>& scores, size_t& offset) {
    json tokens = json::array();
    json logprobs = json::array();
    json top = json::array();
    json offsets = json::array();
    for (const TokenScore& score : scores) {
        const std::string text = as_text(score.chosen.bytes);
        tokens.push_back(text);
        logprobs.push_back(finite(score.chosen.logprob));
        json map = json::object();
        for (const Candidate& candidate : score.top) {
            // Tokens that are parts of characters can look alike: the likeliest keeps the name.
            map.emplace(as_text(candidate.bytes), finite(candidate.logprob));
        }
        top.push_back(score.top.empty() ? json() : map);
        offsets.push_back(offset);
        offset += count_characters(text);
    }
    return {{"tokens", tokens}, {"token_logprobs", logprobs}, {"top_logprobs", top}, {"text_offset", offsets}};
}

const char* finish_word(Finish finish) {
    return finish == Finish::stop ? "stop" : "length";
}

double per_second(int64_t n, double ms) {
    return ms > 0 ? 1000 * static_cast<double>(n) / ms : 0;
}

} // namespace

json usage_json(const AnswerStats& stats) {
    return {{"prompt_tokens", stats.prompt_tokens},
            {"completion_tokens", stats.answer_tokens},
            {"total_tokens", stats.prompt_tokens + stats.answer_tokens},
            {"prompt_tokens_details", {{"cached_tokens", stats.cached_tokens}}}};
}

json timings_json(const AnswerStats& stats, const EngineStatus& engine) {
    const int64_t read = stats.prompt_tokens - stats.cached_tokens;
    const int64_t later = std::max<int64_t>(0, stats.answer_tokens - 1); // tokens after the first
    return {{"cache_n", stats.cached_tokens},
            {"prompt_n", read},
            {"prompt_ms", stats.prompt_ms},
            {"prompt_per_second", per_second(read, stats.prompt_ms)},
            {"predicted_n", stats.answer_tokens},
            {"predicted_ms", stats.answer_ms},
            {"predicted_per_second", per_second(later, stats.answer_ms)},
            {"queue_ms", stats.queue_ms},
            {"context_used", stats.context_used},
            {"context_size", engine.context},
            {"kv_bytes", engine.share(engine.kv_bytes, stats.context_used)},
            {"kv_f16_bytes", engine.share(engine.kv_f16_bytes, stats.context_used)}};
}

AnswerJson::AnswerJson(bool chat, std::string id, std::string model, bool scores, bool include_usage)
    : chat_(chat),
      id_(std::move(id)),
      model_(std::move(model)),
      scores_(scores),
      include_usage_(include_usage),
      created_(std::time(nullptr)) {}

json AnswerJson::head(const char* object) const {
    return {{"id", id_}, {"object", object}, {"created", created_}, {"model", model_}};
}

json AnswerJson::logprobs(const std::vector<TokenScore>& scores) {
    if (!scores_) {
        return nullptr;
    }
    return chat_ ? chat_logprobs(scores) : legacy_logprobs(scores, offset_);
}

json AnswerJson::first_chunk() const {
    json chunk = head("chat.completion.chunk");
    chunk["choices"] = json::array({{{"index", 0},
                                     {"delta", {{"role", "assistant"}, {"content", ""}}},
                                     {"logprobs", nullptr},
                                     {"finish_reason", nullptr}}});
    if (include_usage_) {
        chunk["usage"] = nullptr;
    }
    return chunk;
}

json AnswerJson::chunk(const AnswerText::Piece& piece) {
    json chunk = head(chat_ ? "chat.completion.chunk" : "text_completion");
    json choice = {{"index", 0}, {"logprobs", logprobs(piece.scores)}, {"finish_reason", nullptr}};
    if (chat_) {
        choice["delta"] = {{"content", piece.text}};
    } else {
        choice["text"] = piece.text;
    }
    chunk["choices"] = json::array({choice});
    if (include_usage_) {
        chunk["usage"] = nullptr;
    }
    return chunk;
}

json AnswerJson::last_chunk(const Event& done, const EngineStatus& engine) {
    json chunk = this->chunk({});
    json& choice = chunk["choices"][0];
    choice["logprobs"] = nullptr;
    if (chat_) {
        choice["delta"] = json::object();
    }
    choice["finish_reason"] = finish_word(done.finish);
    chunk["timings"] = timings_json(done.stats, engine);
    return chunk;
}

json AnswerJson::usage_chunk(const AnswerStats& stats) const {
    json chunk = head(chat_ ? "chat.completion.chunk" : "text_completion");
    chunk["choices"] = json::array();
    chunk["usage"] = usage_json(stats);
    return chunk;
}

void AnswerJson::add(const AnswerText::Piece& piece) {
    text_ += piece.text;
    all_scores_.insert(all_scores_.end(), piece.scores.begin(), piece.scores.end());
}

json AnswerJson::whole(const Event& done, const EngineStatus& engine) {
    json answer = head(chat_ ? "chat.completion" : "text_completion");
    json choice = {{"index", 0}, {"logprobs", logprobs(all_scores_)}, {"finish_reason", finish_word(done.finish)}};
    if (chat_) {
        choice["message"] = {{"role", "assistant"}, {"content", text_}, {"refusal", nullptr}};
    } else {
        choice["text"] = text_;
    }
    answer["choices"] = json::array({choice});
    answer["usage"] = usage_json(done.stats);
    answer["timings"] = timings_json(done.stats, engine);
    return answer;
}

} // namespace turboquant::serve
