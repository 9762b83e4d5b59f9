// What the GPU tests share: device memory, a cache in it, and rows of many kinds.
#pragma once

#include "turboquant/codec.h"
#include "turboquant/cuda.h"
#include "turboquant/store.h"

#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

namespace turboquant::cuda_tests {

inline bool have_gpu() {
    int n = 0;
    return cudaGetDeviceCount(&n) == cudaSuccess && n > 0;
}
#define TQ_NEED_GPU()                                                                                                  \
    if (!turboquant::cuda_tests::have_gpu()) {                                                                         \
        GTEST_SKIP() << "no NVIDIA GPU on this machine";                                                               \
    }

#define TQ_CUDA_OK(expression) ASSERT_EQ(expression, cudaSuccess) << cudaGetErrorString(cudaGetLastError())

// Device memory of n T.
template <class T>
class Device {
public:
    explicit Device(size_t n, int fill = 0) : n_(n) {
        EXPECT_EQ(cudaMalloc(reinterpret_cast<void**>(&p_), std::max<size_t>(bytes(), 16)), cudaSuccess);
        EXPECT_EQ(cudaMemset(p_, fill, bytes()), cudaSuccess);
    }
    explicit Device(const std::vector<T>& from) : Device(from.size()) {
        EXPECT_EQ(cudaMemcpy(p_, from.data(), bytes(), cudaMemcpyHostToDevice), cudaSuccess);
    }
    ~Device() { cudaFree(p_); }
    Device(const Device&) = delete;
    Device& operator=(const Device&) = delete;
    T* get() const { return p_; }
    size_t bytes() const { return n_ * sizeof(T); }
    std::vector<T> host() const {
        std::vector<T> out(n_);
        EXPECT_EQ(cudaMemcpy(out.data(), p_, bytes(), cudaMemcpyDeviceToHost), cudaSuccess);
        return out;
    }

private:
    T* p_ = nullptr;
    size_t n_;
};

struct CacheShape {
    int head_size = 128;
    int kv_heads = 2;
    int key_bits = 4;
    int value_bits = 4;
    int page_size = 64;
    int64_t n_pages = 8;
};

inline tq_cuda_cache make_cache(const CacheShape& s) {
    tq_cuda_cache c{};
    c.struct_size = sizeof c;
    c.n_pages = s.n_pages;
    c.page_size = s.page_size;
    c.kv_heads = s.kv_heads;
    c.head_size = s.head_size;
    c.key_bits = s.key_bits;
    c.value_bits = s.value_bits;
    return c;
}

// Rows that a codec meets: plain, with outliers, huge, tiny, zero, and (if asked for) not finite.
inline std::vector<float> make_rows(std::mt19937& random, int64_t n, int elements, int head_size, bool nonfinite) {
    std::normal_distribution<float> normal;
    std::vector<float> x(static_cast<size_t>(n) * static_cast<size_t>(elements));
    for (int64_t r = 0; r < n; ++r) {
        for (int e = 0; e < elements; ++e) {
            const int kind = static_cast<int>((r * 7 + e / head_size) % 12);
            float v = normal(random);
            switch (kind) {
            case 1: v *= e % 31 == 3 ? 60.0F : 1.0F; break; // outlier channels
            case 2: v *= 3e4F; break;                       // saturates fp16
            case 3: v *= 1e-6F; break;                      // fp16 subnormals
            case 4: v = 0; break;
            case 5: v = e % head_size == 17 ? 5.0F : 0.0F; break; // one coordinate
            case 6: v = 1.5F; break;                              // constant
            case 7: v += 20; break;                               // offset
            default: break;
            }
            x[static_cast<size_t>(r * elements + e)] = v;
        }
        if (nonfinite && r % 13 == 5) {
            x[static_cast<size_t>(r * elements + r % elements)] = r % 2 == 0 ? NAN : -INFINITY;
        }
    }
    return x;
}

} // namespace turboquant::cuda_tests
