// Which flash kernel serves what, and the launches of a prefill.
#include "cuda/prefill.h"

namespace turboquant::cuda {

namespace {

FlashKernel choose(int head_size, bool warpgroups) {
    return head_size == 64    ? flash_kernel_64(warpgroups)
           : head_size == 128 ? flash_kernel_128(warpgroups)
                              : flash_kernel_256(warpgroups);
}

} // namespace

cudaError_t launch_prefill(const PrefillArgs& args, int head_size, cudaStream_t stream) {
    FlashKernel flash = choose(head_size, true);
    cudaFuncAttributes attributes{};
    cudaError_t error = cudaFuncGetAttributes(&attributes, flash.kernel);
    if (error != cudaSuccess) {
        return error;
    }
    if (attributes.ptxVersion < 90) { // compiled for an older GPU: no warpgroup products in it
        flash = choose(head_size, false);
    }
    error = cudaFuncSetAttribute(flash.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, flash.shared_bytes);
    if (error != cudaSuccess) {
        return error;
    }
    error = launch_images(args, head_size, stream);
    if (error != cudaSuccess) {
        return error;
    }
    const auto blocks = static_cast<unsigned>(args.query_blocks * args.items * args.splits);
    flash.kernel<<<blocks, flash.threads, flash.shared_bytes, stream>>>(args);
    error = cudaGetLastError();
    return error != cudaSuccess || args.splits == 1 ? error : launch_splits_merge(args, head_size, stream);
}

} // namespace turboquant::cuda
