/* The kernels for processors with AVX2. */
#include "kernels.h"

#if HAS_KERNELS
#pragma GCC target("avx2,fma,f16c")
#define KERNELS avx2_kernels
#include "kernels.inc"
#endif
