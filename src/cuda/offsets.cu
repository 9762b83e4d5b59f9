// A block: 32 query rows of an item times 32 means, four products a thread.
#include "cuda/offsets.h"

#include "cuda/device.cuh"

namespace turboquant::cuda {

namespace {

constexpr int kTile = 32;
constexpr int kOffsetThreads = 256;
constexpr int kSlice = 64; // channels in shared memory at a time

__global__ void __launch_bounds__(kOffsetThreads) offsets_kernel(const __grid_constant__ OffsetArgs a, int head_size) {
    __shared__ float queries[kTile][kSlice + 1];
    __shared__ float means[kTile][kSlice + 1];
    const int local = static_cast<int>(blockIdx.x);
    const int item = a.first_item + local;
    const int b = item / a.kv_heads;
    const int head = item % a.kv_heads;
    const int rows = a.group * a.q_len;
    const int first_mean = static_cast<int>(blockIdx.y) * kTile;
    if (first_mean << kMeanShift >= max(a.lengths[b], 1)) {
        return;
    }
    const int x = static_cast<int>(threadIdx.x) % 16; // means x and x + 16
    const int y = static_cast<int>(threadIdx.x) / 16; // rows y and y + 16
    for (int first_row = static_cast<int>(blockIdx.z) * kTile; first_row < rows;
         first_row += static_cast<int>(gridDim.z) * kTile) {
        float sum[2][2] = {};
        for (int slice = 0; slice < head_size; slice += kSlice) {
            __syncthreads();
            for (int at = static_cast<int>(threadIdx.x); at < kTile * kSlice; at += kOffsetThreads) {
                const int i = at / kSlice;
                const int channel = slice + at % kSlice;
                const int row = first_row + i;
                const int mean = first_mean + i;
                const int64_t q =
                    b * a.q_batch + row / a.group * a.q_query + (head * a.group + row % a.group) * a.q_head;
                queries[i][at % kSlice] = row < rows ? load_element(a.q, q + channel, a.type) : 0;
                means[i][at % kSlice] =
                    mean < a.mu_blocks ? a.mu[(static_cast<int64_t>(mean) * a.kv_heads + head) * head_size + channel]
                                       : 0;
            }
            __syncthreads();
#pragma unroll 8
            for (int c = 0; c < kSlice; ++c) {
                const float q0 = queries[y][c];
                const float q1 = queries[y + 16][c];
                const float m0 = means[x][c];
                const float m1 = means[x + 16][c];
                sum[0][0] = fmaf(q0, m0, sum[0][0]);
                sum[0][1] = fmaf(q0, m1, sum[0][1]);
                sum[1][0] = fmaf(q1, m0, sum[1][0]);
                sum[1][1] = fmaf(q1, m1, sum[1][1]);
            }
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
#pragma unroll
            for (int k = 0; k < 2; ++k) {
                const int row = first_row + y + 16 * i;
                const int mean = first_mean + x + 16 * k;
                if (row < rows && mean < a.mu_blocks) {
                    a.offsets[(static_cast<int64_t>(local) * rows + row) * a.mu_blocks + mean] =
                        sum[i][k] * a.scale_log2;
                }
            }
        }
    }
}

} // namespace

cudaError_t launch_offsets(const OffsetArgs& args, int head_size, cudaStream_t stream) {
    const int rows = args.group * args.q_len;
    const dim3 grid(static_cast<unsigned>(args.items), static_cast<unsigned>((args.mu_blocks + kTile - 1) / kTile),
                    static_cast<unsigned>(rows < 64 * kTile ? (rows + kTile - 1) / kTile : 64));
    offsets_kernel<<<grid, kOffsetThreads, 0, stream>>>(args, head_size);
    return cudaGetLastError();
}

} // namespace turboquant::cuda
