/* What the native kernels share: the instructions they are compiled for, and their arguments. */
#ifndef SWARM_KERNELS_H
#define SWARM_KERNELS_H

#include <stdint.h>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(_WIN32)
#define HAS_KERNELS 1
#include <immintrin.h>
#else
#define HAS_KERNELS 0
#endif

#if HAS_KERNELS

#define TARGET __attribute__((target("avx2,fma,f16c")))
#define INLINE static inline __attribute__((always_inline)) TARGET

/* y = x w^T + bias */
typedef struct {
    const float *x;     /* [m, k] */
    const char *w;      /* [n, k], float16 or float32 */
    const float *bias;  /* [n] or NULL */
    float *y;           /* [m, n] */
    int64_t m, n, k;
    int is_half;
} Product;

void multiply(const Product *p, int threads);

/* One decoder layer: RMS norm, attention with rotary positions, RMS norm, SiLU-gated MLP. */
typedef struct {
    const float *attention_norm, *mlp_norm; /* [hidden] */
    const float *q_norm, *k_norm;           /* [dim] or NULL */
    const char *q, *k, *v, *o, *gate, *up, *down;
    const float *q_bias, *k_bias, *v_bias, *o_bias, *gate_bias, *up_bias, *down_bias; /* or NULL */
    int64_t window; /* positions a query sees, its own included; 0 for all */
} Layer;

/* Where one layer's keys and values lie: [kv_heads, capacity, dim] each. */
typedef struct {
    float *keys, *values;
} Slab;

typedef struct {
    int64_t rows, hidden, heads, kv_heads, dim, intermediate;
    int64_t position, capacity; /* of the first row; of the slabs */
    float eps, scale;
    int is_half, threads;
} Shape;

/* x [rows, hidden] through the layers, in place; keys and values of the rows are appended to the slabs.
 * cos and sin are [rows, dim]. Returns 0, or -1 where there is no memory for the scratch space. */
int decode(const Layer *layers, const Slab *slabs, int64_t count, const Shape *shape, float *x, const float *cos,
           const float *sin);

INLINE float sum(__m256 v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

#endif
#endif
