// Attention over compressed rows: one query over a long context (decode), and a prompt's queries (prefill), for every
// instruction set of this processor. 32 query heads, 8 KV heads, head size 128 unless the name says otherwise.
//
//   attention_bench [--benchmark_filter=decode/avx512]
//
// decode reports ns_per_head_row (one query head, one row) and the bytes of codes and scales read; prefill GFLOP/s
// (two products of 2 * head_size floating-point operations for each query head and row).
#include "turboquant/attention.h"

#include <benchmark/benchmark.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <thread>
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

// Workers that wait for work between calls, as a host's pool does.
class Pool {
public:
    explicit Pool(int n) : n_(n) {
        for (int w = 1; w < n; ++w) {
            threads_.emplace_back([this, w] { work(w); });
        }
    }
    ~Pool() {
        {
            const std::lock_guard lock(mutex_);
            stop_ = true;
        }
        wake_.notify_all();
        for (std::thread& t : threads_) {
            t.join();
        }
    }
    ParallelFor parallel() { return {n_ > 1 ? &Pool::run : nullptr, this, n_}; }

private:
    static void run(void* context, int64_t n_tasks, ParallelFor::Task task, void* arg) {
        Pool& p = *static_cast<Pool*>(context);
        {
            const std::lock_guard lock(p.mutex_);
            p.task_ = task;
            p.arg_ = arg;
            p.n_tasks_ = n_tasks;
            p.next_ = 0;
            p.busy_ = p.n_ - 1;
            ++p.round_;
        }
        p.wake_.notify_all();
        p.drain(0);
        std::unique_lock lock(p.mutex_);
        p.done_.wait(lock, [&] { return p.busy_ == 0; });
    }
    void drain(int worker) {
        for (int64_t i = next_++; i < n_tasks_; i = next_++) {
            task_(arg_, i, worker);
        }
    }
    void work(int worker) {
        uint64_t seen = 0;
        std::unique_lock lock(mutex_);
        for (;;) {
            wake_.wait(lock, [&] { return stop_ || round_ != seen; });
            if (stop_) {
                return;
            }
            seen = round_;
            lock.unlock();
            drain(worker);
            lock.lock();
            if (--busy_ == 0) {
                done_.notify_one();
            }
        }
    }
    int n_;
    std::vector<std::thread> threads_;
    std::mutex mutex_;
    std::condition_variable wake_;
    std::condition_variable done_;
    ParallelFor::Task task_ = nullptr;
    void* arg_ = nullptr;
    int64_t n_tasks_ = 0;
    std::atomic<int64_t> next_{0};
    int busy_ = 0;
    uint64_t round_ = 0;
    bool stop_ = false;
};

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

void run(benchmark::State& state, const Shape& shape, Isa isa, int workers) {
    const Stores& stores = stores_of(shape);
    const size_t n = static_cast<size_t>(shape.queries * shape.heads * shape.head_size);
    std::vector<float> q(n);
    std::vector<float> out(n);
    std::mt19937 random(3);
    std::normal_distribution<float> normal;
    for (float& x : q) {
        x = normal(random);
    }
    AttentionCall call;
    call.q = q.data();
    call.out = out.data();
    call.q_head_stride = call.out_head_stride = shape.head_size;
    call.q_query_stride = call.out_query_stride = static_cast<int64_t>(shape.heads) * shape.head_size;
    call.n_queries = shape.queries;
    call.n_heads = shape.heads;
    call.n_rows = shape.rows;
    call.scale = 1 / std::sqrt(static_cast<float>(shape.head_size));
    AttentionWorkspace workspace;
    Pool pool(workers);
    for (auto _ : state) { // NOLINT(clang-analyzer-deadcode.DeadStores): Google Benchmark's way
        check(attend(*stores.k, *stores.v, call, workspace, pool.parallel(), isa));
        benchmark::ClobberMemory();
    }
    const double pairs = static_cast<double>(shape.queries) * shape.heads * static_cast<double>(shape.rows);
    const double seconds_to_ns = 1e-9;
    using benchmark::Counter;
    if (shape.queries == 1) {
        state.counters["ns_per_head_row"] =
            Counter(pairs * seconds_to_ns, Counter::kIsIterationInvariantRate | Counter::kInvert);
        state.SetBytesProcessed(state.iterations() * static_cast<int64_t>(stores.k->bytes() + stores.v->bytes()));
    } else {
        state.counters["GFLOP/s"] = Counter(pairs * 4 * shape.head_size * 1e-9, Counter::kIsIterationInvariantRate);
    }
}

void add(const std::string& kind, const Shape& shape, Isa isa, int workers) {
    const std::string name = kind + "/" + std::string(isa_name(isa)) + "/D" + std::to_string(shape.head_size) +
                             "/group" + std::to_string(shape.heads / kKvHeads) + "/" + std::to_string(shape.key_bits) +
                             "-" + std::to_string(shape.value_bits) + "/rows" + std::to_string(shape.rows) +
                             "/threads" + std::to_string(workers) + (shape.conditioned ? "/conditioned" : "");
    const auto body = [shape, isa, workers](benchmark::State& state) { run(state, shape, isa, workers); };
    // NOLINTNEXTLINE(clang-analyzer-cplusplus.NewDeleteLeaks): the library keeps it
    benchmark::RegisterBenchmark(name.c_str(), body)->UseRealTime()->Unit(benchmark::kMicrosecond);
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
    // NOLINTNEXTLINE(clang-analyzer-cplusplus.NewDeleteLeaks): the library keeps it
    benchmark::RegisterBenchmark(name.c_str(), body)->UseRealTime()->Unit(benchmark::kNanosecond);
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
    benchmark::Initialize(&argc, argv);
    if (benchmark::ReportUnrecognizedArguments(argc, argv)) {
        return 2;
    }
    benchmark::RunSpecifiedBenchmarks();
    benchmark::Shutdown();
    return 0;
}
