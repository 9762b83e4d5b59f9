#include "attention/kernels.h"

#if defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace turboquant::attention {

#if defined(__aarch64__) && defined(TURBOQUANT_HAVE_NEON_DOT)
namespace {
bool has_dot_product() {
#if defined(__linux__)
    return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
#elif defined(__APPLE__)
    return true;                                // every Apple processor that runs 64-bit macOS has it
#else
    return false;
#endif
}
} // namespace
#endif

const Kernels* find_kernels(Isa isa) {
    switch (isa) {
    case Isa::portable: return &portable_kernels();
#ifdef TURBOQUANT_HAVE_AVX2
    case Isa::avx2: return &avx2_kernels();
#endif
#ifdef TURBOQUANT_HAVE_AVXVNNI
    case Isa::avxvnni: return &avxvnni_kernels();
#endif
#ifdef TURBOQUANT_HAVE_AVX512
    case Isa::avx512: return &avx512_kernels();
#endif
#ifdef TURBOQUANT_HAVE_AVX512VBMI
    case Isa::avx512vbmi: return &avx512vbmi_kernels();
#endif
#ifdef __aarch64__
#ifdef TURBOQUANT_HAVE_NEON_DOT
    case Isa::neon: return has_dot_product() ? &neon_kernels() : &portable_kernels();
#else
    case Isa::neon: return &portable_kernels(); // the compiler's vectors are NEON there: it is the baseline
#endif
#endif
    default: return nullptr;
    }
}

} // namespace turboquant::attention
