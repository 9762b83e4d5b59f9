// Attention over compressed rows: one query over a long context (decode), and a prompt's queries (prefill), for every
// instruction set of this processor. 32 query heads, 8 KV heads, head size 128 unless the name says otherwise.
//
//   attention_bench [--benchmark_filter=decode/avx512]
//
// decode reports ns_per_head_row (one query head, one row) and the bytes of codes and scales read; prefill GFLOP/s
// (two products of 2 * head_size floating-point operations for each query head and row). batch is a token of each of eight
// sequences; its threads go up to the processor's.
#include "turboquant/attention.h"

#include <benchmark/benchmark.h>
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

using namespace turboquant;

namespace {

constexpr int kHeads = 32;
constexpr int kKvHeads = 8;

void check(const Status& s) {
    if (!s.ok()) {
        std::fprintf(stderr, "attention_bench: %s\n", s.message().c_str());
        std::exit(1);
    }
}

// OpenMP's threads, as ggml and the plug-in use them.
ParallelFor parallel_for(int& workers) {
    return {[](void* context, int64_t n_tasks, ParallelFor::Task task, void* arg) {
                const int n = *static_cast<const int*>(context);
#pragma omp parallel for schedule(dynamic, 1) num_threads(n)
                for (int64_t i = 0; i < n_tasks; ++i) {
                    task(arg, i, omp_get_thread_num());
                }
            },
            &workers, workers};
}

struct Shape {
    int head_size = 128;
    int key_bits = 4;
    int value_bits = 4;
    int64_t rows = 4096;
    int64_t queries = 1;
    int heads = kHeads;
    bool conditioned = false; // means that turn with the position block, factors
};

Conditioning make_conditioning(int head_size) {
    Conditioning c;
    std::mt19937 random(4);
    std::normal_distribution<float> normal;
    for (int i = 0; i < head_size * kKvHeads; ++i) {
        c.mu.push_back(normal(random));
        c.lambda.push_back(std::exp(normal(random) / 2));
    }
    for (int i = 0; i < head_size / 2; ++i) {
        c.rope.push_back({static_cast<uint16_t>(2 * i), static_cast<uint16_t>(2 * i + 1),
                          static_cast<float>(std::pow(10000.0, -2.0 * i / head_size))});
    }
    return c;
}

std::unique_ptr<Store> make_store(Side side, const Shape& shape, int bits) {
    std::unique_ptr<Store> store;
    const bool conditioned = shape.conditioned && side == Side::key;
    check(Store::create({side, shape.head_size, kKvHeads, shape.rows}, {bits, 0, 0},
                        conditioned ? make_conditioning(shape.head_size) : Conditioning(), store));
    std::mt19937 random(side == Side::key ? 1 : 2);
    std::normal_distribution<float> normal;
    const size_t n = static_cast<size_t>(store->shape().row_elements());
    std::vector<float> x(n * 64);
    for (float& value : x) {
        value = normal(random);
    }
    for (int64_t r = 0; r < shape.rows; ++r) {
        check(store->write(x.data() + static_cast<size_t>(r % 64) * n, static_cast<int64_t>(n), &r, 1, {}, nullptr));
    }
    return store;
}

// Stores are made once for all benchmarks of a shape: writing them takes longer than reading them.
struct Stores {
    Shape shape;
    std::unique_ptr<Store> k;
    std::unique_ptr<Store> v;
};
Stores& stores_of(const Shape& shape) {
    static Stores last;
    const Shape& s = last.shape;
    if (last.k == nullptr || s.head_size != shape.head_size || s.key_bits != shape.key_bits ||
        s.value_bits != shape.value_bits || s.rows != shape.rows || s.conditioned != shape.conditioned) {
        last = {shape, make_store(Side::key, shape, shape.key_bits), make_store(Side::value, shape, shape.value_bits)};
    }
    return last;
}

// `sequences` times as many queries, each over all rows.
struct Calls {
    Calls(const Shape& shape, int64_t sequences) {
        const auto n = static_cast<size_t>(shape.queries * shape.heads * shape.head_size);
        q.resize(n * static_cast<size_t>(sequences));
        out.resize(q.size());
        std::mt19937 random(3);
        std::normal_distribution<float> normal;
        std::generate(q.begin(), q.end(), [&] { return normal(random); });
        const Stores& stores = stores_of(shape);
        for (size_t i = 0; i < static_cast<size_t>(sequences); ++i) {
            AttentionCall call;
            call.q = q.data() + i * n;
            call.out = out.data() + i * n;
            call.q_head_stride = call.out_head_stride = shape.head_size;
            call.q_query_stride = call.out_query_stride = static_cast<int64_t>(shape.heads) * shape.head_size;
            call.n_queries = shape.queries;
            call.n_heads = shape.heads;
            call.n_rows = shape.rows;
            call.scale = 1 / std::sqrt(static_cast<float>(shape.head_size));
            jobs.push_back({stores.k.get(), stores.v.get(), call});
        }
    }
    std::vector<float> q;
    std::vector<float> out;
    std::vector<AttentionJob> jobs;
};

void run(benchmark::State& state, const Shape& shape, Isa isa, int workers) {
    const Calls calls(shape, 1);
    const AttentionJob& job = calls.jobs.front();
    AttentionWorkspace workspace;
    for (auto _ : state) { // NOLINT(clang-analyzer-deadcode.DeadStores): Google Benchmark's way
        check(attend(*job.keys, *job.values, job.call, workspace, parallel_for(workers), isa));
        benchmark::ClobberMemory();
    }
    const double pairs = static_cast<double>(shape.queries) * shape.heads * static_cast<double>(shape.rows);
    const double seconds_to_ns = 1e-9;
    using benchmark::Counter;
    if (shape.queries == 1) {
        state.counters["ns_per_head_row"] =
            Counter(pairs * seconds_to_ns, Counter::kIsIterationInvariantRate | Counter::kInvert);
        state.SetBytesProcessed(state.iterations() * static_cast<int64_t>(job.keys->bytes() + job.values->bytes()));
    } else {
        state.counters["GFLOP/s"] = Counter(pairs * 4 * shape.head_size * 1e-9, Counter::kIsIterationInvariantRate);
    }
}

void add_benchmark(const std::string& name, const std::function<void(benchmark::State&)>& body,
                   benchmark::TimeUnit unit) {
    benchmark::RegisterBenchmark(name.c_str(), body)->UseRealTime()->Unit(unit);
}

void add(const std::string& kind, const Shape& shape, Isa isa, int workers) {
    const std::string name = kind + "/" + std::string(isa_name(isa)) + "/D" + std::to_string(shape.head_size) +
                             "/group" + std::to_string(shape.heads / kKvHeads) + "/" + std::to_string(shape.key_bits) +
                             "-" + std::to_string(shape.value_bits) + "/rows" + std::to_string(shape.rows) +
                             "/threads" + std::to_string(workers) + (shape.conditioned ? "/conditioned" : "");
    const auto body = [shape, isa, workers](benchmark::State& state) { run(state, shape, isa, workers); };
    add_benchmark(name, body, benchmark::kMicrosecond);
}

// The next token of several sequences, as a server's batch asks for them: one call after the other, and all together.
void add_batch(bool together, int64_t sequences, const Shape& shape, Isa isa, int workers) {
    const std::string name = std::string("batch/") + (together ? "together" : "one_by_one") + "/sequences" +
                             std::to_string(sequences) + "/rows" + std::to_string(shape.rows) + "/threads" +
                             std::to_string(workers);
    const auto body = [=](benchmark::State& state) {
        const Calls calls(shape, sequences);
        int n = workers;
        AttentionWorkspace workspace;
        for (auto _ : state) { // NOLINT(clang-analyzer-deadcode.DeadStores)
            if (together) {
                check(attend_all(calls.jobs, workspace, parallel_for(n), isa));
            } else {
                for (const AttentionJob& job : calls.jobs) {
                    check(attend(*job.keys, *job.values, job.call, workspace, parallel_for(n), isa));
                }
            }
            benchmark::ClobberMemory();
        }
    };
    add_benchmark(name, body, benchmark::kMicrosecond);
}

// A token's keys, written one after the other as in decoding. The instruction set is the store's: the default one.
void add_write(const Shape& shape, Isa isa) {
    Isa own = Isa::portable;
    check(default_isa(own));
    if (isa != own) {
        return;
    }
    const std::string name = "write/" + std::string(isa_name(isa)) + "/D" + std::to_string(shape.head_size) + "/" +
                             std::to_string(shape.key_bits) + (shape.conditioned ? "/conditioned" : "");
    const auto body = [shape](benchmark::State& state) {
        const auto store = make_store(Side::key, shape, shape.key_bits);
        std::vector<float> x(static_cast<size_t>(store->shape().row_elements()), 0.5F);
        std::mt19937 random(5);
        std::normal_distribution<float> normal;
        std::generate(x.begin(), x.end(), [&] { return normal(random); });
        int64_t row = 0;
        for (auto _ : state) { // NOLINT(clang-analyzer-deadcode.DeadStores)
            check(store->write(x.data(), store->shape().row_elements(), &row, 1, {}, nullptr));
            row = (row + 1) % shape.rows;
        }
        state.counters["ns_per_head_row"] = benchmark::Counter(
            kKvHeads * 1e-9, benchmark::Counter::kIsIterationInvariantRate | benchmark::Counter::kInvert);
    };
    add_benchmark(name, body, benchmark::kNanosecond);
}

} // namespace

