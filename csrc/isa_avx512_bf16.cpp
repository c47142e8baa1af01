#define ATMAN_ISA avx512_bf16
#define ATMAN_SIMD_AVX512_BF16
#define ATMAN_BF16_ONLY
#include "kernels.inc"
