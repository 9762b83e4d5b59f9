#include "serve/engine/engine.h"

#include "llm/error.h"
#include "llm/log.h"
#include "serve/engine/scores.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include <fmt/format.h>

namespace turboquant::serve {
namespace {

double milliseconds(Clock::duration duration) {
    return std::chrono::duration<double, std::milli>(duration).count();
}

double seconds(Clock::duration duration) {
    return std::chrono::duration<double>(duration).count();
}

void add(llama_batch& batch, llm::Token token, size_t position, llama_seq_id sequence, bool scores) {
    const int32_t i = batch.n_tokens++;
    batch.token[i] = token;
    batch.pos[i] = static_cast<llama_pos>(position);
    batch.n_seq_id[i] = 1;
    batch.seq_id[i][0] = sequence;
    batch.logits[i] = scores ? 1 : 0;
}

void free_batch(llama_batch* batch) {
    llama_batch_free(*batch);
    delete batch;
}

} // namespace

Engine::Engine(const llm::Model& model, const EngineOptions& options, Observer& observer)
    : model_(model),
      options_(options),
      observer_(observer),
      batch_limit_(std::max<int64_t>(llm::kBatch, options.slots)),
      llama_(llm::make_context(model, {.kv = options.kv,
                                       .plan = options.plan,
                                       .sequences = options.slots,
                                       .batch = batch_limit_,
                                       .threads = options.threads})),
      batch_(new llama_batch(llama_batch_init(static_cast<int32_t>(batch_limit_), 0, 1)), &free_batch),
      slots_(static_cast<size_t>(options.slots)),
      budget_(options.step_seconds, batch_limit_) {
    context_ = llama_n_ctx_seq(llama_.handle.get());
    // A copy is cut to the prefix afterwards, which recurrent state and a window that has moved on do not allow.
    can_copy_ = llama_.window == 0 && !llama_model_is_recurrent(model.get()) && !llama_model_is_hybrid(model.get());
    for (int i = 0; i < options.slots; ++i) {
        slots_[static_cast<size_t>(i)].sequence = i;
    }
    thread_ = std::thread([this] { run(); });
}

Engine::~Engine() {
    drain(Clock::now());
}

Engine::Submit Engine::submit(Request request) {
    {
        const std::lock_guard lock(mutex_);
        if (stopping_) {
            return Submit::stopping;
        }
        if (inside_ >= options_.slots + options_.queue) {
            return Submit::full;
        }
        ++inside_;
        queue_.push_back(std::move(request));
    }
    changed_.notify_all();
    return Submit::accepted;
}

EngineStatus Engine::status() const {
    EngineStatus status;
    status.slots = options_.slots;
    status.busy = busy_;
    status.cached_tokens = cached_tokens_;
    status.context = context_;
    status.kv_bytes = llama_.kv_bytes;
    status.kv_f16_bytes = llama_.kv_f16_bytes;
    const std::lock_guard lock(mutex_);
    status.waiting = static_cast<int64_t>(queue_.size());
    return status;
}

int Engine::retry_after() const {
    const std::lock_guard lock(mutex_);
    const double turns = static_cast<double>(queue_.size()) / options_.slots;
    return static_cast<int>(std::clamp(std::ceil(turns * answer_seconds_), 1.0, 60.0));
}

void Engine::drain(Clock::time_point until) {
    {
        const std::lock_guard lock(mutex_);
        stopping_ = true;
        stop_at_ = until;
    }
    changed_.notify_all();
    if (thread_.joinable()) {
        thread_.join();
    }
}

bool Engine::idle() const {
    return std::none_of(slots_.begin(), slots_.end(), [](const Slot& slot) { return slot.job.has_value(); });
}

void Engine::run() {
    for (;;) {
        {
            std::unique_lock lock(mutex_);
            if (idle() && queue_.empty() && !stopping_) {
                const bool unsaved = options_.store != nullptr &&
                                     std::any_of(slots_.begin(), slots_.end(), [](const Slot& s) { return !s.stored; });
                const auto woken = [&] { return !queue_.empty() || stopping_; };
                if (unsaved) {
                    changed_.wait_for(lock, std::chrono::milliseconds(200), woken);
                } else {
                    changed_.wait(lock, woken);
                }
            }
            if (stopping_ && ((idle() && queue_.empty()) || Clock::now() >= stop_at_)) {
                break;
            }
        }
        try {
            drop_gone();
            admit();
            if (!idle()) {
                step();
            }
            save_idle();
        } catch (const std::exception& error) { // out of memory: what runs is lost, the server is not
            for (Slot& slot : slots_) {
                if (slot.job) {
                    clear(slot);
                    fail(slot, {Failure::Kind::internal, fmt::format("the server failed: {}", error.what())});
                }
            }
        }
        publish();
    }
    const Failure stopping{Failure::Kind::stopping, "the server is shutting down"};
    for (Slot& slot : slots_) {
        if (slot.job) {
            fail(slot, stopping);
        }
    }
    std::deque<Request> rest;
    {
        const std::lock_guard lock(mutex_);
        rest.swap(queue_);
        inside_ = 0;
    }
    for (Request& request : rest) {
        request.stream->push({.kind = Event::Kind::failed, .failure = stopping});
        observer_.answer_over("failed");
    }
    for (Slot& slot : slots_) {
        save(slot);
    }
    publish();
}

void Engine::publish() {
    int64_t tokens = 0;
    int busy = 0;
    for (const Slot& slot : slots_) {
        tokens += static_cast<int64_t>(slot.cached.size());
        busy += slot.job ? 1 : 0;
    }
    cached_tokens_ = tokens;
    busy_ = busy;
}

// Ends what nobody waits for any more, in slots and in the queue.
void Engine::drop_gone() {
    const auto now = Clock::now();
    const Failure late{Failure::Kind::timeout, "the request took longer than this server allows"};
    for (Slot& slot : slots_) {
        if (!slot.job) {
            continue;
        }
        if (slot.job->request.stream->cancelled()) {
            release(slot, "cancelled");
        } else if (now >= slot.job->request.deadline) {
            fail(slot, late);
        }
    }
    std::vector<Request> timed_out;
    int64_t cancelled = 0;
    {
        const std::lock_guard lock(mutex_);
        for (auto it = queue_.begin(); it != queue_.end();) {
            const bool gone = it->stream->cancelled();
            if (!gone && now < it->deadline) {
                ++it;
                continue;
            }
            if (gone) {
                ++cancelled;
            } else {
                timed_out.push_back(std::move(*it));
            }
            it = queue_.erase(it);
            --inside_;
        }
    }
    for (; cancelled > 0; --cancelled) {
        observer_.answer_over("cancelled");
    }
    for (const Request& request : timed_out) {
        request.stream->push({.kind = Event::Kind::failed, .failure = late});
        observer_.answer_over("timeout");
    }
}

void Engine::admit() {
    while (std::any_of(slots_.begin(), slots_.end(), [](const Slot& slot) { return !slot.job; })) {
        std::optional<Request> request;
        {
            const std::lock_guard lock(mutex_);
            if (queue_.empty()) {
                return;
            }
            request.emplace(std::move(queue_.front()));
            queue_.pop_front();
        }
        const std::shared_ptr<AnswerStream> stream = request->stream;
        try {
            place_job(std::move(*request));
        } catch (const std::exception& error) {
            {
                const std::lock_guard lock(mutex_);
                --inside_;
            }
            stream->push({.kind = Event::Kind::failed,
                          .failure = {Failure::Kind::internal, fmt::format("the server failed: {}", error.what())}});
            observer_.answer_over("failed");
        }
    }
}

void Engine::place_job(Request request) {
    Placement placement;
    std::vector<SlotView> views;
    for (const Slot& slot : slots_) {
        views.push_back({slot.cached, slot.job.has_value(), slot.last_used});
    }
    placement = place(request.tokens, views, can_copy_);
    if (!request.reuse) {
        placement.keep = 0;
        placement.copy_from = -1;
    }
    Slot& slot = slots_[static_cast<size_t>(placement.slot)];
    if (placement.keep < static_cast<int64_t>(slot.cached.size()) || placement.copy_from >= 0) {
        save(slot); // something of it is about to be lost
    }
    if (!request.reuse || !restore(slot, request.tokens, placement.keep)) {
        if (placement.copy_from >= 0) {
            const Slot& source = slots_[static_cast<size_t>(placement.copy_from)];
            llama_memory_seq_cp(llama_get_memory(llama_.handle.get()), source.sequence, slot.sequence, -1, -1);
            slot.cached = source.cached;
        }
        keep_prefix(slot, placement.keep);
    }
    Job job(std::move(request));
    job.order = ++ticks_;
    job.placed = Clock::now();
    job.stats.prompt_tokens = static_cast<int64_t>(job.request.tokens.size());
    job.stats.cached_tokens = static_cast<int64_t>(slot.cached.size());
    job.stats.queue_ms = milliseconds(job.placed - job.request.arrived);
    if (!job.request.sampling.plain_greedy()) {
        job.sampler = llm::make_sampler(job.request.sampling, model_.vocabulary());
        if (job.request.sampling.penalties()) {
            const auto& tokens = job.request.tokens;
            const size_t last = static_cast<size_t>(job.request.sampling.penalty_last);
            for (size_t i = tokens.size() - std::min(tokens.size(), last); i < tokens.size(); ++i) {
                llama_sampler_accept(job.sampler.get(), tokens[i]);
            }
        }
    }
    observer_.prompt_placed(job.stats.prompt_tokens, job.stats.cached_tokens);
    slot.job.emplace(std::move(job));
    slot.stored = false;
    publish();
}

void Engine::clear(Slot& slot) {
    llama_memory_seq_rm(llama_get_memory(llama_.handle.get()), slot.sequence, -1, -1);
    slot.cached.clear();
    slot.stored = true;
}

// Cuts the slot's cache to its first `keep` tokens or fewer, or to nothing where the memory cannot.
void Engine::keep_prefix(Slot& slot, int64_t keep) {
    const auto size = static_cast<int64_t>(slot.cached.size());
    if (keep >= size) {
        return;
    }
    const int64_t kept = llama_.cut(slot.sequence, size, keep);
    if (kept == 0) {
        clear(slot);
        return;
    }
    slot.cached.resize(static_cast<size_t>(kept));
}

// Fetches a saved sequence that goes further than what memory has. False: none, the slot is as it was.
bool Engine::restore(Slot& slot, const std::vector<llm::Token>& prompt, int64_t more_than) {
    if (options_.store == nullptr) {
        return false;
    }
    const auto size = static_cast<int64_t>(prompt.size());
    std::optional<SavedSequence> saved = options_.store->load(prompt, more_than + kWorthSaving);
    if (!saved) {
        return false;
    }
    const auto n = static_cast<int64_t>(saved->tokens.size());
    if (n > context_) {
        options_.store->forget(saved->tokens, fmt::format("holds {} tokens, a slot here {}", n, context_));
        return false;
    }
    clear(slot);
    llama_context* context = llama_.handle.get();
    const llm::LogCapture log; // libllama's complaints about a state are not the user's business: the prompt is read
    if (llama_state_seq_set_data(context, saved->state.data(), saved->state.size(), slot.sequence) == 0 ||
        llama_memory_seq_pos_max(llama_get_memory(context), slot.sequence) + 1 != static_cast<llama_pos>(n)) {
        clear(slot);
        options_.store->forget(saved->tokens, log.reason("libllama refuses its state"));
        return true; // the slot is empty now, so there is no prefix to keep
    }
    slot.cached = std::move(saved->tokens);
    keep_prefix(slot, std::min(llm::common_prefix(prompt, slot.cached), size - 1));
    return true;
}

void Engine::save(Slot& slot) {
    if (options_.store == nullptr || slot.stored) {
        return;
    }
    slot.stored = true;
    if (static_cast<int64_t>(slot.cached.size()) < kWorthSaving) {
        return;
    }
    llama_context* context = llama_.handle.get();
    std::vector<uint8_t> state(llama_state_seq_get_size(context, slot.sequence));
    state.resize(llama_state_seq_get_data(context, state.data(), state.size(), slot.sequence));
    if (!state.empty()) {
        options_.store->save(slot.cached, std::move(state));
    }
}

// At most one a call, so that running answers wait for one only.
void Engine::save_idle() {
    if (options_.store == nullptr) {
        return;
    }
    const auto now = Clock::now();
    for (Slot& slot : slots_) {
        if (!slot.job && !slot.stored && seconds(now - slot.idle_since) >= options_.store_after) {
            save(slot);
            return;
        }
    }
}

void Engine::step() {
    int decoding = 0;
    std::vector<Slot*> reading;
    for (Slot& slot : slots_) {
        decoding += slot.decoding() ? 1 : 0;
        if (slot.reading()) {
            reading.push_back(&slot);
        }
    }
    // Who came first is read first: that gives the shortest time to the first token on average.
    std::sort(reading.begin(), reading.end(),
              [](const Slot* a, const Slot* b) { return a->job->order < b->job->order; });
    int64_t room = std::min(budget_.prompt_tokens(decoding), batch_limit_ - decoding);
    std::vector<int64_t> pieces(slots_.size(), 0);
    int64_t prompt_tokens = 0;
    for (const Slot* slot : reading) {
        const int64_t n = std::min(room, slot->unread());
        pieces[static_cast<size_t>(slot->sequence)] = n;
        room -= n;
        prompt_tokens += n;
    }
    // In the order of sequences: libllama puts neighbours into one graph.
    llama_batch& batch = *batch_;
    batch.n_tokens = 0;
    std::vector<int32_t> outputs(slots_.size(), -1);
    std::vector<Slot*> taking_part;
    for (Slot& slot : slots_) {
        const auto i = static_cast<size_t>(slot.sequence);
        if (slot.decoding()) {
            outputs[i] = batch.n_tokens;
            add(batch, *slot.job->next, slot.cached.size(), slot.sequence, true);
            taking_part.push_back(&slot);
        } else if (pieces[i] > 0) {
            const auto& tokens = slot.job->request.tokens;
            const size_t begin = slot.cached.size();
            const size_t end = begin + static_cast<size_t>(pieces[i]);
            for (size_t at = begin; at < end; ++at) {
                add(batch, tokens[at], at, slot.sequence, at + 1 == tokens.size());
            }
            outputs[i] = end == tokens.size() ? batch.n_tokens - 1 : -1;
            taking_part.push_back(&slot);
        }
    }
    const auto start = Clock::now();
    int32_t result = 0;
    std::string reason;
    {
        const llm::LogCapture log;
        result = llama_decode(llama_.handle.get(), batch);
        llama_synchronize(llama_.handle.get());
        if (result != 0) {
            reason = log.reason("libllama gave no reason");
        }
    }
    if (result != 0) {
        for (Slot* slot : taking_part) {
            clear(*slot);
            fail(*slot, {Failure::Kind::internal, fmt::format("the model failed: {}", reason)});
        }
        return;
    }
    budget_.record(prompt_tokens, decoding, seconds(Clock::now() - start));
    for (Slot* slot : taking_part) {
        const auto i = static_cast<size_t>(slot->sequence);
        if (slot->decoding()) {
            slot->cached.push_back(*slot->job->next);
        } else {
            const auto& tokens = slot->job->request.tokens;
            const auto begin = tokens.begin() + static_cast<std::ptrdiff_t>(slot->cached.size());
            slot->cached.insert(slot->cached.end(), begin, begin + pieces[i]);
        }
        if (outputs[i] >= 0) {
            choose_token(*slot, outputs[i]);
        }
    }
}

void Engine::choose_token(Slot& slot, int32_t output) {
    Job& job = *slot.job;
    llama_context* context = llama_.handle.get();
    const std::span<const float> logits(llama_get_logits_ith(context, output),
                                        static_cast<size_t>(model_.vocabulary()));
    const llm::Token token = job.sampler ? llama_sampler_sample(job.sampler.get(), context, output) : likeliest(logits);
    const auto now = Clock::now();
    const auto before = std::exchange(job.last, now);
    if (!job.next) {
        job.first = now;
        job.stats.prompt_ms = milliseconds(now - job.placed);
    }
    if (model_.ends_answer(token)) {
        finish(slot, Finish::stop);
        return;
    }
    if (!job.next) {
        observer_.first_token(seconds(now - job.request.arrived));
    } else {
        observer_.next_token(seconds(now - before));
    }
    ++job.stats.answer_tokens;
    job.next = token;
    std::optional<TokenScore> score;
    if (job.request.scores) {
        score = score_token(model_, logits, token, job.request.top_scores);
    }
    AnswerText::Piece piece = job.text.push(model_.piece(token), std::move(score));
    if (!piece.empty()) {
        job.request.stream->push({.kind = Event::Kind::piece, .piece = std::move(piece)});
    }
    if (job.text.stopped()) {
        finish(slot, Finish::stop);
    } else if ((job.request.limit >= 0 && job.stats.answer_tokens >= job.request.limit) ||
               static_cast<int64_t>(slot.cached.size()) >= context_) {
        finish(slot, Finish::length);
    }
}

void Engine::finish(Slot& slot, Finish reason) {
    Job& job = *slot.job;
    AnswerText::Piece rest = job.text.finish();
    if (job.text.stopped()) {
        reason = Finish::stop; // a stop string that only the last character completed
    }
    job.stats.answer_ms = milliseconds(job.last - job.first);
    job.stats.context_used = static_cast<int64_t>(slot.cached.size());
    Event done = {.kind = Event::Kind::done, .piece = std::move(rest), .finish = reason, .stats = job.stats};
    end(slot, std::move(done), reason == Finish::stop ? "stop" : "length");
}

void Engine::fail(Slot& slot, Failure failure) {
    const bool late = failure.kind == Failure::Kind::timeout;
    end(slot, {.kind = Event::Kind::failed, .failure = std::move(failure)}, late ? "timeout" : "failed");
}

// The last event goes out when the slot is free: whoever has read it finds a place for the next request.
void Engine::end(Slot& slot, Event event, std::string_view outcome) {
    const std::shared_ptr<AnswerStream> stream = slot.job->request.stream;
    release(slot, outcome);
    stream->push(std::move(event));
}

void Engine::release(Slot& slot, std::string_view outcome) {
    const double took = seconds(Clock::now() - slot.job->placed);
    slot.job.reset();
    slot.last_used = ++ticks_;
    slot.idle_since = Clock::now();
    publish();
    observer_.answer_over(outcome);
    const std::lock_guard lock(mutex_);
    --inside_;
    answer_seconds_ = 0.8 * answer_seconds_ + 0.2 * took;
}

} // namespace turboquant::serve
