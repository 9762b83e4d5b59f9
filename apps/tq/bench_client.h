// A client of an OpenAI-compatible server that notes when each token came. For benchmarks of servers.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>

namespace turboquant::app {

struct Endpoint {
    std::string url; // "http://127.0.0.1:8080"
    std::string key; // bearer; empty: none
};

// Seconds of a clock that only goes forward.
double now_seconds();

// A streamed completion. Times are now_seconds().
struct StreamedAnswer {
    std::string error; // empty: it ended as it should
    std::string text;
    std::string finish_reason;
    double sent = 0;
    double ended = 0;
    std::vector<double> arrivals; // of each piece of text
    int64_t prompt_tokens = 0;
    int64_t answer_tokens = 0;
    int64_t cached_tokens = -1; // of the prompt; -1: the server does not say

    double first_token() const { return arrivals.empty() ? 0 : arrivals.front() - sent; }
};

// POST /v1/completions with temperature 0, streamed. `running`: becomes false to hang up; may be null. on_piece: each time text
// came; may be empty. Blocks until the stream's end. Any number of threads may have one each.
StreamedAnswer complete(const Endpoint& endpoint, const std::string& prompt, int64_t answer_tokens,
                        const std::atomic<bool>* running = nullptr, const std::function<void()>& on_piece = {});

// GET of a JSON text; discarded JSON (is_discarded()) when there is none, or the server is not there.
nlohmann::json get_json(const Endpoint& endpoint, const std::string& path);
// Status of GET /health; -1: nobody answers.
int health(const Endpoint& endpoint);

// Text of common words: the same for the same seed, with another beginning for each. So prompts of different seeds share nothing
// that a server could have cached.
std::string words_of(uint64_t seed, int64_t words);

} // namespace turboquant::app
