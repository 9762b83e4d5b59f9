#include "serve/http/openai_request.h"

#include "llm/utf8.h"
#include "serve/http/fields.h"

#include <algorithm>
#include <charconv>
#include <random>

#include <fmt/format.h>

namespace turboquant::serve {
namespace {

using nlohmann::json;

constexpr size_t kMostStops = 16;
constexpr size_t kLongestStop = 1024; // bytes
constexpr size_t kMostBiases = 1024;
constexpr int kMostTopScores = 20;
constexpr int kMostLegacyTopScores = 5;

[[noreturn]] void unsupported(const char* field, const std::string& why) {
    throw bad_request(fmt::format("'{}' is not supported here: {}", field, why), field, "unsupported_parameter");
}

// Fields that would change the answer, with the values that do not.
void refuse_unsupported(const Fields& fields) {
    const char* const stock = "stock llama-server with the TurboQuant plug-in has it";
    for (const char* field : {"tools", "functions"}) {
        const json* value = fields.find(field);
        if (value != nullptr && !(value->is_array() && value->empty())) {
            unsupported(field, stock);
        }
    }
    for (const char* field : {"tool_choice", "function_call"}) {
        const json* value = fields.find(field);
        if (value != nullptr && *value != "none" && *value != "auto") {
            unsupported(field, stock);
        }
    }
    if (const json* format = fields.find("response_format")) {
        if (!format->is_object() || !format->contains("type") || (*format)["type"] != "text") {
            unsupported("response_format", fmt::format("only {{\"type\": \"text\"}}; {}", stock));
        }
    }
    for (const char* field : {"n", "best_of"}) {
        if (fields.integer(field, 1, 1 << 20).value_or(1) != 1) {
            unsupported(field, "one answer a request; send several requests");
        }
    }
    if (const json* modalities = fields.find("modalities"); modalities != nullptr && *modalities != json{"text"}) {
        unsupported("modalities", "text only");
    }
    for (const char* field :
         {"audio", "web_search_options", "grammar", "json_schema", "lora", "samplers", "image_data"}) {
        if (fields.find(field) != nullptr) {
            unsupported(field, stock);
        }
    }
    for (const char* field : {"echo", "ignore_eos"}) {
        if (fields.boolean(field).value_or(false)) {
            unsupported(field, "leave it out");
        }
    }
    if (!fields.string("suffix").value_or("").empty()) {
        unsupported("suffix", stock);
    }
    // llama-server's further samplers and the values at which they do nothing.
    const std::pair<const char*, double> neutral[] = {
        {"typical_p", 1}, {"mirostat", 0}, {"dry_multiplier", 0}, {"xtc_probability", 0}, {"dynatemp_range", 0}};
    for (const auto& [field, value] : neutral) {
        if (fields.number(field, -1e30, 1e30).value_or(value) != value) {
            unsupported(field, stock);
        }
    }
    if (fields.number("top_n_sigma", -1e30, 1e30).value_or(-1) > 0) {
        unsupported("top_n_sigma", stock);
    }
}

void check_text(const std::string& text, const char* field) {
    if (llm::first_invalid_utf8(text) != std::string::npos) {
        throw bad_request(fmt::format("'{}' has a NUL character, which no prompt can hold", field), field);
    }
}

std::vector<llama_logit_bias> parse_bias(const json& value, int vocabulary) {
    if (!value.is_object()) {
        throw bad_request(fmt::format("'logit_bias' must be an object, not {}", type_words(value)), "logit_bias",
                          "invalid_type");
    }
    if (value.size() > kMostBiases) {
        throw bad_request(fmt::format("'logit_bias' has more than {} entries", kMostBiases), "logit_bias");
    }
    std::vector<llama_logit_bias> biases;
    for (const auto& [key, bias] : value.items()) {
        llm::Token token = -1;
        const auto [end, error] = std::from_chars(key.data(), key.data() + key.size(), token);
        if (error != std::errc() || end != key.data() + key.size() || token < 0 || token >= vocabulary) {
            throw bad_request(fmt::format("'logit_bias' names tokens by their numbers, 0 to {}", vocabulary - 1),
                              "logit_bias");
        }
        if (!bias.is_number() || !(bias.get<double>() >= -100 && bias.get<double>() <= 100)) {
            throw bad_request("'logit_bias' values must be numbers from -100 to 100", "logit_bias");
        }
        // -100 and 100 mean never and only, whatever the model's scores.
        const double amount = bias.get<double>();
        biases.push_back({token, static_cast<float>(amount <= -100 ? -1e9 : amount >= 100 ? 1e9 : amount)});
    }
    return biases;
}

std::vector<std::string> parse_stops(const json& value) {
    std::vector<std::string> stops;
    const auto add = [&](const json& stop) {
        if (!stop.is_string()) {
            throw bad_request(fmt::format("'stop' must be a string or an array of strings, not {}",
                                          value.is_array() ? "an array with " + type_words(stop) : type_words(stop)),
                              "stop", "invalid_type");
        }
        stops.push_back(stop.get<std::string>());
        if (stops.back().empty() || stops.back().size() > kLongestStop) {
            throw bad_request(fmt::format("'stop' strings must have 1 to {} bytes", kLongestStop), "stop");
        }
    };
    if (value.is_array()) {
        if (value.size() > kMostStops) {
            throw bad_request(fmt::format("'stop' has more than {} strings", kMostStops), "stop");
        }
        for (const json& stop : value) {
            add(stop);
        }
    } else {
        add(value);
    }
    return stops;
}

// What both kinds of requests have in common.
void parse_common(const Fields& fields, const llm::SamplingOptions& defaults, int vocabulary, int64_t most,
                  CompletionRequest& request) {
    refuse_unsupported(fields);
    request.stream = fields.boolean("stream").value_or(false);
    if (const json* options = fields.find("stream_options")) {
        if (!options->is_object()) {
            throw bad_request(fmt::format("'stream_options' must be an object, not {}", type_words(*options)),
                              "stream_options", "invalid_type");
        }
        request.include_usage = Fields(*options).boolean("include_usage").value_or(false);
    }
    llm::SamplingOptions& sampling = request.sampling;
    sampling = defaults;
    sampling.temp = fields.number("temperature", 0, 100).value_or(defaults.temp);
    sampling.top_p = fields.number("top_p", 0, 1).value_or(defaults.top_p);
    sampling.top_k = static_cast<int>(fields.integer("top_k", -1, 1 << 30).value_or(defaults.top_k));
    sampling.min_p = fields.number("min_p", 0, 1).value_or(defaults.min_p);
    sampling.presence_penalty = fields.number("presence_penalty", -2, 2).value_or(0);
    sampling.frequency_penalty = fields.number("frequency_penalty", -2, 2).value_or(0);
    sampling.repeat_penalty = fields.number("repeat_penalty", 0.01, 100).value_or(1);
    sampling.penalty_last = static_cast<int>(fields.integer("repeat_last_n", 0, 1 << 20).value_or(64));
    if (const json* bias = fields.find("logit_bias")) {
        sampling.bias = parse_bias(*bias, vocabulary);
    }
    // Any integer is a seed; -1 is llama-server's word for a random one.
    const std::optional<int64_t> seed = fields.integer("seed", INT64_MIN, INT64_MAX);
    sampling.seed = seed && *seed != -1 ? static_cast<uint32_t>(*seed ^ (*seed >> 32)) : std::random_device{}();

    for (const char* field : {"max_completion_tokens", "max_tokens", "n_predict"}) {
        const int64_t least = field == std::string_view("n_predict") ? -1 : 1;
        if (const std::optional<int64_t> limit = fields.integer(field, least, int64_t{1} << 40)) {
            request.limit = *limit;
            break;
        }
    }
    if (most >= 0) {
        request.limit = request.limit < 0 ? most : std::min(request.limit, most);
    }
    if (const json* stop = fields.find("stop")) {
        request.stops = parse_stops(*stop);
    }
    request.reuse = fields.boolean("cache_prompt").value_or(true);
    fields.string("user");
    fields.string("model");
}

std::string parse_content(const json& content, const std::string& role) {
    if (content.is_string()) {
        return content.get<std::string>();
    }
    if (!content.is_array()) {
        throw bad_request(
            fmt::format("'content' of a message must be a string or an array of parts, not {}", type_words(content)),
            "messages", "invalid_type");
    }
    std::string text;
    for (const json& part : content) {
        if (!part.is_object() || !part.contains("type") || !part["type"].is_string()) {
            throw bad_request("a part of 'content' must be an object with a 'type'", "messages", "invalid_type");
        }
        if (part["type"] != "text") {
            throw bad_request(fmt::format("a part of type '{}' in a {} message is not supported: text only; stock "
                                          "llama-server with the TurboQuant plug-in takes images",
                                          part["type"].get<std::string>(), role),
                              "messages", "unsupported_parameter");
        }
        if (!part.contains("text") || !part["text"].is_string()) {
            throw bad_request("a text part of 'content' must have a string 'text'", "messages", "invalid_type");
        }
        text += part["text"].get<std::string>();
    }
    return text;
}

llm::Message parse_message(const json& message) {
    if (!message.is_object()) {
        throw bad_request(fmt::format("a message must be an object, not {}", type_words(message)), "messages",
                          "invalid_type");
    }
    const Fields fields(message);
    std::string role = fields.string("role").value_or("");
    if (role == "developer") {
        role = "system";
    }
    if (role != "system" && role != "user" && role != "assistant") {
        throw bad_request(role.empty() ? "a message must have a 'role'"
                                       : fmt::format("role '{}' is not supported; use system, developer, user or "
                                                     "assistant",
                                                     role),
                          "messages");
    }
    const json* calls = fields.find("tool_calls");
    if (calls != nullptr && !(calls->is_array() && calls->empty())) {
        throw bad_request("'tool_calls' in a message is not supported here; stock llama-server with the TurboQuant "
                          "plug-in has it",
                          "messages", "unsupported_parameter");
    }
    const json* content = fields.find("content");
    if (content == nullptr) {
        throw bad_request(fmt::format("a {} message must have 'content'", role), "messages");
    }
    llm::Message parsed{role, parse_content(*content, role)};
    check_text(parsed.content, "messages");
    return parsed;
}

} // namespace

std::vector<llm::Token> parse_tokens(const json& array, const char* field, int vocabulary) {
    std::vector<llm::Token> tokens;
    for (const json& token : array) {
        if (!token.is_number_integer()) {
            throw bad_request(fmt::format("'{}' must hold token numbers only, not {}", field, type_words(token)), field,
                              "invalid_type");
        }
        const auto number = token.get<int64_t>();
        if (number < 0 || number >= vocabulary) {
            throw bad_request(
                fmt::format("'{}' has token {}; this model's are 0 to {}", field, token.dump(), vocabulary - 1), field);
        }
        tokens.push_back(static_cast<llm::Token>(number));
    }
    return tokens;
}

CompletionRequest parse_chat(const json& body, const llm::SamplingOptions& defaults, int vocabulary, int64_t most) {
    const Fields fields(body);
    CompletionRequest request;
    request.chat = true;
    parse_common(fields, defaults, vocabulary, most, request);
    const json* messages = fields.find("messages");
    if (messages == nullptr || !messages->is_array()) {
        throw bad_request(messages == nullptr
                              ? "'messages' is missing: an array of {role, content}"
                              : fmt::format("'messages' must be an array, not {}", type_words(*messages)),
                          "messages", messages == nullptr ? "missing_required_parameter" : "invalid_type");
    }
    if (messages->empty()) {
        throw bad_request("'messages' is empty; give at least one", "messages");
    }
    for (const json& message : *messages) {
        request.messages.push_back(parse_message(message));
    }
    request.scores = fields.boolean("logprobs").value_or(false);
    request.top_scores = static_cast<int>(fields.integer("top_logprobs", 0, kMostTopScores).value_or(0));
    if (request.top_scores > 0 && !request.scores) {
        throw bad_request("'top_logprobs' needs 'logprobs': true", "top_logprobs");
    }
    return request;
}

CompletionRequest parse_completion(const json& body, const llm::SamplingOptions& defaults, int vocabulary,
                                   int64_t most) {
    const Fields fields(body);
    CompletionRequest request;
    parse_common(fields, defaults, vocabulary, most, request);
    const json* prompt = fields.find("prompt");
    if (prompt == nullptr) {
        throw bad_request("'prompt' is missing: a string or an array of tokens", "prompt",
                          "missing_required_parameter");
    }
    if (prompt->is_array() && prompt->size() == 1 && (prompt->front().is_string() || prompt->front().is_array())) {
        prompt = &prompt->front();
    }
    if (prompt->is_string()) {
        request.prompt = prompt->get<std::string>();
        check_text(request.prompt, "prompt");
    } else if (prompt->is_array()) {
        if (!prompt->empty() && !prompt->front().is_number()) {
            throw bad_request("'prompt' must be one prompt; send several requests for several", "prompt",
                              "unsupported_parameter");
        }
        request.tokens = parse_tokens(*prompt, "prompt", vocabulary);
        if (request.tokens.empty()) {
            throw bad_request("'prompt' is empty; give some text", "prompt");
        }
    } else {
        throw bad_request(fmt::format("'prompt' must be a string or an array of tokens, not {}", type_words(*prompt)),
                          "prompt", "invalid_type");
    }
    if (const json* scores = fields.find("logprobs")) {
        if (scores->is_boolean()) { // some clients send the chat API's form
            request.scores = scores->get<bool>();
        } else {
            request.top_scores = static_cast<int>(*fields.integer("logprobs", 0, kMostLegacyTopScores));
            request.scores = true;
        }
    }
    return request;
}

} // namespace turboquant::serve
