// One completion: what is asked of the engine, and what comes back.
#pragma once

#include "llm/sampling.h"
#include "serve/engine/answer_text.h"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

namespace turboquant::serve {

using Clock = std::chrono::steady_clock;

enum class Finish { stop, length };

// Counts and times of one answer.
struct AnswerStats {
    int64_t prompt_tokens = 0;
    int64_t cached_tokens = 0; // of the prompt, not read again
    int64_t answer_tokens = 0;
    double queue_ms = 0;  // waiting for a slot
    double prompt_ms = 0; // from the slot to the first token
    double answer_ms = 0; // from the first token to the last
    int64_t context_used = 0;
};

struct Failure {
    enum class Kind { timeout, stopping, internal };
    Kind kind = Kind::internal;
    std::string message;
};

struct Event {
    enum class Kind { piece, done, failed };
    Kind kind = Kind::piece;
    AnswerText::Piece piece = {};
    Finish finish = Finish::stop; // done
    AnswerStats stats = {};       // done
    Failure failure = {};         // failed
};

// What the engine's thread says to the one that answers the client. Thread-safe.
class AnswerStream {
public:
    void push(Event event);
    // Waits until something is there or `wait` is over; takes all of it.
    std::deque<Event> take(std::chrono::milliseconds wait);
    // The client is gone: the engine drops the request before its next step.
    void cancel() { cancelled_ = true; }
    bool cancelled() const { return cancelled_; }

private:
    std::mutex mutex_;
    std::condition_variable changed_;
    std::deque<Event> events_;
    std::atomic<bool> cancelled_{false};
};

struct Request {
    std::string id;                 // for the log
    std::vector<llm::Token> tokens; // at least one, fewer than the context of a slot
    llm::SamplingOptions sampling;
    int64_t limit = -1; // tokens of the answer; -1: until the context is full
    std::vector<std::string> stops;
    bool scores = false; // log probabilities wanted, with so many of the likeliest
    int top_scores = 0;
    bool reuse = true; // of what caches hold of the prompt
    Clock::time_point arrived;
    Clock::time_point deadline;
    std::shared_ptr<AnswerStream> stream;
};

} // namespace turboquant::serve
