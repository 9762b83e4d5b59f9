// q . mu for every query row and every mean of 256 positions: what scores over codes lack. Internal.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace turboquant::cuda {

struct OffsetArgs {
    const void* q;
    const float* mu;        // [mu_blocks][kv_heads][head_size]
    const int32_t* lengths; // means behind a sequence's end are left out
    float* offsets;         // [items][row = query * group + head of the group][mu_blocks]
    int64_t q_batch, q_query, q_head;
    int32_t type;
    int32_t first_item, items; // item = sequence * kv_heads + head
    int32_t q_len, kv_heads, group;
    int32_t mu_blocks;
    float scale_log2; // of scores (AttendArgs)
};
cudaError_t launch_offsets(const OffsetArgs& args, int head_size, cudaStream_t stream);

} // namespace turboquant::cuda
