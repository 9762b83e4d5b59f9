// The attention kernel's arguments, and which kernel serves what. Internal.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

namespace turboquant::cuda {

inline constexpr int kExactChunkRows = 32;
inline constexpr int kRowsPerTile = 4; // query rows that one n8 tile of the tensor core holds, in two halves of a byte
inline constexpr int kMostStages = 2;

struct AttendArgs {
    const uint8_t* pages;
    const float* mu;
    const float* lambda;
    const uint16_t* exact_keys;
    const uint16_t* exact_values;
    const void* q;
    void* out;
    const int32_t* page_table;
    const int32_t* lengths;
    const int32_t* sequence_slots;
    const float* sink_logits;
    const float* offsets; // of scores, [sequence and KV head][query row][mean]; null: one mean for all positions
    float* partial;       // [2 * blocks][rows of an item][head_size + 4]
    int32_t* counters;    // [items], zero between calls
    int64_t q_batch, q_query, q_head;
    int64_t out_batch, out_query, out_head;
    int64_t page_table_stride;
    int64_t page_bytes;
    int32_t type;
    int32_t batch, q_len, heads, kv_heads, group;
    int32_t query_blocks; // items of one sequence and KV head
    int32_t page_size, page_shift;
    int32_t key_bits, value_bits;
    int32_t tile_bytes;
    int32_t stages;
    int32_t sinks, ring, window, sliding_window;
    int32_t mu_blocks;
    int32_t causal;
    uint32_t signs[8];  // of the rotation, bit c % 32 of word c / 32: channel c is negated
    float scale_log2;   // of scores, into units of log2; with soft-cap: scale / softcap
    float softcap_log2; // 0: none; else softcap * log2(e)
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
