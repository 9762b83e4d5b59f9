// The engine of tq serve on a tiny model with random weights: places, deadlines, counts, slots that are used again, states that
// cannot be used.
#include "serve/engine/engine.h"

#include "llm/log.h"
#include "llm/plan.h"
#include "llm/synthetic_model.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <filesystem>
#include <map>
#include <set>
#include <thread>

#include <gtest/gtest.h>
#include <unistd.h>

namespace turboquant::serve {
namespace {

namespace fs = std::filesystem;
using Tokens = std::vector<llm::Token>;
using std::chrono::milliseconds;

const llm::SyntheticShape kTiny = {"tiny", "llama", 2, 256, 4, 2, 64, 256, 320, 10000.0F, ""};
constexpr int64_t kContext = 512;

struct Counts : Observer {
    void prompt_placed(int64_t, int64_t) override {}
    void first_token(double) override {}
    void next_token(double) override {}
    void answer_over(std::string_view outcome) override {
        const std::lock_guard lock(mutex);
        ++outcomes[std::string(outcome)];
    }
    std::mutex mutex;
    std::map<std::string, int> outcomes;
};

// Gives one saved sequence to whoever's prompt begins like it.
struct FakeStore : SessionStore {
    std::optional<SavedSequence> load(std::span<const llm::Token> tokens, int64_t more_than) override {
        const bool fits = llm::common_prefix(saved.tokens, tokens) > more_than;
        if (!fits || std::find(forgotten.begin(), forgotten.end(), saved.tokens) != forgotten.end()) {
            return {};
        }
        ++loads;
        return saved;
    }
    void save(std::span<const llm::Token> tokens, std::vector<uint8_t>) override { saves.push_back(tokens.size()); }
    void forget(std::span<const llm::Token> tokens, std::string_view reason) override {
        forgotten.emplace_back(tokens.begin(), tokens.end());
        reasons.emplace_back(reason);
    }
    SavedSequence saved;
    int loads = 0;
    std::vector<size_t> saves;
    std::vector<Tokens> forgotten;
    std::vector<std::string> reasons;
};

Tokens tokens_of(int n, int first) {
    Tokens tokens;
    for (int i = 0; i < n; ++i) {
        tokens.push_back(10 + (first + i * 7) % 200);
    }
    return tokens;
}

struct Result {
    Event end;
    Tokens tokens; // of the answer
    std::vector<double> scores;
};

// The same answer but for the last bits of its scores.
bool alike(const Result& a, const Result& b) {
    return a.tokens == b.tokens && std::equal(a.scores.begin(), a.scores.end(), b.scores.begin(), b.scores.end(),
                                              [](double x, double y) { return std::abs(x - y) < 1e-3; });
}

class EngineTest : public testing::Test {
protected:
    static void SetUpTestSuite() {
        folder_ = fs::temp_directory_path() / ("tq_engine_test_" + std::to_string(::getpid()));
        fs::create_directories(folder_);
        ::setenv("XDG_CACHE_HOME", folder_.c_str(), 1);
        llm::install_log(false);
        llama_backend_init();
        path_ = llm::synthetic_model(kTiny, {});
        model_ = std::make_unique<llm::Model>(llm::Model::load(path_, false, {}));
    }
    static void TearDownTestSuite() {
        model_.reset();
        fs::remove_all(folder_);
    }

    std::unique_ptr<Engine> engine(int slots, int64_t queue = 8, SessionStore* store = nullptr,
                                   int64_t context = kContext) {
        EngineOptions options;
        options.kv = llm::parse_kv("f16");
        options.plan = llm::ModelPlan(path_).plan(context);
        options.slots = slots;
        options.threads = 1;
        options.queue = queue;
        options.store = store;
        options.store_after = 1e9;
        return std::make_unique<Engine>(*model_, options, counts_);
    }

