#include "attention/kernels.h"

namespace turboquant::attention {

const Kernels* find_kernels(Isa isa) {
    switch (isa) {
    case Isa::portable: return &portable_kernels();
#ifdef TURBOQUANT_HAVE_AVX2
    case Isa::avx2: return &avx2_kernels();
#endif
#ifdef TURBOQUANT_HAVE_AVX512
    case Isa::avx512: return &avx512_kernels();
#endif
#ifdef __aarch64__
    case Isa::neon: return &portable_kernels(); // the compiler's vectors are NEON there: it is the baseline
#endif
    default: return nullptr;
    }
}

} // namespace turboquant::attention
