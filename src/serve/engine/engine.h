// Continuous batching: one thread owns the context; each step decodes one token of every running answer and a piece of
// the prompts that wait, in one batch.
#pragma once

#include "llm/context.h"
#include "serve/engine/observer.h"
#include "serve/engine/prefix_cache.h"
#include "serve/engine/request.h"
#include "serve/engine/session_store.h"
#include "serve/engine/slot.h"
#include "serve/engine/step_budget.h"

#include <atomic>
#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

namespace turboquant::serve {

struct EngineOptions {
    llm::KvChoice kv;
    llm::CachePlan plan; // of one slot
    int slots = 1;
    int threads = 0;               // 0: default_threads()
    int64_t queue = 64;            // requests that may wait for a slot
    double step_seconds = 0.1;     // a step's length while answers are being written
    SessionStore* store = nullptr; // null: none. Must outlive the engine
    double store_after = 2;        // seconds after which an idle slot is saved
};

struct EngineStatus {
    int slots = 0;
    int busy = 0;
    int64_t waiting = 0;
    int64_t cached_tokens = 0; // in all slots
    int64_t context = 0;       // of one slot
    int64_t kv_bytes = 0;      // of all slots when full
    int64_t kv_f16_bytes = 0;  // the same in f16

    // The part of `bytes` (of all slots) that so many tokens take.
    int64_t share(int64_t bytes, int64_t tokens) const {
        const double capacity = static_cast<double>(context) * slots;
        return static_cast<int64_t>(static_cast<double>(bytes) * static_cast<double>(tokens) / capacity);
    }
};

class Engine {
public:
    enum class Submit { accepted, full, stopping };

    // Makes the context and starts the thread. Error as make_context(). Model, store and observer must outlive it.
    Engine(const llm::Model& model, const EngineOptions& options, Observer& observer);
    ~Engine();
    Engine(const Engine&) = delete;
    Engine& operator=(const Engine&) = delete;

    // Hands a request over; its stream tells the rest. Thread-safe, as all below.
    Submit submit(Request request);
    EngineStatus status() const;
    int64_t context() const { return context_; }
    // Seconds after which a slot is likely to be free, for a client that was turned away.
    int retry_after() const;
    // Takes no more requests, finishes those it has until `until`, ends the others, saves the slots and ends the thread.
    void drain(Clock::time_point until);

private:
    void run();
    bool idle() const;
    void drop_gone();
    void admit();
    void place_job(Request request);
    void keep_prefix(Slot& slot, int64_t keep);
    bool restore(Slot& slot, const std::vector<llm::Token>& prompt, int64_t more_than);
    void clear(Slot& slot);
    void save(Slot& slot);
    void save_idle();
    void step();
    void choose_token(Slot& slot, int32_t output);
    void finish(Slot& slot, Finish reason);
    void fail(Slot& slot, Failure failure);
    void end(Slot& slot, Event event, std::string_view outcome);
    void release(Slot& slot, std::string_view outcome);
    void publish();

    const llm::Model& model_;
    EngineOptions options_;
    Observer& observer_;
    int64_t batch_limit_;
    llm::Context llama_;
    int64_t context_ = 0;
    bool can_copy_ = false;
    std::unique_ptr<llama_batch, void (*)(llama_batch*)> batch_;

    // The thread's own.
    std::vector<Slot> slots_;
    StepBudget budget_;
    int64_t ticks_ = 0;

    mutable std::mutex mutex_; // guards what follows
    std::condition_variable changed_;
    std::deque<Request> queue_;
    int64_t inside_ = 0; // requests waiting or in a slot
    bool stopping_ = false;
    Clock::time_point stop_at_;
    double answer_seconds_ = 1; // running mean of what an answer takes in its slot

    std::atomic<int> busy_{0};
    std::atomic<int64_t> cached_tokens_{0};
    std::thread thread_;
};

} // namespace turboquant::serve
