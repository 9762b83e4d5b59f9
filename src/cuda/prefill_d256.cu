// The flash loop for heads of 256 channels.
#include "cuda/prefill_flash.cuh"

namespace turboquant::cuda {

FlashKernel flash_kernel_256(bool warpgroups) {
    return warpgroups ? flash_choice<256, 64, 2, true>() : flash_choice<256, 64, 1, false>();
}

} // namespace turboquant::cuda
