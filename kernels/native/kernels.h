/* What the native kernels share: their arguments, and the instruction sets they are compiled for. */
#ifndef SWARM_KERNELS_H
#define SWARM_KERNELS_H

#include <stdint.h>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(_WIN32)
#define HAS_KERNELS 1
#else
#define HAS_KERNELS 0
#endif

#define PANEL 32 /* rows of a weight that lie together, and tokens of a page */

/* y = x w^T + bias, or y += that. The weight lies in panels: [n / PANEL, k, PANEL], the last one padded. */
typedef struct {
    const float *x;    /* [m, k] */
    const char *w;     /* float16 or float32 */
    const float *bias; /* [n] or NULL */
    float *y;          /* [m, n] */
    int64_t m, n, k;
    int is_half, adds;
} Product;

/* One decoder layer: RMS norm, attention with rotary positions, RMS norm, SiLU-gated MLP. */
typedef struct {
    const float *attention_norm, *mlp_norm; /* [hidden] */
    const float *q_norm, *k_norm;           /* [dim] or NULL */
    const char *q, *k, *v, *o, *gate, *up, *down;
    const float *q_bias, *k_bias, *v_bias, *o_bias, *gate_bias, *up_bias, *down_bias; /* or NULL */
    int64_t window; /* positions a query sees, its own included; 0 for all */
} Layer;

/* The pages of one block: keys [pages, kv_heads, key_dim, PANEL], values [pages, kv_heads, PANEL, value_stride]. */
typedef struct {
    float *keys, *values;
} Pages;

/* Rows [starts[s], starts[s + 1]) are of segment s, at its positions from firsts[s] on, whose keys and values lie in
 * the pages tables[s * table_stride ..]. */
typedef struct {
    int64_t count, table_stride;
    const int32_t *starts, *firsts, *tables;
} Segments;

typedef struct {
    int64_t heads, kv_heads, key_dim, value_dim, value_stride;
    int64_t window, chunk; /* positions a query sees; chunks beyond whose start it does not see; 0 for all */
    float scale, softcap;  /* scores are bounded to +-softcap; 0 for no bound */
    const float *sinks;    /* [heads] or NULL */
} Attention;

typedef struct {
    int64_t rows, hidden, intermediate;
    float eps;
    int is_half, threads;
} Shape;

/* The same kernels for each instruction set; they give the same values, bit for bit. Functions that need scratch space
 * return 0, or -1 where there is no memory for it. */
typedef struct {
    int (*multiply)(const Product *products, int count, int threads);
    int (*append)(const Attention *a, const Segments *s, const Pages *p, const float *keys, const float *values);
    int (*attend)(const Attention *a, const Segments *s, const Pages *p, const float *query, float *out, int threads);
    int (*run_layers)(const Layer *layers, const Pages *pages, int64_t count, const Shape *shape, const Attention *a,
                      const Segments *s, float *x, const float *cos, const float *sin);
} Kernels;

extern const Kernels avx2_kernels, avx512_kernels;

/* pool.c: `work` on all of [0, count), in parts that at most about `threads` threads share. */
typedef void (*Work)(void *arg, int64_t from, int64_t to);
void parallel(Work work, void *arg, int64_t count, int threads);
/* The same where what there is to do differs much: in as many parts as possible. */
void parallel_each(Work work, void *arg, int64_t count, int threads);

/* pool.c: this thread's scratch space for at least `floats` values, 64-byte aligned; NULL where memory is out. Slots 0
 * and 2 are for who calls `parallel`, slot 1 for work within a part. */
float *scratch(int slot, int64_t floats);

#endif
