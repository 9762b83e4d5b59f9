// What the tests of codec and store share.
#pragma once

#include "turboquant/store.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

namespace turboquant::testing {

inline const int kHeadSizes[] = {32, 64, 80, 96, 112, 128, 192, 256, 512, 576};
inline const int kCodecBits[] = {2, 3, 4, 5, 6, 8};

inline std::vector<float> normals(size_t n, uint32_t seed, float deviation = 1) {
    std::mt19937 generator(seed);
    std::normal_distribution<float> normal(0, deviation);
    std::vector<float> out(n);
    for (float& x : out) {
        x = normal(generator);
    }
    return out;
}

inline double dot(const float* a, const float* b, size_t n) {
    double sum = 0;
    for (size_t i = 0; i < n; ++i) {
        sum += static_cast<double>(a[i]) * static_cast<double>(b[i]);
    }
    return sum;
}

inline double squared_distance(const float* a, const float* b, size_t n) {
    double sum = 0;
    for (size_t i = 0; i < n; ++i) {
        const double d = static_cast<double>(a[i]) - static_cast<double>(b[i]);
        sum += d * d;
    }
    return sum;
}

inline std::unique_ptr<Store> make_store(const StoreShape& shape, const StoreOptions& options,
                                         const Conditioning& conditioning = {}) {
    std::unique_ptr<Store> store;
    const Status status = Store::create(shape, options, conditioning, store);
    EXPECT_TRUE(status.ok()) << status.message();
    return store;
}

inline Status write_rows(Store& store, const std::vector<float>& x, const std::vector<int64_t>& index,
                         Staging* staging = nullptr, const ParallelFor& parallel = {}) {
    return store.write(x.data(), store.shape().row_elements(), index.data(), static_cast<int64_t>(index.size()),
                       parallel, staging);
}

// One row of normals that depend on `seed` only.
inline Status write_row(Store& store, int64_t row, uint32_t seed, Staging* staging = nullptr) {
    return write_rows(store, normals(static_cast<size_t>(store.shape().row_elements()), seed), {row}, staging);
}

inline std::vector<float> read_row(const Store& store, int64_t row) {
    std::vector<float> x(static_cast<size_t>(store.shape().row_elements()));
    const Status status = store.read(row, x.data());
    EXPECT_TRUE(status.ok()) << status.message();
    return x;
}

inline std::vector<uint8_t> native_row(const Store& store, int64_t row) {
    std::vector<uint8_t> bytes(store.native_row_bytes());
    store.read_native(row, bytes.data());
    return bytes;
}

// The fp16 values, as floats, that an exact row may differ from by its tag: one unit in the last place.
inline float half_step(float x) {
    int exponent = 0;
    std::frexp(x, &exponent);
    return std::ldexp(1.0F, std::max(exponent - 11, -24));
}

// Threads of one call, started anew: what thread sanitizers understand.
struct ThreadPool {
    int n_threads = 4;

    static void run(void* context, int64_t n_tasks, ParallelFor::Task task, void* arg) {
        const int n = static_cast<ThreadPool*>(context)->n_threads;
        std::vector<std::thread> threads;
        for (int worker = 0; worker < n; ++worker) {
            threads.emplace_back([=] {
                for (int64_t i = worker; i < n_tasks; i += n) {
                    task(arg, i, worker);
                }
            });
        }
        for (std::thread& thread : threads) {
            thread.join();
        }
    }
    ParallelFor parallel() { return {run, this, n_threads}; }
};

} // namespace turboquant::testing
