#include "bench_client.h"

#include <array>
#include <chrono>
#include <random>

#include <fmt/format.h>
#include <httplib.h>

namespace turboquant::app {
namespace {

using nlohmann::json;
constexpr time_t kPatience = 600; // seconds: a long prompt on a slow machine

httplib::Headers headers_of(const Endpoint& endpoint) {
    httplib::Headers headers;
    if (!endpoint.key.empty()) {
        headers.emplace("Authorization", "Bearer " + endpoint.key);
    }
    return headers;
}

// Server-sent events: lines of "data: JSON", events apart by an empty line.
class Events {
public:
    explicit Events(StreamedAnswer& answer, const std::function<void()>& on_piece)
        : answer_(answer), on_piece_(on_piece) {}

    void push(const char* data, size_t bytes) {
        held_.append(data, bytes);
        for (size_t end = held_.find('\n'); end != std::string::npos; end = held_.find('\n')) {
            line(held_.substr(0, end));
            held_.erase(0, end + 1);
        }
    }
    bool done() const { return done_; }
    // What came in place of events: an error's JSON.
    const std::string& rest() const { return held_; }

private:
    void line(std::string text) {
        if (!text.empty() && text.back() == '\r') {
            text.pop_back();
        }
        if (text.rfind("data:", 0) != 0) {
            if (text.rfind("error:", 0) == 0) {
                answer_.error = text;
            }
            return;
        }
        text.erase(0, 5);
        text.erase(0, text.find_first_not_of(' '));
        if (text == "[DONE]") {
            done_ = true;
            return;
        }
        const json event = json::parse(text, nullptr, false);
        if (event.is_discarded() || event.contains("error")) {
            answer_.error = text.substr(0, 300);
            return;
        }
        if (const auto choices = event.find("choices");
            choices != event.end() && choices->is_array() && !choices->empty()) {
            const json& choice = choices->front();
            const std::string piece = choice.value("text", std::string());
            if (!piece.empty()) {
                answer_.arrivals.push_back(now_seconds());
                answer_.text += piece;
                if (on_piece_) {
                    on_piece_();
                }
            }
            if (const auto reason = choice.find("finish_reason"); reason != choice.end() && reason->is_string()) {
                answer_.finish_reason = reason->get<std::string>();
            }
        }
        if (const auto usage = event.find("usage"); usage != event.end() && usage->is_object()) {
            answer_.prompt_tokens = usage->value("prompt_tokens", int64_t{0});
            answer_.answer_tokens = usage->value("completion_tokens", int64_t{0});
            if (const auto details = usage->find("prompt_tokens_details");
                details != usage->end() && details->is_object()) {
                answer_.cached_tokens = details->value("cached_tokens", int64_t{-1});
            }
        }
        if (const auto timings = event.find("timings"); // llama-server's
            answer_.cached_tokens < 0 && timings != event.end() && timings->is_object()) {
            answer_.cached_tokens = timings->value("cache_n", int64_t{-1});
        }
    }

    StreamedAnswer& answer_;
    const std::function<void()>& on_piece_;
    std::string held_;
    bool done_ = false;
};

} // namespace

double now_seconds() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

StreamedAnswer complete(const Endpoint& endpoint, const std::string& prompt, int64_t answer_tokens,
                        const std::atomic<bool>* running, const std::function<void()>& on_piece) {
    StreamedAnswer answer;
    Events events(answer, on_piece);
    httplib::Client client(endpoint.url);
    client.set_read_timeout(kPatience);
    client.set_tcp_nodelay(true);
    httplib::Request request;
    request.method = "POST";
    request.path = "/v1/completions";
    request.headers = headers_of(endpoint);
    request.headers.emplace("Content-Type", "application/json");
    request.body = json{{"prompt", prompt},
                        {"max_tokens", answer_tokens},
                        {"temperature", 0},
                        {"stream", true},
                        {"stream_options", {{"include_usage", true}}}}
                       .dump();
    bool hung_up = false;
    request.content_receiver = [&](const char* data, size_t bytes, uint64_t /*offset*/, uint64_t /*length*/) {
        events.push(data, bytes);
        hung_up = running != nullptr && !running->load();
        return !hung_up;
    };
    httplib::Response response;
    httplib::Error error = httplib::Error::Success;
    answer.sent = now_seconds();
    const bool sent = client.send(request, response, error);
    answer.ended = now_seconds();
    if (hung_up) {
        return answer;
    }
    if (!sent) {
        answer.error = fmt::format("{}: {}", endpoint.url, httplib::to_string(error));
    } else if (response.status != 200) {
        answer.error = fmt::format("{}: status {}: {}", endpoint.url, response.status,
                                   (events.rest() + response.body).substr(0, 300));
    } else if (answer.error.empty() && !events.done()) {
        answer.error = fmt::format("{}: the stream ended before its end", endpoint.url);
    }
    return answer;
}

json get_json(const Endpoint& endpoint, const std::string& path) {
    httplib::Client client(endpoint.url);
    client.set_read_timeout(10);
    const httplib::Result result = client.Get(path, headers_of(endpoint));
    return json::parse(result && result->status == 200 ? result->body : std::string(), nullptr, false);
}

int health(const Endpoint& endpoint) {
    httplib::Client client(endpoint.url);
    client.set_connection_timeout(1);
    client.set_read_timeout(5);
    const httplib::Result result = client.Get("/health");
    return result ? result->status : -1;
}

std::string words_of(uint64_t seed, int64_t words) {
    static constexpr std::array<const char*, 64> kWords = {
        "time",  "year",   "people", "way",     "day",     "man",     "thing",    "woman",   "life",       "child",
        "world", "school", "state",  "family",  "student", "group",   "country",  "problem", "hand",       "part",
        "place", "case",   "week",   "company", "system",  "program", "question", "work",    "government", "number",
        "night", "point",  "home",   "water",   "room",    "mother",  "area",     "money",   "story",      "fact",
        "month", "lot",    "right",  "study",   "book",    "eye",     "job",      "word",    "business",   "issue",
        "side",  "kind",   "head",   "house",   "service", "friend",  "father",   "power",   "hour",       "game",
        "line",  "end",    "member", "law"};
    std::mt19937_64 random(seed);
    std::string text = fmt::format("{}", seed); // first of all, so that no two prompts begin alike
    for (int64_t i = 1; i < words; ++i) {
        text += ' ';
        text += kWords[random() % kWords.size()];
    }
    return text;
}

} // namespace turboquant::app
