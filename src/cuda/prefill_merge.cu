// Rows whose tiles were split between blocks: their parts, weighed by their sums. A warp a row.
#include "cuda/device.cuh"
#include "cuda/prefill.h"

namespace turboquant::cuda {

namespace {

constexpr int kMergeWarps = 4;

template <int D>
__global__ void __launch_bounds__(kMergeWarps * 32) merge_kernel(const __grid_constant__ PrefillArgs a) {
    constexpr int kOwn = D / 32;
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const int rows = a.group * a.q_len;
    const int64_t at = static_cast<int64_t>(blockIdx.x) * kMergeWarps + threadIdx.x / 32;
    const int item = static_cast<int>(at / rows);
    const int r = static_cast<int>(at % rows);
    if (item >= a.items) {
        return;
    }
    const int b = (a.first_item + item) / a.kv_heads;
    const int head = (a.first_item + item) % a.kv_heads * a.group + r % a.group;
    const int64_t first = static_cast<int64_t>(item) * a.splits * rows + r;
    // Splits are at most as many as a warp has lanes.
    const float own = lane < a.splits ? a.partial_log2[first + static_cast<int64_t>(lane) * rows] : -INFINITY;
    float top = own;
#pragma unroll
    for (int h = 16; h > 0; h /= 2) {
        top = fmaxf(top, __shfl_xor_sync(0xffffffffU, top, h));
    }
    const float weight = exp2f(own - (top == -INFINITY ? 0 : top));
    float total = weight;
#pragma unroll
    for (int h = 16; h > 0; h /= 2) {
        total += __shfl_xor_sync(0xffffffffU, total, h);
    }
    if (a.sink_logits != nullptr && total > 0) {
        total += exp2f(a.sink_logits[head] * 1.4426950408889634F - top);
    }
    const float share = total > 0 ? weight / total : 0;
    float y[kOwn] = {};
    for (int s = 0; s < a.splits; ++s) {
        const float* const part = a.partial + (first + static_cast<int64_t>(s) * rows) * D + lane * kOwn;
        const float of = __shfl_sync(0xffffffffU, share, s);
#pragma unroll
        for (int e = 0; e < kOwn; ++e) {
            y[e] = fmaf(of, part[e], y[e]);
        }
    }
    const int64_t to = b * a.out_batch + r / a.group * a.out_query + head * a.out_head + lane * kOwn;
#pragma unroll
    for (int e = 0; e < kOwn; ++e) {
        store_element(a.out, to + e, a.type, y[e]);
    }
}

} // namespace

cudaError_t launch_splits_merge(const PrefillArgs& args, int head_size, cudaStream_t stream) {
    const int64_t rows = int64_t{args.items} * args.group * args.q_len;
    const auto blocks = static_cast<unsigned>((rows + kMergeWarps - 1) / kMergeWarps);
    switch (head_size) {
    case 64: merge_kernel<64><<<blocks, kMergeWarps * 32, 0, stream>>>(args); break;
    case 128: merge_kernel<128><<<blocks, kMergeWarps * 32, 0, stream>>>(args); break;
    default: merge_kernel<256><<<blocks, kMergeWarps * 32, 0, stream>>>(args); break;
    }
    return cudaGetLastError();
}

} // namespace turboquant::cuda
