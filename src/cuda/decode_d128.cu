// The attention kernels for heads of 128 channels.
#include "cuda/decode_kernel.cuh"

namespace turboquant::cuda {

AttendKernel attend_kernel_128(int key_bits, int value_bits, int rows) {
    const int both = key_bits * 16 + value_bits;
    if (rows == 4) {
        switch (both) {
        case 0x44: return attend_kernel<128, 4, 4, 4, kWarps<128>>;
        case 0x42: return attend_kernel<128, 4, 2, 4, kWarps<128>>;
        case 0x33: return attend_kernel<128, 3, 3, 4, kWarps<128>>;
        case 0x84: return attend_kernel<128, 8, 4, 4, kWarps<128>>;
        default: return attend_kernel<128, 0, 0, 4, kWarps<128>>;
        }
    }
    return both == 0x44 ? attend_kernel<128, 4, 4, 8, kWarps<128>> : attend_kernel<128, 0, 0, 8, kWarps<128>>;
}

} // namespace turboquant::cuda
