// Kernels for AVX-512 F/BW/DQ/VL with VNNI and VBMI, whose look-ups take 6 index bits. Compiled for that; called only where the processor has it.
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
    return _mm512_permutexvar_epi8(index, table);
}
inline Bytes load_table64(const int8_t* table) {
    return _mm512_load_si512(table);
}

#include "attention/int_decoders_six.inl"

#include "attention/int_kernels.inl"

constexpr Kernels kAvx512Vbmi = all_kernels();
} // namespace

const Kernels& avx512vbmi_kernels() {
    return kAvx512Vbmi;
}

} // namespace turboquant::attention
