// The attention kernels for heads of 256 channels.
#include "cuda/decode_kernel.cuh"

namespace turboquant::cuda {

AttendKernel attend_kernel_256(int key_bits, int value_bits, int rows) {
    if (key_bits == 4 && value_bits == 4) {
        return rows == 4 ? attend_kernel<256, 4, 4, 4, kWarps<256>> : attend_kernel<256, 4, 4, 8, kWarps<256>>;
    }
    return rows == 4 ? attend_kernel<256, 0, 0, 4, kWarps<256>> : attend_kernel<256, 0, 0, 8, kWarps<256>>;
}

} // namespace turboquant::cuda
