// Instructions that CUDA C++ has no name for, and the asynchronous copies. Internal.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace turboquant::cuda {

// Bytes of {low, high} by selector nibbles; a nibble's top bit fills the byte with the chosen byte's sign instead.
__device__ __forceinline__ uint32_t prmt(uint32_t low, uint32_t high, uint32_t selector) {
    uint32_t r;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(r) : "r"(low), "r"(high), "r"(selector));
    return r;
}

// d = a b + c; a: 16x32 s8 (rows), b: 32x8 s8 or u8 (columns).
#define TQ_MMA(name, types)                                                                                            \
    __device__ __forceinline__ void name(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],              \
                                         const int32_t (&c)[4]) {                                                      \
        asm("mma.sync.aligned.m16n8k32.row.col." types " {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"    \
            : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])                                                           \
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(c[0]), "r"(c[1]), "r"(c[2]),       \
              "r"(c[3]));                                                                                              \
    }
TQ_MMA(mma_s8s8, "s32.s8.s8.s32")
TQ_MMA(mma_s8u8, "s32.s8.u8.s32")
#undef TQ_MMA

// Transposes an 8x8 matrix of 16-bit elements: lane 4 g + t holds row g, columns 2t and 2t + 1.
__device__ __forceinline__ uint32_t transpose8x8(uint32_t a) {
    uint32_t d;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(d) : "r"(a));
    return d;
}

__device__ __forceinline__ float exp2_fast(float x) { // 2 ulp; 0 for -infinity
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ uint32_t shared_address(const void* p) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Adds 1, gives what was there; writes of this thread (and those that a barrier put before it) come before, reads after.
// A decode call at 4K tokens takes 0.1 us less than with two full fences around a plain atomic (three pairs of runs).
__device__ __forceinline__ int32_t count_in(int32_t* counter) {
    int32_t before;
    asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
    return before;
}

// Launched with the attribute that lets it begin before the kernel in front of it has ended (Hopper): waits for that end.
// What comes before this call must read nothing that other kernels write.
__device__ __forceinline__ void wait_for_previous_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// ---- one warp's copies into shared memory, counted by a barrier that the warp waits on ----------------------------
// Hopper: one lane starts a bulk copy, the copy engine does the rest. Before: every lane copies 16 bytes at a time.

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
inline constexpr int kBarrierArrivals = 1;
#else
inline constexpr int kBarrierArrivals = 32;
#endif

__device__ __forceinline__ void barrier_init(uint64_t* barrier, int arrivals = kBarrierArrivals) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

__device__ __forceinline__ void barrier_arrive(uint64_t* barrier) {
    asm volatile("{ .reg .b64 state; mbarrier.arrive.shared.b64 state, [%0]; }" ::"r"(shared_address(barrier))
                 : "memory");
}

// After the last barrier_init: the copy engine sees them.
__device__ __forceinline__ void barrier_fence() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

__device__ __forceinline__ void barrier_wait(uint64_t* barrier, uint32_t parity) {
    const uint32_t address = shared_address(barrier);
    uint32_t done = 0;
    do {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
        asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                     : "=r"(done)
                     : "r"(address), "r"(parity)
                     : "memory");
#elif defined(__CUDA_ARCH__)
        // sm_80 has no wait by parity: the phase is asked for with test_wait.parity, which PTX has from sm_80 on.
        asm volatile("{ .reg .pred p; mbarrier.test_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                     : "=r"(done)
                     : "r"(address), "r"(parity)
                     : "memory");
#endif
    } while (done == 0);
}

// Announces `bytes` that lanes will copy; called by the whole warp. A copy may finish before: the count of bytes then is
// negative for a while, and the barrier still waits for this arrival.
__device__ __forceinline__ void copy_begin(uint64_t* barrier, uint32_t bytes, int lane) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    if (lane == 0) {
        asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
                     : "memory");
    }
#endif
}

// The announced bytes: pieces of `bytes` each (a multiple of 16, aligned to 16), one after the other in shared memory;
// lane i < n holds the source of piece i. Called by the whole warp.
__device__ __forceinline__ void copy_pieces(uint64_t* barrier, void* target, const void* source, uint32_t bytes, int n,
                                            int lane) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    if (lane < n) {
        asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                         shared_address(target) + lane * bytes),
                     "l"(source), "r"(bytes), "r"(shared_address(barrier))
                     : "memory");
    }
#else
    const uint32_t to = shared_address(target);
    for (int piece = 0; piece < n; ++piece) {
        const auto* const from = reinterpret_cast<const char*>(
            __shfl_sync(0xffffffffU, reinterpret_cast<unsigned long long>(source), piece));
        for (uint32_t at = lane * 16; at < bytes; at += 32 * 16) {
            asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to + piece * bytes + at), "l"(from + at)
                         : "memory");
        }
    }
    asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(shared_address(barrier)) : "memory");
#endif
}

// Which of `blocks` means a position has.
inline constexpr int kMeanShift = 8; // of 256 positions
__device__ __forceinline__ int mean_block(int64_t position, int blocks) {
    const int64_t block = (position < 0 ? 0 : position) >> kMeanShift;
    return static_cast<int>(block < blocks ? block : blocks - 1);
}

// ---- element types -----------------------------------------------------------------------------------------------

__device__ __forceinline__ float load_element(const void* p, int64_t index, int type) {
    switch (type) {
    case 0: return static_cast<const float*>(p)[index];
    case 1: return __half2float(static_cast<const __half*>(p)[index]);
    default: return __bfloat162float(static_cast<const __nv_bfloat16*>(p)[index]);
    }
}
__device__ __forceinline__ void store_element(void* p, int64_t index, int type, float x) {
    switch (type) {
    case 0: static_cast<float*>(p)[index] = x; break;
    case 1: static_cast<__half*>(p)[index] = __float2half_rn(x); break;
    default: static_cast<__nv_bfloat16*>(p)[index] = __float2bfloat16_rn(x); break;
    }
}

// y = H y / sqrt(D) across a warp, lane l holding channels l*D/32 .. + D/32 - 1. H is symmetric for a power of two.
// Same operations in the same order as the CPU's, so the same bits.
template <int D>
__device__ __forceinline__ void hadamard_warp(float (&y)[D / 32], int lane) {
    constexpr int kOwn = D / 32;
#pragma unroll
    for (int h = 1; h < kOwn; h *= 2) {
#pragma unroll
        for (int i = 0; i < kOwn; ++i) {
            if ((i & h) == 0) {
                const float a = y[i];
                const float b = y[i + h];
                y[i] = __fadd_rn(a, b);
                y[i + h] = __fsub_rn(a, b);
            }
        }
    }
#pragma unroll
    for (int h = 1; h < 32; h *= 2) {
        const float sign = (lane & h) != 0 ? -1.0F : 1.0F;
#pragma unroll
        for (int i = 0; i < kOwn; ++i) {
            const float other = __shfl_xor_sync(0xffffffffU, y[i], h);
            y[i] = __fmaf_rn(y[i], sign, other); // exact product: one rounding, as an addition
        }
    }
    const float norm = __fdiv_rn(1.0F, __fsqrt_rn(static_cast<float>(D)));
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
        y[i] = __fmul_rn(y[i], norm);
    }
}

} // namespace turboquant::cuda
