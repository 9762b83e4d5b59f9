// The attention kernels for heads of 128 channels.
#include "cuda/decode_kernel.cuh"

namespace turboquant::cuda {

namespace {

template <int KB, int VB, int ROWS, int WARPS, int TILES>
KernelChoice choice() {
    return {attend_kernel<128, KB, VB, ROWS, WARPS, TILES>, WARPS, TILES, Fixed<128, ROWS>::bytes(WARPS)};
}

} // namespace

KernelChoice attend_kernel_128(int key_bits, int value_bits, int rows) {
    const int both = key_bits * 16 + value_bits;
    if (rows == 4) {
        switch (both) {
        case 0x44: return choice<4, 4, 4, 8, 4>();
        case 0x42: return choice<4, 2, 4, 8, 4>();
        case 0x33: return choice<3, 3, 4, 8, 4>();
        case 0x84: return choice<8, 4, 4, 8, 4>();
        default: return choice<0, 0, 4, 8, 4>();
        }
    }
    return both == 0x44 ? choice<4, 4, 8, 8, 4>() : choice<0, 0, 8, 8, 4>();
}

} // namespace turboquant::cuda
