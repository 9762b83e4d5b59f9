// Which attention kernel serves what, and with how much shared memory.
#include "cuda/decode.h"
#include "cuda/gpu_layout.h"

#include <algorithm>

namespace turboquant::cuda {

namespace {

KernelChoice choose(int head_size, int key_bits, int value_bits, int rows) {
    return head_size == 64    ? attend_kernel_64(key_bits, value_bits, rows)
           : head_size == 128 ? attend_kernel_128(key_bits, value_bits, rows)
                              : attend_kernel_256(key_bits, value_bits, rows);
}

} // namespace

LaunchShape launch_shape(int head_size, int key_bits, int value_bits, int query_rows) {
    LaunchShape shape{};
    shape.rows = query_rows <= 4 ? 4 : 8;
    const KernelChoice choice = choose(head_size, key_bits, value_bits, shape.rows);
    shape.warps = choice.warps;
    shape.tiles = choice.tiles;
    const int ring = choice.tiles * tile_bytes(head_size, key_bits, value_bits) * choice.warps; // one stage of all warps
    int device = 0;
    int most = 0;
    if (cudaGetDevice(&device) != cudaSuccess ||
        cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) != cudaSuccess) {
        most = 0;
    }
    // More than two would only make every block's first copies queue behind everyone's (measured: docs/cuda.md).
    shape.stages = std::min(kMostStages, (most - choice.fixed_bytes) / ring);
    shape.shared_bytes = choice.fixed_bytes + std::max(shape.stages, 0) * ring;
    shape.blocks_per_sm = 1;
    return shape;
}

cudaError_t launch_attend(const AttendArgs& args, int head_size, const LaunchShape& shape, int blocks,
                          cudaStream_t stream) {
    const AttendKernel kernel = choose(head_size, args.key_bits, args.value_bits, shape.rows).kernel;
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shape.shared_bytes);
    if (error != cudaSuccess) {
        return error;
    }
    // The kernel may begin while the one before it in the stream still runs; it waits before it reads (device.cuh).
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    int device = 0;
    int major = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(static_cast<unsigned>(shape.warps * 32));
    config.dynamicSmemBytes = static_cast<size_t>(shape.shared_bytes);
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = major >= 9 ? 1 : 0;
    return cudaLaunchKernelEx(&config, kernel, args);
}

} // namespace turboquant::cuda
