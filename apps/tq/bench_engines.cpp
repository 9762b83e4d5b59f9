#include "bench_engines.h"

#include "llm/error.h"

#include <turboquant/attention.h>
#include <turboquant/store.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <fstream>
#include <new>
#include <numeric>
#include <random>

#include <fmt/format.h>
#include <ggml-backend.h>
#include <omp.h>
#include <sys/mman.h>

namespace turboquant::app {
namespace {

// Rows of random numbers that stores and caches are filled with over and over: a prime, so that they fall differently into
// tiles and layers.
constexpr int64_t kPoolRows = 997;

void check(const Status& status) {
    if (!status.ok()) {
        throw llm::Error(status.message());
    }
}

std::vector<float> normal_numbers(size_t n, unsigned seed) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal;
    std::vector<float> numbers(n);
    std::generate(numbers.begin(), numbers.end(), [&] { return normal(random); });
    return numbers;
}

void run_openmp(void* context, int64_t n_tasks, ParallelFor::Task task, void* arg) {
#pragma omp parallel for schedule(dynamic, 1) num_threads(*static_cast <const int*>(context))
    for (int64_t i = 0; i < n_tasks; ++i) {
        task(arg, i, omp_get_thread_num());
    }
}

int64_t layers_for(const AttentionShape& shape, int64_t layer_bytes) {
    return std::max<int64_t>(1, (shape.cold_bytes + layer_bytes - 1) / layer_bytes);
}

// ---- ours ------------------------------------------------------------------------------------------------------------

Conditioning random_conditioning(const AttentionShape& shape) {
    Conditioning c;
    std::mt19937 random(4);
    std::normal_distribution<float> normal;
    for (int i = 0; i < shape.head_dim * shape.kv_heads; ++i) {
        c.mu.push_back(normal(random));
        c.lambda.push_back(std::exp(normal(random) / 2));
    }
    for (int i = 0; i < shape.head_dim / 2; ++i) {
        c.rope.push_back({static_cast<uint16_t>(2 * i), static_cast<uint16_t>(2 * i + 1),
                          static_cast<float>(std::pow(10000.0, -2.0 * i / shape.head_dim))});
    }
    return c;
}

std::unique_ptr<Store> create_store(const AttentionShape& shape, Side side, int bits) {
    std::unique_ptr<Store> store;
    StoreOptions options;
    options.bits = bits;
    const bool conditioned = shape.conditioned && side == Side::key;
    check(Store::create({side, shape.head_dim, shape.kv_heads, shape.context}, options,
                        conditioned ? random_conditioning(shape) : Conditioning(), store));
    return store;
}

struct OurLayer {
    std::unique_ptr<Store> keys;
    std::unique_ptr<Store> values;
};
using OurLayers = std::vector<OurLayer>;

void fill(Store& store, unsigned seed, const ParallelFor& parallel) {
    constexpr int64_t kBatch = 512;
    const int64_t width = store.shape().row_elements();
    const std::vector<float> pool = normal_numbers(static_cast<size_t>(kPoolRows * width), seed);
    std::vector<float> batch(static_cast<size_t>(kBatch * width));
    std::vector<int64_t> index(static_cast<size_t>(kBatch));
    for (int64_t first = 0; first < store.shape().rows; first += kBatch) {
        const int64_t n = std::min(kBatch, store.shape().rows - first);
        for (int64_t i = 0; i < n; ++i) {
            index[static_cast<size_t>(i)] = first + i;
            std::copy_n(pool.begin() + (first + i) % kPoolRows * width, width, batch.begin() + i * width);
        }
        check(store.write(batch.data(), width, index.data(), n, parallel, nullptr));
    }
}

std::shared_ptr<OurLayers> make_layers(const AttentionShape& shape, int key_bits, int value_bits) {
    OpenMpPool pool(shape.threads);
    auto layers = std::make_shared<OurLayers>();
    layers->push_back({create_store(shape, Side::key, key_bits), create_store(shape, Side::value, value_bits)});
    const OurLayer& first = layers->front();
    fill(*first.keys, 1, pool.parallel());
    fill(*first.values, 2, pool.parallel());
    const int64_t n = layers_for(shape, static_cast<int64_t>(first.keys->bytes() + first.values->bytes()));
    while (static_cast<int64_t>(layers->size()) < n) {
        layers->push_back({create_store(shape, Side::key, key_bits), create_store(shape, Side::value, value_bits)});
        check(layers->back().keys->copy_from(*layers->front().keys));
        check(layers->back().values->copy_from(*layers->front().values));
    }
    return layers;
}

class OurEngine final : public AttentionEngine {
public:
    OurEngine(const AttentionShape& shape, std::shared_ptr<OurLayers> stores, Isa which)
        : stores_(std::move(stores)),
          isa_(which),
          pool_(shape.threads),
          q_(normal_numbers(static_cast<size_t>(shape.queries * shape.heads() * shape.head_dim), 3)),
          out_(q_.size()),
          mask_(shape.mask ? static_cast<size_t>(shape.context) : 0) {
        const OurLayer& first = stores_->front();
        const int key_bits = first.keys->options().bits;
        const int value_bits = first.values->options().bits;
        const bool plain = key_bits == 16 && value_bits == 16;
        name = plain ? "reference" : "turboquant";
        layout = plain ? "head-major" : "tiles";
        isa = isa_name(which);
        kv = plain ? "f16" : fmt::format("{}/{}", key_bits, value_bits);
        layers = static_cast<int64_t>(stores_->size());
        bytes = layers * static_cast<int64_t>(first.keys->bytes() + first.values->bytes());
        call_.q = q_.data();
        call_.out = out_.data();
        call_.q_head_stride = call_.out_head_stride = shape.head_dim;
        call_.q_query_stride = call_.out_query_stride = static_cast<int64_t>(shape.heads()) * shape.head_dim;
        call_.n_queries = shape.queries;
        call_.n_heads = shape.heads();
        call_.n_rows = shape.context;
        call_.mask = shape.mask ? mask_.data() : nullptr; // the same row of zeros for every query
        call_.scale = 1 / std::sqrt(static_cast<float>(shape.head_dim));
    }
    void pass() override {
        for (const OurLayer& layer : *stores_) {
            check(attend(*layer.keys, *layer.values, call_, workspace_, pool_.parallel(), isa_));
        }
    }

private:
    std::shared_ptr<OurLayers> stores_;
    Isa isa_;
    OpenMpPool pool_;
    std::vector<float> q_;
    std::vector<float> out_;
    std::vector<uint16_t> mask_;
    AttentionCall call_;
    AttentionWorkspace workspace_;
};

// ---- ggml ------------------------------------------------------------------------------------------------------------

struct BackendDeleter {
    void operator()(ggml_backend* backend) const { ggml_backend_free(backend); }
};
struct BufferDeleter {
    void operator()(ggml_backend_buffer* buffer) const { ggml_backend_buffer_free(buffer); }
};
struct ContextDeleter {
    void operator()(ggml_context* context) const { ggml_free(context); }
};

std::unique_ptr<ggml_backend, BackendDeleter> cpu_backend(int threads) {
    std::unique_ptr<ggml_backend, BackendDeleter> backend(
        ggml_backend_init_by_type(GGML_BACKEND_DEVICE_TYPE_CPU, nullptr));
    if (!backend) {
        throw llm::Error("this ggml has no CPU back end; leave it out with --engine turboquant,reference");
    }
    ggml_backend_reg_t reg = ggml_backend_dev_backend_reg(ggml_backend_get_device(backend.get()));
    const auto set_threads = reinterpret_cast<ggml_backend_set_n_threads_t>(
        ggml_backend_reg_get_proc_address(reg, "ggml_backend_set_n_threads"));
    if (set_threads == nullptr) {
        throw llm::Error("this ggml's CPU back end takes no number of threads; leave it out with --engine "
                         "turboquant,reference");
    }
    set_threads(backend.get(), threads);
    return backend;
}

class GgmlEngine final : public AttentionEngine {
public:
    GgmlEngine(const AttentionShape& shape, ggml_type type, bool head_major) : backend_(cpu_backend(shape.threads)) {
        name = "ggml";
        layout = head_major ? "head-major" : "token-major";
        kv = ggml_type_name(type);
        const auto head_bytes = static_cast<int64_t>(ggml_row_size(type, shape.head_dim));
        const int64_t layer_bytes = 2 * head_bytes * shape.kv_heads * shape.context;
        layers = layers_for(shape, layer_bytes);
        bytes = layers * layer_bytes;
        const size_t nodes = static_cast<size_t>(layers) * 12 + 16;
        context_.reset(
            ggml_init({ggml_tensor_overhead() * nodes + ggml_graph_overhead_custom(nodes, false), nullptr, true}));
        ggml_context* ctx = context_.get();
        ggml_tensor* q = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, shape.head_dim, shape.heads(), shape.queries);
        ggml_tensor* mask = shape.mask ? ggml_new_tensor_2d(ctx, GGML_TYPE_F16, shape.context, shape.queries) : nullptr;
        graph_ = ggml_new_graph_custom(ctx, nodes, false);
        std::vector<ggml_tensor*> caches;
        for (int64_t layer = 0; layer < layers; ++layer) {
            ggml_tensor* sides[2] = {};
            for (ggml_tensor*& side : sides) {
                if (head_major) {
                    side = ggml_new_tensor_3d(ctx, type, shape.head_dim, shape.context, shape.kv_heads);
                    caches.push_back(side);
                } else {
                    caches.push_back(ggml_new_tensor_3d(ctx, type, shape.head_dim, shape.kv_heads, shape.context));
                    side = ggml_permute(ctx, caches.back(), 0, 2, 1, 3);
                }
            }
            ggml_tensor* out = ggml_flash_attn_ext(ctx, ggml_permute(ctx, q, 0, 2, 1, 3), sides[0], sides[1], mask,
                                                   1 / std::sqrt(static_cast<float>(shape.head_dim)), 0, 0);
            ggml_prec_set_acc(out, GGML_PREC_F32); // as llama.cpp
            ggml_build_forward_expand(graph_, out);
        }
        buffer_.reset(ggml_backend_alloc_ctx_tensors(ctx, backend_.get()));
        if (!buffer_) {
            throw llm::Error(
                fmt::format("ggml's {} caches of {} layers cannot be allocated; use a shorter --context", kv, layers));
        }
        const std::vector<float> numbers = normal_numbers(static_cast<size_t>(ggml_nelements(q)), 3);
        ggml_backend_tensor_set(q, numbers.data(), 0, ggml_nbytes(q));
        if (mask != nullptr) {
            ggml_backend_tensor_memset(mask, 0, 0, ggml_nbytes(mask));
        }
        fill(shape, type, caches);
    }
    void pass() override {
        if (ggml_backend_graph_compute(backend_.get(), graph_) != GGML_STATUS_SUCCESS) {
            throw llm::Error(fmt::format("ggml's flash attention failed on a {} cache", kv));
        }
    }

private:
    // Both layouts are rows of one head each, in whatever order: random numbers need no more.
    void fill(const AttentionShape& shape, ggml_type type, const std::vector<ggml_tensor*>& caches) const {
        const std::vector<float> numbers = normal_numbers(static_cast<size_t>(kPoolRows * shape.head_dim), 1);
        const size_t row = ggml_row_size(type, shape.head_dim);
        std::vector<uint8_t> pool(row * kPoolRows);
        ggml_quantize_chunk(type, numbers.data(), pool.data(), 0, kPoolRows, shape.head_dim, nullptr);
        size_t next = 0;
        for (ggml_tensor* cache : caches) {
            for (size_t at = 0; at < ggml_nbytes(cache);) {
                const size_t n = std::min(pool.size() - next, ggml_nbytes(cache) - at);
                ggml_backend_tensor_set(cache, pool.data() + next, at, n);
                at += n;
                next = (next + n) % pool.size();
            }
        }
    }

