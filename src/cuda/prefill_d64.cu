// The flash loop for heads of 64 channels.
#include "cuda/prefill_flash.cuh"

namespace turboquant::cuda {

FlashKernel flash_kernel_64(bool warpgroups) {
    return warpgroups ? flash_choice<64, 128, 2, true>() : flash_choice<64, 64, 2, false>();
}

} // namespace turboquant::cuda
