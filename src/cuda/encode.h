// The writing and reading kernels' arguments. Internal.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace turboquant::cuda {

// A codebook as the encoder needs it: what codec/kernels.h's EncodeTable holds, for 2, 3, 4 and 8 bits.
struct SideTable {
    int32_t bits;
    int32_t rule; // KernelRule
    int32_t first_level;
    int32_t step[7]; // crossing threshold k adds this to index << 8 | level
    float threshold[7];
    float range_scale;                    // of 4 bits: EncodeTable's
    float stretch_per_peak, stretch_from; // of the codebook and head size: 1 + per_peak * (peak - from)
};

struct PagesArgs {
    uint8_t* pages;
    const float* mu;
    const float* lambda;
    int32_t mu_blocks; // means of mu, for 256 positions each; 0: one
    int64_t n_slots;
    int64_t page_bytes;
    int32_t page_size, page_shift;
    int32_t kv_heads;
    int32_t tile_bytes;
    uint32_t signs[8]; // of the rotation, bit c % 32 of word c / 32: channel c is negated
    SideTable side[2]; // keys, values
};

struct EncodeArgs {
    PagesArgs cache;
    const void* x[2];
    int64_t stride[2];
    int64_t head_stride[2];
    int64_t n;
    const int64_t* slots;
    const int64_t* exact_rows;
    const int64_t* positions; // of rows, where there are mu_blocks
    uint16_t* exact[2];
    int32_t type;
    float norm;                // 1 / sqrt(head size)
    int32_t rows;              // of a block: 16, or fewer; set by launch_encode
    int32_t vectors[2];        // rows are aligned for moves of four elements
    int32_t condition_vectors; // so are mu and lambda
    // Signs of the rotation as four lanes want them: lane w's pair p of elements, channels 16 (p / 2) + 4 w + 2 (p % 2)
    // and the next, are negated by bits p % 16 and 16 + p % 16 of word [p / 16][w].
    uint32_t pair_signs[2][4];
};

struct ReadArgs {
    PagesArgs cache;
    const int64_t* slots;
    const int64_t* positions;
    int64_t n;
    uint8_t* codes;
    uint16_t* scales;
    void* rows;
    int32_t type;
    int32_t rotated;
};

cudaError_t launch_encode(EncodeArgs args, int head_size, cudaStream_t stream);
cudaError_t launch_read(const ReadArgs& args, int head_size, cudaStream_t stream);

} // namespace turboquant::cuda