    std::unique_ptr<ggml_backend, BackendDeleter> backend_;
    std::unique_ptr<ggml_context, ContextDeleter> context_;
    std::unique_ptr<ggml_backend_buffer, BufferDeleter> buffer_;
    ggml_cgraph* graph_ = nullptr;
};

} // namespace

ParallelFor OpenMpPool::parallel() {
    return {run_openmp, &threads_, threads_};
}

std::vector<std::unique_ptr<AttentionEngine>> make_our_engines(const AttentionShape& shape, int key_bits,
                                                               int value_bits, const std::vector<Isa>& isas) {
    const std::shared_ptr<OurLayers> layers = make_layers(shape, key_bits, value_bits);
    std::vector<std::unique_ptr<AttentionEngine>> engines;
    engines.reserve(isas.size());
    for (const Isa isa : isas) {
        engines.push_back(std::make_unique<OurEngine>(shape, layers, isa));
    }
    return engines;
}

std::unique_ptr<AttentionEngine> make_ggml_engine(const AttentionShape& shape, ggml_type type, bool head_major) {
    return std::make_unique<GgmlEngine>(shape, type, head_major);
}

void PureRead::Free::operator()(uint64_t* words) const {
    std::free(words);
}

PureRead::PureRead(int64_t bytes, int threads)
    : words_(bytes / static_cast<int64_t>(sizeof(uint64_t))), pool_(threads) {
    constexpr size_t kPage = size_t{2} << 20;
    const size_t size = (static_cast<size_t>(bytes) + kPage - 1) / kPage * kPage;
    buffer_.reset(static_cast<uint64_t*>(std::aligned_alloc(kPage, size)));
    if (!buffer_) {
        throw std::bad_alloc();
    }
    ::madvise(buffer_.get(), size, MADV_HUGEPAGE);       // small pages will do
    std::iota(buffer_.get(), buffer_.get() + words_, 1); // untouched pages would all be the same page of zeros
}

