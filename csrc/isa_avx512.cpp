#define ATMAN_ISA avx512
#define ATMAN_SIMD_AVX512
#include "kernels.inc"
