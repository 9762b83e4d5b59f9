#define TQ_KERNELS kernels_avx512
#define TQ_WIDTH 16
#include "codec/kernels.inc"
