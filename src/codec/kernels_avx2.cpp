#define TQ_KERNELS kernels_avx2
#define TQ_WIDTH 8
#include "codec/kernels.inc"
