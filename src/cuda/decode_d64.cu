// The attention kernels for heads of 64 channels.
#include "cuda/decode_kernel.cuh"

namespace turboquant::cuda {

AttendKernel attend_kernel_64(int key_bits, int value_bits, int rows) {
    if (key_bits == 4 && value_bits == 4) {
        return rows == 4 ? attend_kernel<64, 4, 4, 4, kWarps<64>> : attend_kernel<64, 4, 4, 8, kWarps<64>>;
    }
    return rows == 4 ? attend_kernel<64, 0, 0, 4, kWarps<64>> : attend_kernel<64, 0, 0, 8, kWarps<64>>;
}

} // namespace turboquant::cuda
