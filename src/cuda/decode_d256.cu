// The attention kernels for heads of 256 channels.
#include "cuda/decode_kernel.cuh"

namespace turboquant::cuda {

namespace {

template <int KB, int VB, int ROWS, int WARPS, int TILES>
KernelChoice choice() {
    return {attend_kernel<256, KB, VB, ROWS, WARPS, TILES>, WARPS, TILES, Fixed<256, ROWS>::bytes(WARPS)};
}

} // namespace

KernelChoice attend_kernel_256(int key_bits, int value_bits, int rows) {
    if (key_bits == 4 && value_bits == 4) {
        return rows == 4 ? choice<4, 4, 4, 4, 4>() : choice<4, 4, 8, 4, 4>();
    }
    return rows == 4 ? choice<0, 0, 4, 4, 4>() : choice<0, 0, 8, 4, 4>();
}

} // namespace turboquant::cuda
