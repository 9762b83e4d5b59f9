// Several attention calls at once: each as if it were alone, and shared out together.
#include "attention_testing.h"

#include <memory>

namespace turboquant::attention_tests {
namespace {

// Unlike each other in all that a call can differ in.
const std::vector<Case> kUnlike = {
    {.rows = 100},
    {.head_size = 128, .kv_heads = 1, .group = 8, .rows = 3000, .key_window = 32, .staging = true, .peaky = true},
    {.head_size = 80, .key_bits = 3, .value_bits = 2, .rows = 700, .queries = 40, .mask = Mask::causal},
    {.head_size = 64, .key_bits = 8, .value_bits = 6, .rows = 65, .queries = 3, .mask = Mask::holes, .sinks = true},
    {.head_size = 256, .rows = 1500, .mu = true, .lambda = true, .value_window = 16},
    {.head_size = 96, .rows = 40, .mask = Mask::all_hidden},
};

using Setups = std::vector<std::unique_ptr<Fixture>>;

Setups setups_of(const std::vector<Case>& cases) {
    Setups setups;
    for (const Case& c : cases) {
        setups.push_back(std::make_unique<Fixture>(c));
    }
    return setups;
}

struct Calls {
    explicit Calls(const Setups& setups) : outs(setups.size()) {
        for (size_t i = 0; i < setups.size(); ++i) {
            jobs.push_back({&setups[i]->k(), &setups[i]->v(), setups[i]->call(outs[i])});
        }
    }
    std::vector<std::vector<float>> outs;
    std::vector<AttentionJob> jobs;
};

TEST(AttentionJobs, EachIsAsAlone) {
    const Setups setups = setups_of(kUnlike);
    AttentionWorkspace workspace;
    for (const int workers : {1, 2, 3, 8}) {
        Threads threads(workers);
        for (const Isa isa : available_isas()) {
            Calls alone(setups);
            for (const AttentionJob& job : alone.jobs) {
                AttentionWorkspace fresh;
                ASSERT_TRUE(attend(*job.keys, *job.values, job.call, fresh, threads.parallel(), isa).ok());
            }
            for (const size_t n : {kUnlike.size(), size_t{2}, size_t{1}, kUnlike.size()}) { // in one workspace
                Calls together(setups);
                const std::span<const AttentionJob> jobs(together.jobs);
                ASSERT_TRUE(attend_all(jobs.last(n), workspace, threads.parallel(), isa).ok());
                for (size_t i = kUnlike.size() - n; i < kUnlike.size(); ++i) {
                    ASSERT_EQ(together.outs[i], alone.outs[i]) << i << " of " << n << ", " << isa_name(isa);
                }
            }
        }
    }
}

TEST(AttentionJobs, ManyOfOneStore) {
    Fixture setup({.rows = 900});
    const Isa isa = available_isas().back();
    Threads threads(2);
    AttentionWorkspace workspace;
    std::vector<std::vector<float>> outs(20);
    std::vector<AttentionJob> jobs;
    for (size_t i = 0; i < outs.size(); ++i) {
        jobs.push_back({&setup.k(), &setup.v(), setup.call(outs[i])});
        jobs.back().call.n_rows = static_cast<int64_t>(45 * i);
        jobs.back().call.mask = nullptr;
    }
    ASSERT_TRUE(attend_all(jobs, workspace, threads.parallel(), isa).ok());
    for (size_t i = 0; i < outs.size(); ++i) {
        std::vector<float> out;
        AttentionCall call = setup.call(out);
        call.n_rows = jobs[i].call.n_rows;
        call.mask = nullptr;
        ASSERT_TRUE(attend(setup.k(), setup.v(), call, workspace, threads.parallel(), isa).ok());
        ASSERT_EQ(out, outs[i]) << i;
    }
}

// A region of threads costs about as much as a short sequence's attention, so the sequences of a batch share them.
TEST(AttentionJobs, ShareTheRegionsOfThreads) {
    struct Counter {
        static void run(void* context, int64_t n_tasks, ParallelFor::Task task, void* arg) {
            auto* self = static_cast<Counter*>(context);
            self->tasks.push_back(n_tasks);
            for (int64_t i = 0; i < n_tasks; ++i) {
                task(arg, i, static_cast<int>(i % 2));
            }
        }
        std::vector<int64_t> tasks;
    } counter;
    const Setups setups = setups_of(std::vector<Case>(8, {.kv_heads = 3, .group = 3, .rows = 100}));
    Calls calls(setups);
    AttentionWorkspace workspace;
    ASSERT_TRUE(attend_all(calls.jobs, workspace, {Counter::run, &counter, 2}, available_isas().back()).ok());
    EXPECT_EQ(counter.tasks, (std::vector<int64_t>{8, 8 * 3}));
}

TEST(AttentionJobs, NothingToDo) {
    const Isa isa = available_isas().back();
    AttentionWorkspace workspace;
    EXPECT_TRUE(attend_all({}, workspace, {}, isa).ok());
    const Setups setups = setups_of({{.rows = 100}, {.rows = 70}, {.rows = 80}});
    Calls calls(setups);
    Calls alone(setups);
    calls.jobs[1].call.n_queries = 0;
    ASSERT_TRUE(attend_all(calls.jobs, workspace, {}, isa).ok());
    ASSERT_TRUE(attend(*alone.jobs[0].keys, *alone.jobs[0].values, alone.jobs[0].call, workspace, {}, isa).ok());
    EXPECT_EQ(calls.outs[0], alone.outs[0]);
}

TEST(AttentionJobs, TheFirstErrorIsTold) {
    const Isa isa = available_isas().back();
    Threads threads(2);
    AttentionWorkspace workspace;
    const Setups setups =
        setups_of(std::vector<Case>(4, {.rows = 100, .queries = 3, .key_window = 8, .staging = true}));
    Calls calls(setups);
    calls.jobs[1].call.staging_offset = 77; // found while it is prepared
    calls.jobs[3].call.staging_offset = 99;
    Status status = attend_all(calls.jobs, workspace, threads.parallel(), isa);
    EXPECT_EQ(status.code(), StatusCode::invalid_argument);
    EXPECT_NE(status.message().find("77..80"), std::string::npos) << status.message();
    calls.jobs[2].call.n_heads = 0; // found before
    status = attend_all(calls.jobs, workspace, threads.parallel(), isa);
    EXPECT_NE(status.message().find("0 query heads"), std::string::npos) << status.message();
    Calls good(setups);
    EXPECT_TRUE(attend_all(good.jobs, workspace, threads.parallel(), isa).ok());
}

} // namespace
} // namespace turboquant::attention_tests
