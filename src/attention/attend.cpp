// attend(): calls cut into tasks and shared out.
#include "turboquant/attention.h"

#include "attention/task.h"

#include <algorithm>
#include <new>
#include <string>

namespace turboquant {

AttentionWorkspace::AttentionWorkspace() : impl_(std::make_unique<Impl>()) {}
AttentionWorkspace::~AttentionWorkspace() = default;

namespace attention {
namespace {

void fill_tables(const Codebook& book, Side side, const Kernels& kernels, LevelTables& t) {
    t = {};
    for (int code = 0; code < (1 << book.bits); ++code) {
        t.level[code] =
            static_cast<float>(book.value(book.bits == 8 ? static_cast<int8_t>(static_cast<uint8_t>(code)) : code));
        if (book.bits <= 4) {
            t.value[code] = book.value(code);
        }
    }
    for (int m = 0; m < book.n_levels; ++m) {
        t.magnitude[m] = book.level[m];
    }
    if (kernels.fill_decode_tables != nullptr) {
        kernels.fill_decode_tables(book.bits, side, t);
    }
}

const LevelTables* tables_of(const Store::Impl& store, Side side, const Kernels& kernels, SideTables& tables) {
    if (store.book == nullptr) {
        return tables.at; // of no bits: nobody reads it
    }
    const int bits = store.options.bits;
    if (!tables.made[bits]) {
        fill_tables(*store.book, side, kernels, tables.at[bits]);
        tables.made[bits] = true;
    }
    return tables.at + bits;
}

void find_tables(AttentionWorkspace::Impl& work, Job& job) {
    if (work.kernels != job.plan.kernels) {
        work.kernels = job.plan.kernels;
        std::fill_n(work.key_tables.made, SideTables::kWidths, false);
        std::fill_n(work.value_tables.made, SideTables::kWidths, false);
    }
    job.key_tables = tables_of(*job.plan.k, Side::key, *work.kernels, work.key_tables);
    job.value_tables = tables_of(*job.plan.v, Side::value, *work.kernels, work.value_tables);
}

Status out_of_memory(const AttentionCall& call) {
    return {StatusCode::out_of_memory,
            "attention: no memory to work in for " + std::to_string(call.n_queries) + " queries; use smaller batches"};
}

// All that a job's tasks need besides the workers' memory.
Status prepare(Job& job, const ParallelFor& parallel, int n_workers) {
    Plan& plan = job.plan;
    const AttentionCall& call = *plan.call;
    try {
        if (Status s = job.exact_keys.collect(*job.keys, call.k_staging, call, Side::key); !s.ok()) {
            return s;
        }
        if (Status s = job.exact_values.collect(*job.values, call.v_staging, call, Side::value); !s.ok()) {
            return s;
        }
        job.visibility.collect(call, plan.group, plan.chunk, plan.n_chunks, parallel);
        plan_splits(job.visibility.most(), n_workers, plan);
        Carver scratch(nullptr);
        Scratch{}.carve(scratch, plan, !job.exact_keys.empty(), !job.exact_values.empty());
        job.scratch_bytes = scratch.used();
        if (plan.n_splits > 1) {
            const bool exact_values = !job.exact_values.empty();
            const size_t parts = static_cast<size_t>(plan.k->shape.kv_heads * plan.n_splits);
            Carver one(nullptr);
            Sums{}.carve(one, plan, plan.entries, exact_values);
            job.partial_arena.reserve(one.used() * parts);
            job.partials.resize(std::max(job.partials.size(), parts));
            Carver carver(job.partial_arena.data());
            for (size_t i = 0; i < parts; ++i) {
                job.partials[i].carve(carver, plan, plan.entries, exact_values);
            }
        }
    } catch (const std::bad_alloc&) {
        return out_of_memory(call);
    }
    return {};
}

void run_task(const Job& job, Worker& worker, int64_t index) {
    const Plan& plan = job.plan;
    const int64_t per_head = plan.n_chunks * plan.n_splits;
    const int kv_head = static_cast<int>(index / per_head);
    // Causal prompts: the last chunk sees most, and is best begun first.
    const int64_t chunk = plan.n_chunks - 1 - index % per_head / plan.n_splits;
    const int64_t split = index % plan.n_splits;
    const int64_t first = chunk * plan.chunk;
    const int count = static_cast<int>(std::min<int64_t>(plan.chunk, plan.entries - first));
    Scratch& scratch = worker.scratch_for(job);
    Sums sums = scratch.sums;
    if (plan.n_splits > 1) {
        sums = job.partials[static_cast<size_t>(kv_head * plan.n_splits + split)];
        sums.row += first;
        sums.coded += first * plan.value_ld;
        sums.exact += job.exact_values.empty() ? 0 : first * plan.value_ld;
    }
    const int64_t n_tiles = job.visibility.count(chunk);
    const int64_t begin = n_tiles * split / plan.n_splits;
    run_tiles(job, scratch, kv_head, first, count, sums, job.visibility.tiles(chunk) + begin,
              n_tiles * (split + 1) / plan.n_splits - begin);
    if (plan.n_splits == 1) {
        for (int m = 0; m < count; ++m) {
            finish(job, scratch, kv_head, first + m, &sums, 1, m);
        }
    }
}

void run_merge(const Job& job, Worker& worker, int64_t index) {
    const Plan& plan = job.plan;
    const int kv_head = static_cast<int>(index / plan.entries);
    finish(job, worker.scratch_for(job), kv_head, index % plan.entries, job.partials.data() + kv_head * plan.n_splits,
           plan.n_splits, index % plan.entries);
}

// Which job has item `index` of all: the last that begins at or before it.
const Job& job_of(const std::vector<Job*>& order, int64_t Job::*first, int64_t index) {
    const auto next = std::upper_bound(order.begin(), order.end(), index,
                                       [first](int64_t i, const Job* job) { return i < job->*first; });
    return **(next - 1);
}

// The jobs of work.order, prepared, as if they were one.
void run(AttentionWorkspace::Impl& work, const ParallelFor& parallel) {
    // The longest first: what is left at the end is then short.
    std::sort(work.order.begin(), work.order.end(),
              [](const Job* a, const Job* b) { return a->visibility.most() > b->visibility.most(); });
    int64_t tasks = 0;
    int64_t merges = 0;
    for (Job* job : work.order) {
        job->first_task = tasks;
        job->first_merge = merges;
        tasks += job->plan.tasks();
        merges += job->plan.n_splits > 1 ? job->plan.k->shape.kv_heads * job->plan.entries : 0;
    }
    parallel(tasks, [&](int64_t index, int worker) {
        const Job& job = job_of(work.order, &Job::first_task, index);
        run_task(job, work.workers[static_cast<size_t>(worker)], index - job.first_task);
    });
    const auto merge = [&](int64_t index, int worker) {
        const Job& job = job_of(work.order, &Job::first_merge, index);
        run_merge(job, work.workers[static_cast<size_t>(worker)], index - job.first_merge);
    };
    constexpr int64_t kSerialMerges = 32; // sooner done than other threads wake up
    (merges <= kSerialMerges ? ParallelFor{} : parallel)(merges, merge);
}

} // namespace
} // namespace attention

Status attend_all(std::span<const AttentionJob> jobs, AttentionWorkspace& workspace, const ParallelFor& parallel,
                  Isa isa) {
    using attention::Job;
    const int n_workers = parallel.run == nullptr ? 1 : std::max(1, parallel.n_workers);
    AttentionWorkspace::Impl& work = workspace.impl();
    try {
        while (work.jobs.size() < jobs.size()) {
            work.jobs.emplace_back();
        }
        work.order.clear();
        for (size_t i = 0; i < jobs.size(); ++i) {
            Job& job = work.jobs[i];
            job.keys = jobs[i].keys;
            job.values = jobs[i].values;
            if (Status s = attention::make_plan(*job.keys, *job.values, jobs[i].call, isa, job.plan); !s.ok()) {
                return s;
            }
            if (jobs[i].call.n_queries > 0) {
                attention::find_tables(work, job);
                work.order.push_back(&job);
            }
        }
        const auto n = static_cast<int64_t>(work.order.size());
        const ParallelFor within = n > 1 ? ParallelFor{} : parallel;
        parallel(n, [&](int64_t i, int) {
            Job& job = *work.order[static_cast<size_t>(i)];
            job.status = attention::prepare(job, within, n_workers);
        });
        size_t scratch_bytes = 0;
        for (const Job* job : work.order) {
            if (!job->status.ok()) {
                return job->status;
            }
            scratch_bytes = std::max(scratch_bytes, job->scratch_bytes);
        }
        work.workers.resize(std::max(work.workers.size(), static_cast<size_t>(n_workers)));
        for (attention::Worker& worker : work.workers) {
            worker.job = nullptr;
            worker.arena.reserve(scratch_bytes);
        }
        attention::run(work, parallel);
    } catch (const std::bad_alloc&) {
        return attention::out_of_memory(jobs.front().call);
    }
    return {};
}

Status attend(const Store& k, const Store& v, const AttentionCall& call, AttentionWorkspace& workspace,
              const ParallelFor& parallel, Isa isa) {
    const AttentionJob job = {&k, &v, call};
    return attend_all({&job, 1}, workspace, parallel, isa);
}

} // namespace turboquant
