// Attention of many queries: codes and exact rows become fp16 images of tiles in a workspace, once, and a flash loop
// runs over the images. Internal.
//
//   item     : a sequence and a KV head
//   image    : 64 tokens of an item in the rotated basis, times 2^-4 (so that no row that fp16 holds can overflow):
//              keys   [head_size / 64][64 tokens][64 channels]
//              values [head_size][64 tokens]
//              with 16-byte chunk c of a 128-byte row r at chunk c ^ (r % 8), as the tensor cores read them
//   images of an item: those of the codes from token 0 on, then those of the exact rows (Extent's order)
#pragma once

#include "cuda/call_args.h"

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

namespace turboquant::cuda {

inline constexpr int kImageTokens = 64;
inline constexpr int kMostTileTokens = 128; // of the flash loop: images are counted in whole such tiles
inline constexpr int kPrefillRows = 128;    // (query, head of the group) pairs of a block
inline constexpr float kImageUnit = 16;     // images hold numbers divided by it

constexpr size_t image_bytes(int head_size) {
    return size_t{2} * static_cast<size_t>(head_size) * kImageTokens * 2;
}

struct PrefillArgs : CallArgs {
    uint8_t* images;      // [items of a launch][code_images + exact_images]
    const float* offsets; // of scores, [items of a launch][row][mean]; null: one mean for all positions
    // Where there are more SMs than blocks a row's tiles are split between blocks: [items of a launch][split][row][channel],
    // and for each row log2 of its sum.
    float* partial;
    float* partial_log2;
    int32_t first_item, items; // of this launch; item = sequence * kv_heads + head
    uint32_t group_inverse; // 2^32 / group, rounded up (group > 1): the high word of r times it is r / group, r < 2^28
    int32_t max_length;
    int32_t query_blocks; // of an item
    int32_t splits;
    int32_t code_images, exact_images;
    int32_t q_vectors, out_vectors; // rows are aligned for moves of 16 bytes
};

// All kernels. `items` of args may be fewer than those of the call: then call again with the next first_item.
cudaError_t launch_prefill(const PrefillArgs& args, int head_size, cudaStream_t stream);

// The parts, in files of their own.
cudaError_t launch_splits_merge(const PrefillArgs& args, int head_size, cudaStream_t stream);
cudaError_t launch_images(const PrefillArgs& args, int head_size, cudaStream_t stream);
struct FlashKernel {
    void (*kernel)(PrefillArgs);
    int threads;
    int shared_bytes;
};
FlashKernel flash_kernel_64(bool warpgroups);
FlashKernel flash_kernel_128(bool warpgroups);
FlashKernel flash_kernel_256(bool warpgroups);

} // namespace turboquant::cuda
