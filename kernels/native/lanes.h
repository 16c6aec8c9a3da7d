/* The vector instructions of the kernels under names of our own, for the instruction set that is compiled for. */
#ifndef SWARM_LANES_H
#define SWARM_LANES_H

#include <immintrin.h>
#include <stdint.h>

#include "kernels.h"

#define INLINE static inline __attribute__((always_inline))

#ifdef __AVX512F__

#define LANES 16
#define TILE_ROWS 12  /* input rows whose sums stay in registers */
#define TILE_LANES 32 /* columns whose sums do */
typedef __m512 vec;
INLINE vec load(const float *p) { return _mm512_loadu_ps(p); }
INLINE vec load_half(const uint16_t *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }
INLINE void store(float *p, vec v) { _mm512_storeu_ps(p, v); }
INLINE vec all(float v) { return _mm512_set1_ps(v); }
INLINE vec add(vec a, vec b) { return _mm512_add_ps(a, b); }
INLINE vec sub(vec a, vec b) { return _mm512_sub_ps(a, b); }
INLINE vec mul(vec a, vec b) { return _mm512_mul_ps(a, b); }
INLINE vec divide(vec a, vec b) { return _mm512_div_ps(a, b); }
INLINE vec most(vec a, vec b) { return _mm512_max_ps(a, b); }
INLINE vec least(vec a, vec b) { return _mm512_min_ps(a, b); }
INLINE vec mul_add(vec a, vec b, vec c) { return _mm512_fmadd_ps(a, b, c); }
INLINE float highest_of(vec v) { return _mm512_reduce_max_ps(v); }
INLINE vec nearest(vec v) { return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
/* 2^v for whole numbers v */
INLINE vec power(vec v) {
    __m512i bits = _mm512_add_epi32(_mm512_cvtps_epi32(v), _mm512_set1_epi32(127));
    return _mm512_castsi512_ps(_mm512_slli_epi32(bits, 23));
}

#else

#define LANES 8
#define TILE_ROWS 6
#define TILE_LANES 16
typedef __m256 vec;
INLINE vec load(const float *p) { return _mm256_loadu_ps(p); }
INLINE vec load_half(const uint16_t *p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)); }
INLINE void store(float *p, vec v) { _mm256_storeu_ps(p, v); }
INLINE vec all(float v) { return _mm256_set1_ps(v); }
INLINE vec add(vec a, vec b) { return _mm256_add_ps(a, b); }
INLINE vec sub(vec a, vec b) { return _mm256_sub_ps(a, b); }
INLINE vec mul(vec a, vec b) { return _mm256_mul_ps(a, b); }
INLINE vec divide(vec a, vec b) { return _mm256_div_ps(a, b); }
INLINE vec most(vec a, vec b) { return _mm256_max_ps(a, b); }
INLINE vec least(vec a, vec b) { return _mm256_min_ps(a, b); }
INLINE vec mul_add(vec a, vec b, vec c) { return _mm256_fmadd_ps(a, b, c); }
INLINE float highest_of(vec v) {
    __m128 half = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    half = _mm_max_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
}
INLINE vec nearest(vec v) { return _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
INLINE vec power(vec v) {
    __m256i bits = _mm256_add_epi32(_mm256_cvtps_epi32(v), _mm256_set1_epi32(127));
    return _mm256_castsi256_ps(_mm256_slli_epi32(bits, 23));
}

#endif

/* e^v to about 1e-7 relative, for v in [-87, 87] and held to it (Cephes' polynomial). */
INLINE vec exponential(vec v) {
    v = most(least(v, all(87.0f)), all(-87.0f));
    vec n = nearest(mul(v, all(1.44269504f)));
    vec r = mul_add(n, all(-0.693359375f), v);
    r = mul_add(n, all(2.12194440e-4f), r);
    vec p = all(1.9875691500e-4f);
    p = mul_add(p, r, all(1.3981999507e-3f));
    p = mul_add(p, r, all(8.3334519073e-3f));
    p = mul_add(p, r, all(4.1665795894e-2f));
    p = mul_add(p, r, all(1.6666665459e-1f));
    p = mul_add(p, r, all(0.5f));
    p = mul_add(p, mul(r, r), add(r, all(1.0f)));
    return mul(p, power(n));
}

/* Sums go over 16 lanes in this order on every processor, so that all round alike. */
#define SUM_LANES 16
INLINE float sum_of(const float *lanes) {
    float half[8], quarter[4];
    for (int i = 0; i < 8; i++) half[i] = lanes[i] + lanes[i + 8];
    for (int i = 0; i < 4; i++) quarter[i] = half[i] + half[i + 4];
    return (quarter[0] + quarter[2]) + (quarter[1] + quarter[3]);
}

#endif
