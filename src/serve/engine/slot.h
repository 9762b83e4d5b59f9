// One sequence of the context: what its cache holds and the answer that is being written into it.
#pragma once

#include "llm/sampling.h"
#include "serve/engine/answer_text.h"
#include "serve/engine/request.h"

#include <cstdint>
#include <optional>
#include <vector>

namespace turboquant::serve {

// A request that has its slot. The prompt is read as far as the slot's cache goes.
struct Job {
    explicit Job(Request asked) : request(std::move(asked)), text(request.stops) {}

    Request request;
    AnswerText text;
    llm::Sampler sampler; // null: plain greedy
    AnswerStats stats;
    std::optional<llm::Token> next; // chosen, not in the cache yet; absent: the prompt is still being read
    int64_t order = 0;              // of arrival in a slot
    Clock::time_point placed;
    Clock::time_point first;
    Clock::time_point last;
};

struct Slot {
    llama_seq_id sequence = 0;
    std::vector<llm::Token> cached; // in order
    std::optional<Job> job;
    int64_t last_used = 0; // ticks
    Clock::time_point idle_since;
    bool stored = true; // the session store has all of `cached`, or there is nothing in it

    bool decoding() const { return job && job->next; }
    bool reading() const { return job && !job->next; }
    int64_t unread() const { return static_cast<int64_t>(job->request.tokens.size() - cached.size()); }
};

} // namespace turboquant::serve
