// The compiler's baseline: SSE2 on x86-64, Advanced SIMD on AArch64, scalars elsewhere.
#define TQ_KERNELS kernels_portable
#define TQ_WIDTH 4
#include "codec/kernels.inc"
