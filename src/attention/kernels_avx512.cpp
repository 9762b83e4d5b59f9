// Kernels for AVX-512 F/BW/DQ/VL with VNNI. Compiled for that; called only where the processor has it.
#include "attention/kernels.h"

#if defined(__GNUC__) && !defined(__clang__) // GCC 12 warns of its own header (GCC bug 105593)
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

namespace turboquant::attention {
namespace {
#include "attention/float_kernels.inl"
#include "attention/vectors512.inl"

inline Bytes lookup(Bytes table, Bytes index) {
    return _mm512_shuffle_epi8(table, index);
}

#include "attention/int_decoders.inl"

#include "attention/int_kernels.inl"

constexpr Kernels kAvx512 = all_kernels();
} // namespace

const Kernels& avx512_kernels() {
    return kAvx512;
}

} // namespace turboquant::attention
