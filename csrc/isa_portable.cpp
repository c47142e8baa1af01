#define ATMAN_ISA portable
#define ATMAN_SIMD_PORTABLE
#include "kernels.inc"
