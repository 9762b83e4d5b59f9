// Answers in OpenAI's shapes, whole and as the chunks of a stream.
#pragma once

#include "serve/engine/engine.h"
#include "serve/http/api_error.h"

#include <string>
#include <vector>

namespace turboquant::serve {

// One answer being put together. Not thread-safe.
class AnswerJson {
public:
    // id: "chatcmpl-..." or "cmpl-..."; model: its name in answers; scores: the request wanted log probabilities.
    AnswerJson(bool chat, std::string id, std::string model, bool scores, bool include_usage);

    // Chunks of a stream, each the JSON of one event.
    nlohmann::json first_chunk() const; // chat: the role
    nlohmann::json chunk(const AnswerText::Piece& piece);
    nlohmann::json last_chunk(const Event& done, const EngineStatus& engine);
    nlohmann::json usage_chunk(const AnswerStats& stats) const; // where include_usage asked for it

    // The whole answer: add() every piece, then whole().
    void add(const AnswerText::Piece& piece);
    nlohmann::json whole(const Event& done, const EngineStatus& engine);

private:
    nlohmann::json head(const char* object) const;
    nlohmann::json logprobs(const std::vector<TokenScore>& scores);

    bool chat_;
    std::string id_;
    std::string model_;
    bool scores_;
    bool include_usage_;
    int64_t created_;
    std::string text_;
    std::vector<TokenScore> all_scores_;
    size_t offset_ = 0; // characters so far, for text_offset of the completions API
};

nlohmann::json usage_json(const AnswerStats& stats);
// llama-server's names, and what the cache takes.
nlohmann::json timings_json(const AnswerStats& stats, const EngineStatus& engine);

} // namespace turboquant::serve