int main(int argc, char** argv) {
    for (const int64_t rows : {4096, 32768}) {
        for (Isa isa : available_isas()) {
            for (const int workers : {1, 2}) {
                add("decode", {.rows = rows}, isa, workers);
            }
        }
    }
    for (Isa isa : available_isas()) {
        for (const auto& [k, v] : {std::pair{3, 3}, {8, 4}, {4, 2}, {5, 4}, {6, 5}, {8, 8}, {16, 16}}) {
            add("decode", {.key_bits = k, .value_bits = v}, isa, 1);
        }
        for (const int heads : {kKvHeads, 7 * kKvHeads, 8 * kKvHeads}) {
            add("decode", {.heads = heads}, isa, 1);
        }
        for (const int head_size : {64, 80, 256}) {
            add("decode", {.head_size = head_size}, isa, 1);
        }
        add("decode", {.conditioned = true}, isa, 1);
        add("prefill", {.rows = 8192, .queries = 512}, isa, 1);
        add("prefill", {.rows = 8192, .queries = 512, .conditioned = true}, isa, 1);
        add_write({}, isa);
        add_write({.conditioned = true}, isa);
        add("prefill", {.key_bits = 16, .value_bits = 16, .rows = 8192, .queries = 512}, isa, 1);
    }
    for (const int64_t rows : {128, 1024, 8192}) {
        for (int workers = 2; workers <= std::max(2, omp_get_num_procs()); workers *= 2) {
            for (const bool together : {false, true}) {
                add_batch(together, 8, {.rows = rows}, available_isas().back(), workers);
            }
        }
    }
    benchmark::Initialize(&argc, argv);
    if (benchmark::ReportUnrecognizedArguments(argc, argv)) {
        return 2;
    }
    benchmark::RunSpecifiedBenchmarks();
    benchmark::Shutdown();
    return 0;
}