    // Ends only by its limit: the end of the answer is forbidden.
    static Request request(Tokens tokens, int64_t limit, milliseconds patience = std::chrono::minutes(1)) {
        Request request;
        request.tokens = std::move(tokens);
        request.sampling.temp = 0;
        for (llm::Token token = 0; token < model_->vocabulary(); ++token) {
            if (model_->ends_answer(token)) {
                request.sampling.bias.push_back({token, -1e9F});
            }
        }
        request.limit = limit;
        request.scores = true;
        request.arrived = Clock::now();
        request.deadline = request.arrived + patience;
        request.stream = std::make_shared<AnswerStream>();
        return request;
    }

    static Result wait(const Request& request) {
        Result result;
        for (const auto end = Clock::now() + std::chrono::seconds(30); Clock::now() < end;) {
            for (Event& event : request.stream->take(milliseconds(50))) {
                for (const TokenScore& score : event.piece.scores) {
                    result.tokens.push_back(score.chosen.token);
                    result.scores.push_back(score.chosen.logprob);
                }
                if (event.kind != Event::Kind::piece) {
                    result.end = std::move(event);
                    return result;
                }
            }
        }
        ADD_FAILURE() << "no end of the answer";
        return result;
    }

    static Result answer(Engine& engine, const Request& request) {
        EXPECT_EQ(engine.submit(request), Engine::Submit::accepted);
        return wait(request);
    }

    static void wait_for(const std::function<bool()>& what) {
        for (const auto end = Clock::now() + std::chrono::seconds(10); !what() && Clock::now() < end;) {
            std::this_thread::sleep_for(milliseconds(1));
        }
        EXPECT_TRUE(what());
    }

    // Exactly `places` requests are taken, one more is not; leaves the engine empty.
    void expect_places(Engine& engine, int places) {
        std::vector<Request> all;
        for (int i = 0; i < places; ++i) {
            all.push_back(request(tokens_of(20, i), -1));
            ASSERT_EQ(engine.submit(all.back()), Engine::Submit::accepted) << i << " of " << places;
        }
        EXPECT_EQ(engine.submit(request(tokens_of(20, 99), 1)), Engine::Submit::full);
        for (const Request& one : all) {
            one.stream->cancel();
        }
        wait_for([&] { return engine.status().busy == 0 && engine.status().waiting == 0; });
    }

