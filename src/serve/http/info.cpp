// The endpoints that tell about the model and the server, and the tokeniser.
#include "serve/http/fields.h"
#include "serve/http/openai_request.h"
#include "serve/http/service.h"

#include "llm/utf8.h"

#include <filesystem>

#include <fmt/format.h>

namespace turboquant::serve {
namespace {

using nlohmann::json;

json describe(const Service& service) {
    const llm::Model& model = service.model;
    return {{"id", service.name},
            {"object", "model"},
            {"created", service.created},
            {"owned_by", "turboquant"},
            {"meta",
             {{"description", llm::describe_model(model.get())},
              {"n_vocab", model.vocabulary()},
              {"n_ctx_train", model.trained_context()},
              {"n_ctx", service.engine.context()},
              {"n_params", llama_model_n_params(model.get())},
              {"size", llama_model_size(model.get())}}}};
}

const char* template_kind(llm::ChatTemplate::Kind kind) {
    switch (kind) {
    case llm::ChatTemplate::Kind::own: return "model";
    case llm::ChatTemplate::Kind::chatml: return "chatml";
    case llm::ChatTemplate::Kind::none: return "none";
    }
    return "";
}

const char* template_note(llm::ChatTemplate::Kind kind) {
    switch (kind) {
    case llm::ChatTemplate::Kind::own: return "the model's own chat template";
    case llm::ChatTemplate::Kind::chatml:
        return "the model's chat template is unknown to libllama: ChatML is used, answers may suffer";
    case llm::ChatTemplate::Kind::none: return "the model has no chat template: it continues the messages' text";
    }
    return "";
}

} // namespace

json models_json(const Service& service) {
    return {{"object", "list"}, {"data", json::array({describe(service)})}};
}

json model_json(const Service& service, const std::string& id) {
    if (id != service.name) {
        throw ApiError(404, fmt::format("there is no model '{}' here; this server has '{}'", id, service.name),
                       "invalid_request_error", "model", "model_not_found");
    }
    return describe(service);
}

json props_json(const Service& service) {
    const EngineStatus status = service.engine.status();
    const llm::ChatTemplate& chat = service.chat_template;
    const llm::SamplingOptions& sampling = service.defaults;
    const double ratio =
        status.kv_bytes > 0 ? static_cast<double>(status.kv_f16_bytes) / static_cast<double>(status.kv_bytes) : 1;
    const json limit = service.most_tokens < 0 ? json() : json(service.most_tokens);
    return {
        {"model", {{"id", service.name}, {"description", service.model.identity()}}},
        {"kv",
         {{"choice", service.kv.name},
          {"description", service.kv.describe()},
          {"bytes", status.kv_bytes},
          {"f16_bytes", status.kv_f16_bytes},
          {"ratio", ratio},
          {"used_bytes", status.share(status.kv_bytes, status.cached_tokens)},
          {"used_f16_bytes", status.share(status.kv_f16_bytes, status.cached_tokens)}}},
        {"context",
         {{"per_slot", status.context}, {"slots", status.slots}, {"busy", status.busy}, {"waiting", status.waiting}}},
        {"sampling",
         {{"temperature", sampling.temp},
          {"top_k", sampling.top_k},
          {"top_p", sampling.top_p},
          {"min_p", sampling.min_p},
          {"repeat_penalty", sampling.repeat_penalty},
          {"presence_penalty", sampling.presence_penalty},
          {"frequency_penalty", sampling.frequency_penalty},
          {"max_tokens", limit}}},
        {"chat_template",
         {{"kind", template_kind(chat.kind())},
          {"note", template_note(chat.kind())},
          {"default_system", chat.default_system()}}},
        {"build", {{"llama_cpp", llama_version()}}}};
}

json tokenize_json(const Service& service, const std::string& body) {
    const json parsed = parse_body(body);
    const Fields fields(parsed);
    const std::optional<std::string> content = fields.string("content");
    if (!content) {
        throw bad_request("'content' is missing: a string", "content", "missing_required_parameter");
    }
    const size_t most = static_cast<size_t>(service.engine.context()) * service.longest_piece;
    if (content->size() > most) {
        throw bad_request(fmt::format("'content' has {} bytes; this server takes {}", content->size(), most), "content",
                          "context_length_exceeded");
    }
    const std::vector<llm::Token> tokens = service.model.tokenize(
        *content, fields.boolean("add_special").value_or(false), fields.boolean("parse_special").value_or(true));
    if (!fields.boolean("with_pieces").value_or(false)) {
        return {{"tokens", tokens}};
    }
    json pieces = json::array();
    for (const llm::Token token : tokens) {
        const std::string bytes = service.model.piece(token, true);
        json piece = bytes;
        if (llm::first_invalid_utf8(bytes) != std::string::npos) { // part of a character
            piece = json::array();
            for (const char byte : bytes) {
                piece.push_back(static_cast<unsigned char>(byte));
            }
        }
        pieces.push_back({{"id", token}, {"piece", piece}});
    }
    return {{"tokens", pieces}};
}

json detokenize_json(const Service& service, const std::string& body) {
    const json parsed = parse_body(body);
    const json* tokens = Fields(parsed).find("tokens");
    if (tokens == nullptr || !tokens->is_array()) {
        throw bad_request("'tokens' is missing: an array of token numbers", "tokens", "missing_required_parameter");
    }
    llm::Utf8Stream characters;
    std::string text;
    for (const llm::Token token : parse_tokens(*tokens, "tokens", service.model.vocabulary())) {
        text += characters.push(service.model.piece(token, true));
    }
    return {{"content", text + characters.finish()}};
}

} // namespace turboquant::serve
