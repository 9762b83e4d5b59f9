// Kernels for AVX2 with FMA and F16C. Compiled for that; called only where the processor has it.
#include "attention/kernels.h"

#include <immintrin.h>

namespace turboquant::attention {
namespace {
#include "attention/float_kernels.inl"

constexpr Kernels kAvx2 = float_kernels();
} // namespace

const Kernels& avx2_kernels() {
    return kAvx2;
}

} // namespace turboquant::attention