double PureRead::bytes_per_second() {
    constexpr int64_t kChunk = int64_t{1} << 17; // words: 1 MiB
    const int64_t n = words_;
    const int64_t chunks = (n + kChunk - 1) / kChunk;
    sums_.assign(static_cast<size_t>(chunks), 0);
    const auto start = std::chrono::steady_clock::now();
    pool_.parallel()(chunks, [&](int64_t chunk, int) {
        const uint64_t* at = buffer_.get() + chunk * kChunk;
        const int64_t words = std::min(kChunk, n - chunk * kChunk);
        constexpr int kLanes = 16; // independent sums: the additions must not be what takes the time
        uint64_t lanes[kLanes] = {};
        for (int64_t i = 0; i + kLanes <= words; i += kLanes) {
            for (int lane = 0; lane < kLanes; ++lane) {
                lanes[lane] += at[i + lane];
            }
        }
        sums_[static_cast<size_t>(chunk)] = std::accumulate(lanes, lanes + kLanes, uint64_t{0});
    });
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    // The sum is needed, or the compiler need not read anything.
    const uint64_t sum = std::accumulate(sums_.begin(), sums_.end(), uint64_t{0});
    return sum == 0 ? 0 : static_cast<double>(n) * sizeof(uint64_t) / seconds;
}

int64_t last_level_cache() {
    int64_t largest = 0;
    for (int index = 0; index < 8; ++index) {
        std::ifstream file(fmt::format("/sys/devices/system/cpu/cpu0/cache/index{}/size", index));
        int64_t size = 0;
        char unit = 0;
        if (file >> size) {
            file >> unit;
            largest = std::max(largest, size * (unit == 'M' ? 1 << 20 : unit == 'K' ? 1 << 10 : 1));
        }
    }
    return largest > 0 ? largest : 32 << 20;
}

} // namespace turboquant::app
