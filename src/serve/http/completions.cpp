// The two completion endpoints: from a body to tokens, to the engine, and its events back to the client.
#include "serve/http/connection.h"
#include "serve/http/fields.h"
#include "serve/http/openai_request.h"
#include "serve/http/openai_response.h"
#include "serve/http/service.h"

#include "llm/error.h"

#include <algorithm>

#include <fmt/format.h>

namespace turboquant::serve {
namespace {

using namespace std::chrono_literals;

constexpr auto kLook = 40ms;     // how often a waiting thread looks whether the client is still there
constexpr auto kKeepAlive = 10s; // silence after which a comment keeps a stream open through proxies
constexpr int kClientGone = 499; // in the log and the metrics only: nobody is left to read it

ApiError as_error(const Failure& failure) {
    switch (failure.kind) {
    case Failure::Kind::timeout: return {504, failure.message, "server_error", "", "timeout"};
    case Failure::Kind::stopping: return {503, failure.message, "server_error", "", "shutting_down"};
    default: return {500, failure.message, "server_error", "", "model_failed"};
    }
}

// Tokenisers take long for megabytes, and some of them do not survive those at all.
void check_length(const Service& service, const std::string& text, const char* field) {
    const size_t most = static_cast<size_t>(service.engine.context()) * service.longest_piece;
    if (text.size() > most) {
        throw bad_request(
            fmt::format("the prompt has {} bytes, more than the {} tokens of this server's context can stand for",
                        text.size(), service.engine.context()),
            field, "context_length_exceeded");
    }
}

std::vector<llm::Token> prompt_tokens(const Service& service, CompletionRequest& asked) {
    if (!asked.tokens.empty()) {
        return std::move(asked.tokens);
    }
    if (!asked.chat) {
        check_length(service, asked.prompt, "prompt");
        return service.model.tokenize(asked.prompt, true);
    }
    // The model's own template puts its system message where none is given.
    const std::string& system = service.chat_template.default_system();
    if (!system.empty() && asked.messages.front().role != "system") {
        asked.messages.insert(asked.messages.begin(), {"system", system});
    }
    try {
        asked.prompt = service.chat_template.render(asked.messages, true);
    } catch (const llm::Error&) {
        throw bad_request("the model's chat template cannot take these messages", "messages");
    }
    check_length(service, asked.prompt, "messages");
    return service.model.tokenize(asked.prompt, true);
}

void record_answer(const Event& done) {
    RequestRecord& record = this_request();
    record.prompt_tokens = done.stats.prompt_tokens;
    record.cached_tokens = done.stats.cached_tokens;
    record.answer_tokens = done.stats.answer_tokens;
    record.outcome = done.finish == Finish::stop ? "stop" : "length";
}

// The events of one answer as server-sent events.
class EventFeed {
public:
    EventFeed(const Service& service, std::shared_ptr<AnswerStream> stream, AnswerJson json, bool chat, bool usage,
              int descriptor)
        : service_(service),
          stream_(std::move(stream)),
          json_(std::move(json)),
          usage_(usage),
          descriptor_(descriptor),
          last_write_(Clock::now()) {
        if (chat) {
            pending_ = line(json_.first_chunk());
        }
    }

    // What httplib calls again and again: waits a little, writes what there is. False: the client is gone.
    bool feed(httplib::DataSink& sink) {
        bool over = false;
        for (Event& event : stream_->take(kLook)) {
            over = add(event) || over;
        }
        if (pending_.empty() && Clock::now() - last_write_ > kKeepAlive) {
            pending_ = ": waiting\n\n";
        }
        if (!pending_.empty()) {
            if (!sink.write(pending_.data(), pending_.size())) {
                return gone();
            }
            pending_.clear();
            last_write_ = Clock::now();
        } else if (descriptor_ >= 0 && peer_gone(descriptor_)) {
            return gone();
        }
        if (over) {
            over_ = true;
            sink.done();
        }
        return true;
    }

    // However it ended: nobody reads any more.
    void close() {
        if (!over_) {
            gone();
        }
    }

private:
    static std::string line(const nlohmann::json& json) { return "data: " + dump(json) + "\n\n"; }

    bool gone() {
        stream_->cancel();
        if (this_request().outcome.empty()) {
            this_request().outcome = "cancelled";
        }
        return false;
    }

