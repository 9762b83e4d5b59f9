// The flash loop for heads of 128 channels.
#include "cuda/prefill_flash.cuh"

namespace turboquant::cuda {

FlashKernel flash_kernel_128(bool warpgroups) {
    return warpgroups ? flash_choice<128, 128, 2, true>() : flash_choice<128, 64, 2, false>();
}

} // namespace turboquant::cuda
