// Kernels for AVX-512 F/BW/DQ/VL with VNNI. Compiled for that; called only where the processor has it.
#include "attention/kernels.h"

#include <immintrin.h>

namespace turboquant::attention {
namespace {
#include "attention/float_kernels.inl"

constexpr Kernels kAvx512 = float_kernels();
} // namespace

const Kernels& avx512_kernels() {
    return kAvx512;
}

} // namespace turboquant::attention
