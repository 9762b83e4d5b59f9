// Which attention kernel serves what, and with how much shared memory.
#include "cuda/decode_kernel.cuh"

#include <algorithm>

namespace turboquant::cuda {

int attend_fixed_bytes(int head_size, int rows, int warps) {
    if (head_size == 64) {
        return rows == 4 ? Fixed<64, 4>::bytes(warps) : Fixed<64, 8>::bytes(warps);
    }
    if (head_size == 128) {
        return rows == 4 ? Fixed<128, 4>::bytes(warps) : Fixed<128, 8>::bytes(warps);
    }
    return rows == 4 ? Fixed<256, 4>::bytes(warps) : Fixed<256, 8>::bytes(warps);
}

LaunchShape launch_shape(int head_size, int key_bits, int value_bits, int query_rows) {
    LaunchShape shape{};
    shape.rows = query_rows <= 4 ? 4 : 8;
    shape.warps = head_size == 64 ? kWarps<64> : head_size == 128 ? kWarps<128> : kWarps<256>;
    const int chunk = kChunkTokens / kTileTokens * tile_bytes(head_size, key_bits, value_bits);
    const int fixed = attend_fixed_bytes(head_size, shape.rows, shape.warps);
    int device = 0;
    int most = 0;
    if (cudaGetDevice(&device) != cudaSuccess ||
        cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) != cudaSuccess) {
        most = 0;
    }
    shape.stages = std::min(kMostStages, (most - fixed) / (chunk * shape.warps));
    shape.shared_bytes = fixed + std::max(shape.stages, 0) * chunk * shape.warps;
    shape.blocks_per_sm = 1;
    return shape;
}

cudaError_t launch_attend(const AttendArgs& args, int head_size, const LaunchShape& shape, int blocks,
                          cudaStream_t stream) {
    const AttendKernel kernel = head_size == 64    ? attend_kernel_64(args.key_bits, args.value_bits, shape.rows)
                                : head_size == 128 ? attend_kernel_128(args.key_bits, args.value_bits, shape.rows)
                                                   : attend_kernel_256(args.key_bits, args.value_bits, shape.rows);
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shape.shared_bytes);
    if (error != cudaSuccess) {
        return error;
    }
    kernel<<<blocks, shape.warps * 32, shape.shared_bytes, stream>>>(args);
    return cudaGetLastError();
}

} // namespace turboquant::cuda
