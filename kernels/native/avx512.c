/* The kernels for processors with AVX512. */
#include "kernels.h"

#if HAS_KERNELS
#pragma GCC target("avx512f,avx512dq,avx512vl,avx512bw,avx2,fma,f16c")
#define KERNELS avx512_kernels
#include "kernels.inc"
#endif
