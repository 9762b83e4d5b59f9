// The attention kernel's arguments, and which kernel serves what. Internal.
#pragma once

#include "cuda/call_args.h"

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

namespace turboquant::cuda {

inline constexpr int kExactChunkRows = 32;
inline constexpr int kRowsPerTile = 4; // query rows that one n8 tile of the tensor core holds, in two halves of a byte
inline constexpr int kMostStages = 2;

struct AttendArgs : CallArgs {
    const float* offsets; // of scores, [sequence and KV head][query row][mean]; null: one mean for all positions
    float* partial;       // [2 * blocks][rows of an item][head_size + 4]
    int32_t* counters;    // [items], zero between calls
    int32_t batch, heads;
    int32_t query_blocks; // items of one sequence and KV head
    int32_t stages;
};

struct LaunchShape {
    int rows;         // query rows of an item: 4 or 8
    int warps;        // of a block
    int tiles;        // of 16 tokens that a warp takes at a time
    int stages;       // of a warp's ring
    int shared_bytes; // dynamic
    int blocks_per_sm;
};

// The launch for a head size, bits and rows of (group * q_len). stages < 1: the device has too little shared memory.
LaunchShape launch_shape(int head_size, int key_bits, int value_bits, int query_rows);
cudaError_t launch_attend(const AttendArgs& args, int head_size, const LaunchShape& shape, int blocks,
                          cudaStream_t stream);

using AttendKernel = void (*)(AttendArgs);
struct KernelChoice {
    AttendKernel kernel;
    int warps;
    int tiles;
    int fixed_bytes; // of shared memory, beside the rings
};
// One per head size, in files of their own so that they compile side by side. rows: 4 or 8.
KernelChoice attend_kernel_64(int key_bits, int value_bits, int rows);
KernelChoice attend_kernel_128(int key_bits, int value_bits, int rows);
KernelChoice attend_kernel_256(int key_bits, int value_bits, int rows);

} // namespace turboquant::cuda
