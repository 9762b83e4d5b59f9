// The instruction sets that the kernels are written for, and which of them this process uses.
#pragma once

#include "turboquant/status.h"

#include <string_view>
#include <vector>

namespace turboquant {

// portable: plain C++, whatever the compiler's baseline is. avx2: AVX2 + FMA + F16C. avxvnni: that and AVX-VNNI.
// avx512: AVX-512 F/BW/DQ/VL + VNNI. avx512vbmi: that and VBMI. neon: AArch64 Advanced SIMD. All of them store the same
// codes; attention results differ by rounding only.
enum class Isa { portable, avx2, avxvnni, avx512, avx512vbmi, neon };

std::string_view isa_name(Isa isa);

// Compiled into this library and runnable on this processor. Always starts with portable; best last.
const std::vector<Isa>& available_isas();

// The one that kernels use when a caller names none: the best available, or what the environment variable
// TURBOQUANT_ISA names. A value there that is unknown or cannot run here is an error, never ignored.
// Read once per process; thread-safe.
Status default_isa(Isa& isa);

// "avx2" -> Isa::avx2. Error names the known ones.
Status parse_isa(std::string_view name, Isa& isa);

} // namespace turboquant