    // True: it was the last one.
    bool add(Event& event) {
        switch (event.kind) {
        case Event::Kind::piece: pending_ += line(json_.chunk(event.piece)); return false;
        case Event::Kind::failed: {
            const ApiError error = as_error(event.failure);
            pending_ += line(error.json());
            this_request().outcome = "failed";
            this_request().error = error.code();
            return true;
        }
        case Event::Kind::done: break;
        }
        if (!event.piece.empty()) {
            pending_ += line(json_.chunk(event.piece));
        }
        pending_ += line(json_.last_chunk(event, service_.engine.status()));
        if (usage_) {
            pending_ += line(json_.usage_chunk(event.stats));
        }
        pending_ += "data: [DONE]\n\n";
        record_answer(event);
        return true;
    }

    const Service& service_;
    std::shared_ptr<AnswerStream> stream_;
    AnswerJson json_;
    bool usage_;
    int descriptor_;
    Clock::time_point last_write_;
    std::string pending_;
    bool over_ = false;
};

void answer_whole(const Service& service, AnswerStream& stream, AnswerJson json, int descriptor,
                  httplib::Response& response) {
    for (;;) {
        for (Event& event : stream.take(kLook)) {
            json.add(event.piece);
            if (event.kind == Event::Kind::failed) {
                this_request().outcome = "failed";
                throw as_error(event.failure);
            }
            if (event.kind == Event::Kind::done) {
                record_answer(event);
                set_json(response, json.whole(event, service.engine.status()));
                return;
            }
        }
        if (descriptor >= 0 && peer_gone(descriptor)) {
            stream.cancel();
            this_request().outcome = "cancelled";
            response.status = kClientGone;
            return;
        }
    }
}

} // namespace

size_t longest_piece(const llm::Model& model) {
    size_t longest = 1;
    for (llm::Token token = 0; token < model.vocabulary(); ++token) {
        longest = std::max(longest, model.piece(token, true).size());
    }
    return longest;
}

void complete(const Service& service, bool chat, const httplib::Request& request, httplib::Response& response) {
    const auto arrived = this_request().start;
    const nlohmann::json body = parse_body(request.body);
    const int vocabulary = service.model.vocabulary();
    CompletionRequest asked = chat ? parse_chat(body, service.defaults, vocabulary, service.most_tokens)
                                   : parse_completion(body, service.defaults, vocabulary, service.most_tokens);
    std::vector<llm::Token> tokens = prompt_tokens(service, asked);
    const int64_t context = service.engine.context();
    const char* field = chat ? "messages" : "prompt";
    if (tokens.empty()) {
        throw bad_request(fmt::format("'{}' is empty; give some text", field), field);
    }
    if (static_cast<int64_t>(tokens.size()) >= context) {
        throw bad_request(fmt::format("the prompt has {} tokens, the context of this server holds {} with the answer",
                                      tokens.size(), context),
                          field, "context_length_exceeded");
    }
    this_request().prompt_tokens = static_cast<int64_t>(tokens.size());
    if (service.log_prompts) {
        this_request().prompt = asked.prompt;
    }

    const auto stream = std::make_shared<AnswerStream>();
    Request job;
    job.id = this_request().id;
    job.tokens = std::move(tokens);
    job.sampling = std::move(asked.sampling);
    job.limit = asked.limit;
    job.stops = std::move(asked.stops);
    job.scores = asked.scores;
    job.top_scores = asked.top_scores;
    job.reuse = asked.reuse;
    job.arrived = arrived;
    job.deadline = arrived + service.timeout;
    job.stream = stream;
    switch (service.engine.submit(std::move(job))) {
    case Engine::Submit::accepted: break;
    case Engine::Submit::full:
        response.set_header("Retry-After", std::to_string(service.engine.retry_after()));
        throw ApiError(429, "too many requests are waiting already; try again later", "rate_limit_error", "",
                       "queue_full");
    case Engine::Submit::stopping:
        response.set_header("Retry-After", "5");
        throw ApiError(503, "the server is shutting down", "server_error", "", "shutting_down");
    }
    const int descriptor = find_connection(request.local_port, request.remote_addr, request.remote_port);
    AnswerJson json(chat, (chat ? "chatcmpl-" : "cmpl-") + this_request().id, service.name, asked.scores,
                    asked.include_usage);
    if (!asked.stream) {
        answer_whole(service, *stream, std::move(json), descriptor, response);
        return;
    }
    const auto feed =
        std::make_shared<EventFeed>(service, stream, std::move(json), chat, asked.include_usage, descriptor);
    response.set_header("Cache-Control", "no-cache");
    response.set_header("X-Accel-Buffering", "no"); // nginx: hand events on as they come
    response.set_chunked_content_provider(
        "text/event-stream", [feed](size_t, httplib::DataSink& sink) { return feed->feed(sink); },
        [feed](bool) { feed->close(); });
}

} // namespace turboquant::serve
