// OpenAI's request bodies into what the engine understands. Unknown fields are ignored; one that would change the answer
// and is not supported is an ApiError.
#pragma once

#include "llm/chat_template.h"
#include "serve/engine/request.h"
#include "serve/http/api_error.h"

#include <cstdint>
#include <string>
#include <vector>

namespace turboquant::serve {

struct CompletionRequest {
    bool chat = false;
    std::vector<llm::Message> messages; // chat
    std::string prompt;                 // completions: text,
    std::vector<llm::Token> tokens;     // or tokens
    bool stream = false;
    bool include_usage = false;
    llm::SamplingOptions sampling;
    int64_t limit = -1; // -1: none
    std::vector<std::string> stops;
    bool scores = false;
    int top_scores = 0;
    bool reuse = true; // cache_prompt
};

// defaults: sampling where the body says nothing; its seed is taken from the system then. vocabulary: tokens of the model.
// most: the largest limit of an answer; -1: none.
CompletionRequest parse_chat(const nlohmann::json& body, const llm::SamplingOptions& defaults, int vocabulary,
                             int64_t most);
CompletionRequest parse_completion(const nlohmann::json& body, const llm::SamplingOptions& defaults, int vocabulary,
                                   int64_t most);

// An array of token numbers of the vocabulary. ApiError that names the field.
std::vector<llm::Token> parse_tokens(const nlohmann::json& array, const char* field, int vocabulary);

} // namespace turboquant::serve
