#include "bench_load.h"

#include "llm/error.h"
#include "llm/evaluation.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <condition_variable>
#include <mutex>
#include <random>
#include <thread>

#include <fmt/format.h>

namespace turboquant::app {
namespace {

// Of all prompts of this process and of others before it, which a server may have cached.
uint64_t next_seed() {
    static std::atomic<uint64_t> next{std::random_device{}() * uint64_t{1000000}};
    return next++;
}

void require(const StreamedAnswer& answer) {
    if (!answer.error.empty()) {
        throw llm::Error(answer.error);
    }
    if (answer.arrivals.empty()) {
        throw llm::Error("the server's answer was empty, so nothing can be timed");
    }
}

void add_gaps(const StreamedAnswer& answer, std::vector<double>& gaps) {
    for (size_t i = 1; i < answer.arrivals.size(); ++i) {
        gaps.push_back((answer.arrivals[i] - answer.arrivals[i - 1]) * 1000);
    }
}

} // namespace

PromptMaker::PromptMaker(const Endpoint& endpoint) {
    constexpr int64_t kFew = 50;
    constexpr int64_t kMany = 250;
    const StreamedAnswer few = complete(endpoint, words_of(next_seed(), kFew), 1);
    require(few);
    const StreamedAnswer many = complete(endpoint, words_of(next_seed(), kMany), 1);
    require(many);
    tokens_a_word_ = static_cast<double>(many.prompt_tokens - few.prompt_tokens) / (kMany - kFew);
    if (tokens_a_word_ <= 0.2) {
        throw llm::Error(
            fmt::format("{}: says that 50 words are {} tokens and 250 words {}; cannot make prompts of a given "
                        "length",
                        endpoint.url, few.prompt_tokens, many.prompt_tokens));
    }
}

std::string PromptMaker::make(int64_t tokens) {
    constexpr double kOfSeed = 12; // the number at the start takes about as many tokens
    const double words = std::max(1.0, (static_cast<double>(tokens) - kOfSeed) / tokens_a_word_);
    return words_of(next_seed(), std::llround(words) + 1);
}

LoadResult run_load(const Endpoint& endpoint, PromptMaker& prompts, int clients, int requests, int64_t prompt_tokens,
                    int64_t answer_tokens) {
    std::vector<std::vector<std::string>> texts(static_cast<size_t>(clients));
    for (auto& list : texts) {
        for (int i = 0; i < requests; ++i) {
            list.push_back(prompts.make(prompt_tokens));
        }
    }
    std::vector<std::vector<StreamedAnswer>> answers(static_cast<size_t>(clients));
    std::atomic<bool> running{true};
    std::vector<std::thread> threads;
    const double start = now_seconds();
    for (size_t c = 0; c < answers.size(); ++c) {
        threads.emplace_back([&, c] {
            for (const std::string& text : texts[c]) {
                answers[c].push_back(complete(endpoint, text, answer_tokens, &running));
                if (!answers[c].back().error.empty()) {
                    running = false; // the figures are void: the others need not go on
                }
                if (!running) {
                    return;
                }
            }
        });
    }
    for (std::thread& thread : threads) {
        thread.join();
    }
    LoadResult result;
    for (const auto& list : answers) { // first what failed: the others were only stopped
        for (const StreamedAnswer& answer : list) {
            if (!answer.error.empty()) {
                require(answer);
            }
        }
    }
    double end = start;
    for (const auto& list : answers) {
        for (const StreamedAnswer& answer : list) {
            require(answer);
            end = std::max(end, answer.arrivals.back());
            result.answer_tokens += answer.answer_tokens;
            result.prompt_tokens += answer.prompt_tokens;
            result.first_token_ms.push_back(answer.first_token() * 1000);
            add_gaps(answer, result.between_tokens_ms);
        }
    }
    result.seconds = end - start;
    return result;
}

PrefixResult run_prefix(const Endpoint& endpoint, PromptMaker& prompts, int64_t tokens) {
    const std::string prefix = prompts.make(tokens);
    PrefixResult result;
    const StreamedAnswer first = complete(endpoint, prefix + " First question: what is this about?", 4);
    require(first);
    result.uncached_ms = first.first_token() * 1000;
    const StreamedAnswer second = complete(endpoint, prefix + " Second question: how long is this text?", 4);
    require(second);
    result.cached_ms = second.first_token() * 1000;
    result.prefix_tokens = first.prompt_tokens;
    result.cached_tokens = second.cached_tokens;
    return result;
}

StallResult run_stall(const Endpoint& endpoint, PromptMaker& prompts, int streams, int64_t tokens) {
    constexpr int64_t kAnswer = 512;
    constexpr size_t kWarm = 24;
    std::vector<std::vector<StreamedAnswer>> answers(static_cast<size_t>(streams));
    std::atomic<bool> running{true};
    std::mutex mutex;
    std::condition_variable changed;
    std::vector<size_t> pieces(answers.size(), 0);
    size_t ended = 0;
    std::vector<std::thread> threads;
    for (size_t s = 0; s < answers.size(); ++s) {
        threads.emplace_back([&, s] {
            while (running) { // an answer may end by itself: then comes another
                answers[s].push_back(complete(endpoint, prompts.make(32), kAnswer, &running, [&, s] {
                    const std::lock_guard lock(mutex);
                    ++pieces[s];
                    changed.notify_all();
                }));
                if (!answers[s].back().error.empty()) {
                    break;
                }
            }
            const std::lock_guard lock(mutex);
            ++ended;
            changed.notify_all();
        });
    }
    const auto wait_for_pieces = [&](size_t more) {
        std::unique_lock lock(mutex);
        const std::vector<size_t> now = pieces;
        changed.wait(lock, [&] {
            bool all = true;
            for (size_t s = 0; s < pieces.size(); ++s) {
                all = all && pieces[s] >= now[s] + more;
            }
            return all || ended > 0;
        });
    };
    wait_for_pieces(kWarm);
    const StreamedAnswer reading = complete(endpoint, prompts.make(tokens), 1);
    wait_for_pieces(1); // so that a stall that outlasts the reading is seen whole
    running = false;
    for (std::thread& thread : threads) {
        thread.join();
    }
    require(reading);
    for (const auto& list : answers) {
        for (const StreamedAnswer& answer : list) {
            if (!answer.error.empty()) {
                require(answer);
            }
        }
    }
    StallResult result;
    result.prompt_tokens = reading.prompt_tokens;
    result.read_ms = reading.first_token() * 1000;
    const double from = reading.sent;
    const double to = reading.arrivals.front();
    std::vector<double> before;
    for (const auto& list : answers) {
        for (const StreamedAnswer& answer : list) {
            for (size_t i = 1; i < answer.arrivals.size(); ++i) {
                const double gap = (answer.arrivals[i] - answer.arrivals[i - 1]) * 1000;
                if (answer.arrivals[i] <= from) {
                    before.push_back(gap);
                } else if (answer.arrivals[i - 1] <= to) {
                    result.between_ms.push_back(gap);
                    result.stall_ms = std::max(result.stall_ms, gap);
                }
            }
        }
    }
    if (result.between_ms.empty()) {
        throw llm::Error("the other streams got nothing while the long prompt was read: there is no stall to measure");
    }
    result.usual_ms = before.empty() ? 0 : llm::quantile(before, 0.5);
    return result;
}

int64_t count_held(const Endpoint& endpoint, PromptMaker& prompts, int64_t conversations, int64_t tokens) {
    constexpr int64_t kNotHeld = 256;
    std::vector<std::string> texts;
    for (int64_t i = 0; i < conversations; ++i) {
        texts.push_back(prompts.make(tokens));
        const StreamedAnswer answer = complete(endpoint, texts.back(), 1);
        require(answer);
    }
    int64_t held = 0;
    for (const std::string& text : texts) {
        const StreamedAnswer answer = complete(endpoint, text + " And then?", 1);
        require(answer);
        held += answer.cached_tokens >= answer.prompt_tokens - kNotHeld ? 1 : 0;
    }
    return held;
}

} // namespace turboquant::app
