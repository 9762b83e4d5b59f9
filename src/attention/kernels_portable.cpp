// Kernels in plain C++, for whatever processor the library is compiled for.
#include "attention/kernels.h"

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace turboquant::attention {
namespace {
#include "attention/float_kernels.inl"

constexpr Kernels kPortable = float_kernels();
} // namespace

const Kernels& portable_kernels() {
    return kPortable;
}

} // namespace turboquant::attention
