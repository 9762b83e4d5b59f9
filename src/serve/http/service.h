// What the handlers of a loaded server work with.
#pragma once

#include "llm/chat_template.h"
#include "serve/engine/engine.h"
#include "serve/http/api_error.h"
#include "serve/http/request_log.h"

#include <chrono>
#include <string>

#include <httplib.h>

namespace turboquant::serve {

struct Service {
    const llm::Model& model;
    const llm::ChatTemplate& chat_template;
    Engine& engine;
    llm::KvChoice kv;
    llm::SamplingOptions defaults;
    std::string name;         // of the model, in answers
    int64_t most_tokens = -1; // of an answer; -1: no limit
    size_t longest_piece =
        0; // bytes of the longest token (longest_piece()): no text longer than so many a token can fit
    std::chrono::seconds timeout{600};
    int64_t created = 0; // when the model was loaded, in seconds since 1970
    bool log_prompts = false;
};

// Bytes of the vocabulary's longest token, at least 1.
size_t longest_piece(const llm::Model& model);

// The record of the request that this thread is answering (one thread answers a connection).
RequestRecord& this_request();

void set_json(httplib::Response& response, const nlohmann::json& json);

// POST /v1/chat/completions (chat) and /v1/completions. Throws ApiError.
void complete(const Service& service, bool chat, const httplib::Request& request, httplib::Response& response);

// The rest. All throw ApiError.
nlohmann::json models_json(const Service& service);
nlohmann::json model_json(const Service& service, const std::string& id);
nlohmann::json props_json(const Service& service);
nlohmann::json tokenize_json(const Service& service, const std::string& body);
nlohmann::json detokenize_json(const Service& service, const std::string& body);

} // namespace turboquant::serve
