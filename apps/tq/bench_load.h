// The measurements of tq bench serve: what is asked of a server, and what came of it.
#pragma once

#include "bench_client.h"

#include <cstdint>
#include <vector>

namespace turboquant::app {

// How many words of words_of() make a prompt of about as many tokens: found once a server by asking it.
class PromptMaker {
public:
    // Error when the server cannot answer.
    explicit PromptMaker(const Endpoint& endpoint);
    // A prompt of about that many tokens that shares no beginning with any made before.
    std::string make(int64_t tokens);

private:
    double tokens_a_word_ = 1;
};

struct LoadResult {
    double seconds = 0; // from the first request to the last token
    int64_t answer_tokens = 0;
    int64_t prompt_tokens = 0;
    std::vector<double> first_token_ms;
    std::vector<double> between_tokens_ms; // of all streams

    double answer_speed() const { return static_cast<double>(answer_tokens) / seconds; }
};
// `clients` at once, each `requests` one after the other, each of a prompt of its own. Error: a request failed.
LoadResult run_load(const Endpoint& endpoint, PromptMaker& prompts, int clients, int requests, int64_t prompt_tokens,
                    int64_t answer_tokens);

struct PrefixResult {
    double uncached_ms = 0; // to the first token
    double cached_ms = 0;
    int64_t prefix_tokens = 0;
    int64_t cached_tokens = -1; // as the server says; -1: it does not
};
// A prompt of `tokens`, then the same with another question behind it.
PrefixResult run_prefix(const Endpoint& endpoint, PromptMaker& prompts, int64_t tokens);

struct StallResult {
    double read_ms = 0;             // the long prompt, to its first token
    double stall_ms = 0;            // longest time that one of the streams got nothing meanwhile
    double usual_ms = 0;            // median between tokens before
    std::vector<double> between_ms; // all of them meanwhile
    int64_t prompt_tokens = 0;
};
// `streams` answers are running (another follows where one ends); then a prompt of `tokens` comes.
StallResult run_stall(const Endpoint& endpoint, PromptMaker& prompts, int streams, int64_t tokens);

// Gives each of `conversations` a prompt of `tokens`, one after the other, then goes on with each: how many of them were still in
// the cache (all but the last 256 tokens at least).
int64_t count_held(const Endpoint& endpoint, PromptMaker& prompts, int64_t conversations, int64_t tokens);

} // namespace turboquant::app