    Counts counts_;                            // NOLINT(readability-identifier-naming): as private members
    static fs::path folder_;                   // NOLINT(readability-identifier-naming)
    static std::string path_;                  // NOLINT(readability-identifier-naming)
    static std::unique_ptr<llm::Model> model_; // NOLINT(readability-identifier-naming)
};
fs::path EngineTest::folder_;
std::string EngineTest::path_;
std::unique_ptr<llm::Model> EngineTest::model_;

TEST_F(EngineTest, CountsAreExact) {
    const auto engine = this->engine(1);
    for (const int limit : {1, 2, 7}) {
        const Result result = answer(*engine, request(tokens_of(30, limit), limit));
        ASSERT_EQ(result.end.kind, Event::Kind::done);
        EXPECT_EQ(result.end.finish, Finish::length);
        EXPECT_EQ(result.end.stats.prompt_tokens, 30);
        EXPECT_EQ(result.end.stats.cached_tokens, 0);
        EXPECT_EQ(result.end.stats.answer_tokens, limit);
        EXPECT_EQ(result.end.stats.context_used, 30 + limit - 1); // the last token is not in the cache
    }
    // What was read and answered before is counted as cached, but the last token of a prompt is read.
    const Result again = answer(*engine, request(tokens_of(30, 7), 3));
    EXPECT_EQ(again.end.stats.cached_tokens, 29);
    Request fresh = request(tokens_of(30, 7), 3);
    fresh.reuse = false;
    EXPECT_EQ(answer(*engine, fresh).end.stats.cached_tokens, 0);
}

TEST_F(EngineTest, EveryEndGivesItsPlaceBack) {
    const auto engine = this->engine(1, 2);
    expect_places(*engine, 3); // cancelled, in the slot and in the queue
    expect_places(*engine, 3);
    answer(*engine, request(tokens_of(20, 1), 4)); // ended by itself
    expect_places(*engine, 3);
    const Request late = request(tokens_of(20, 1), -1, milliseconds(20));  // in the slot
    const Request behind = request(tokens_of(20, 2), 4, milliseconds(10)); // in the queue
    engine->submit(late);
    engine->submit(behind);
    EXPECT_EQ(wait(late).end.failure.kind, Failure::Kind::timeout);
    EXPECT_EQ(wait(behind).end.failure.kind, Failure::Kind::timeout);
    expect_places(*engine, 3);
    EXPECT_EQ(counts_.outcomes["timeout"], 2);
    EXPECT_EQ(counts_.outcomes["cancelled"], 12);
    EXPECT_EQ(counts_.outcomes["length"], 1);
}

TEST_F(EngineTest, ADeadlineHoldsWhereverTheRequestIs) {
    const auto engine = this->engine(1, 8, nullptr, 16384);
    const Request running = request(tokens_of(20, 1), -1);
    const auto start = Clock::now();
    const Request waiting = request(tokens_of(20, 2), 4, milliseconds(30));
    engine->submit(running);
    engine->submit(waiting);
    const Result result = wait(waiting);
    EXPECT_EQ(result.end.kind, Event::Kind::failed);
    EXPECT_GE(Clock::now() - start, milliseconds(30));
    for (const Event& event : running.stream->take(milliseconds(0))) {
        EXPECT_EQ(event.kind, Event::Kind::piece) << "it waited until the slot was free";
    }
    running.stream->cancel();
    // In the slot: text came, then the failure.
    const Result cut = answer(*engine, request(tokens_of(20, 3), -1, milliseconds(30)));
    EXPECT_EQ(cut.end.failure.kind, Failure::Kind::timeout);
    EXPECT_FALSE(cut.tokens.empty());
}

// Whatever a slot held before, and however much of it is kept.
TEST_F(EngineTest, ASlotThatIsUsedAgainAnswersAsAFreshOne) {
    const Tokens head = tokens_of(80, 3);
    const auto with = [&](int n, int first) {
        Tokens tokens = head;
        const Tokens rest = tokens_of(n, first);
        tokens.insert(tokens.end(), rest.begin(), rest.end());
        return tokens;
    };
    const std::vector<Tokens> prompts = {with(100, 50), with(40, 90), tokens_of(60, 8), with(1, 77), tokens_of(100, 8)};
    std::vector<Result> expected;
    for (const Tokens& prompt : prompts) {
        const auto fresh = this->engine(1);
        expected.push_back(answer(*fresh, request(prompt, 24)));
        for (size_t i = 0; i + 1 < expected.size(); ++i) {
            EXPECT_FALSE(alike(expected[i], expected.back())) << "nothing to tell apart";
        }
    }
    for (const int slots : {1, 2}) {
        const auto engine = this->engine(slots);
        for (size_t i = 0; i < prompts.size(); ++i) {
            const Result result = answer(*engine, request(prompts[i], 24));
            ASSERT_EQ(result.end.kind, Event::Kind::done) << result.end.failure.message;
            EXPECT_TRUE(alike(result, expected[i])) << slots << " slots, prompt " << i;
        }
    }
}

// Far stronger than the model's opinion: what is punished does not come.
TEST_F(EngineTest, EachPenaltyReachesTheSampler) {
    const auto engine = this->engine(1);
    const Tokens prompt = tokens_of(40, 3);
    const auto tokens = [&](const std::function<void(llm::SamplingOptions&)>& change) {
        Request asked = request(prompt, 20);
        change(asked.sampling);
        return answer(*engine, asked).tokens;
    };
    const auto distinct = [](const Tokens& list) { return std::set<llm::Token>(list.begin(), list.end()).size(); };
    const Tokens plain = tokens([](auto&) {});
    EXPECT_LT(distinct(plain), 10U) << "repeats nothing, so nothing could be punished";
    const std::map<std::string, Tokens> punished = {
        {"presence", tokens([](auto& s) { s.presence_penalty = 1e4; })},
        {"frequency", tokens([](auto& s) { s.frequency_penalty = 1e4; })},
        {"repeat", tokens([](auto& s) { s.repeat_penalty = 1e4; })},
    };
    for (const auto& [name, list] : punished) {
        EXPECT_GE(distinct(list), 15U) << name;
        const bool in_prompt = std::find(prompt.begin(), prompt.end(), list.front()) != prompt.end();
        EXPECT_FALSE(in_prompt) << name << ": the prompt's tokens count";
    }
    EXPECT_NE(std::find(prompt.begin(), prompt.end(), plain.front()), prompt.end())
        << "so the prompt's count for something";
}

TEST_F(EngineTest, DrainingFinishesWhatRunsAndWaits) {
    const auto engine = this->engine(1);
    const Request running = request(tokens_of(20, 1), 200);
    const Request waiting = request(tokens_of(20, 2), 5);
    engine->submit(running);
    engine->submit(waiting);
    engine->drain(Clock::now() + std::chrono::seconds(30));
    EXPECT_EQ(wait(running).end.stats.answer_tokens, 200);
    EXPECT_EQ(wait(waiting).end.stats.answer_tokens, 5);
    EXPECT_EQ(engine->submit(request(tokens_of(20, 1), 1)), Engine::Submit::stopping);

    const auto other = this->engine(1);
    const Request cut = request(tokens_of(20, 1), -1);
    const Request behind = request(tokens_of(20, 2), 5);
    other->submit(cut);
    other->submit(behind);
    wait_for([&] { return other->status().busy == 1; });
    other->drain(Clock::now());
    EXPECT_EQ(wait(cut).end.failure.kind, Failure::Kind::stopping);
    EXPECT_EQ(wait(behind).end.failure.kind, Failure::Kind::stopping);
}

// A saved state that is of no use is fetched once.
TEST_F(EngineTest, AStateThatCannotBeUsedIsForgotten) {
    const Tokens prompt = tokens_of(150, 1);
    const auto fresh = this->engine(1);
    const Result expected = answer(*fresh, request(prompt, 8));
    struct Wrong {
        Tokens tokens;
        std::vector<uint8_t> state;
        std::string reason;
    };
    Tokens longer = prompt;
    const Tokens rest = tokens_of(static_cast<int>(kContext), 9);
    longer.insert(longer.end(), rest.begin(), rest.end());
    for (const Wrong& wrong : {Wrong{prompt, std::vector<uint8_t>(5000, 0x5a), "state"},
                               Wrong{longer, std::vector<uint8_t>(5000), "662 tokens, a slot here 512"}}) {
        FakeStore store;
        store.saved = {wrong.tokens, wrong.state};
        const auto engine = this->engine(1, 8, &store);
        for (int i = 0; i < 3; ++i) {
            const Result result = answer(*engine, request(prompt, 8));
            ASSERT_EQ(result.end.kind, Event::Kind::done) << result.end.failure.message;
            EXPECT_TRUE(alike(result, expected));
            answer(*engine, request(tokens_of(40, 100), 1)); // takes the slot: the next one has to fetch again
        }
        engine->drain(Clock::now());
        EXPECT_EQ(store.loads, 1);
        ASSERT_EQ(store.forgotten.size(), 1U);
        EXPECT_EQ(store.forgotten[0], wrong.tokens);
        EXPECT_NE(store.reasons[0].find(wrong.reason), std::string::npos) << store.reasons[0];
    }
}

// What is shorter is neither saved nor asked for.
TEST_F(EngineTest, OnlySequencesWorthItAreSaved) {
    FakeStore store;
    const auto engine = this->engine(1, 8, &store);
    answer(*engine, request(tokens_of(static_cast<int>(kWorthSaving) - 1, 1), 1));
    answer(*engine, request(tokens_of(static_cast<int>(kWorthSaving), 100), 1));
    engine->drain(Clock::now());
    EXPECT_EQ(store.saves, std::vector<size_t>{static_cast<size_t>(kWorthSaving)});
}

} // namespace
} // namespace turboquant::serve
