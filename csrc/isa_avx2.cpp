#define ATMAN_ISA avx2
#define ATMAN_SIMD_AVX2
#include "kernels.inc"
