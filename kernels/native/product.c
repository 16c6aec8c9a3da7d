/* Matrix times few vectors.
 *
 * A decode step multiplies every weight by a handful of rows only: its speed is that of memory. These loops
 * read each weight once, widen float16 in registers, and keep several streams in flight. Rows of the weight
 * are shared among the threads of a pool that sleeps, after spinning briefly, between products.
 */
#include "kernels.h"

#if HAS_KERNELS

#include <pthread.h>
#include <stdatomic.h>

#define TILE_ROWS 2    /* weight rows at once: as many streams from memory */
#define TILE_INPUTS 4  /* input rows at once: each weight is widened once for all of them */
#define AHEAD 4096     /* bytes fetched ahead in each stream, past the end of short rows */
#define SPINS 2000

INLINE __m256 load(const char *w, int64_t at, int is_half) {
    if (is_half) return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(w + 2 * at)));
    return _mm256_loadu_ps((const float *)w + at);
}

INLINE float one(const char *w, int64_t at, int is_half) {
    return is_half ? _cvtsh_ss(((const uint16_t *)w)[at]) : ((const float *)w)[at];
}

/* y[i, row + r] for `rows` weight rows and `inputs` input rows; the constants unroll every inner loop. */
INLINE void tile(const Product *p, int64_t row, int64_t input, int rows, int inputs, int is_half) {
    const int64_t k = p->k, item = is_half ? 2 : 4;
    const char *w[TILE_ROWS];
    __m256 acc[TILE_ROWS][TILE_INPUTS], more[TILE_ROWS][TILE_INPUTS];
    for (int r = 0; r < rows; r++) {
        w[r] = p->w + (row + r) * k * item;
        for (int i = 0; i < inputs; i++) acc[r][i] = more[r][i] = _mm256_setzero_ps();
    }
    const float *x = p->x + input * k;
    int64_t at = 0;
    for (; at + 16 <= k; at += 16) {
        for (int r = 0; r < rows; r++) {
            _mm_prefetch(w[r] + at * item + AHEAD, _MM_HINT_T0);
            __m256 a = load(w[r], at, is_half), b = load(w[r], at + 8, is_half);
            for (int i = 0; i < inputs; i++) {
                acc[r][i] = _mm256_fmadd_ps(a, _mm256_loadu_ps(x + i * k + at), acc[r][i]);
                more[r][i] = _mm256_fmadd_ps(b, _mm256_loadu_ps(x + i * k + at + 8), more[r][i]);
            }
        }
    }
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < inputs; i++) {
            float total = sum(_mm256_add_ps(acc[r][i], more[r][i]));
            for (int64_t rest = at; rest < k; rest++) total += one(w[r], rest, is_half) * x[i * k + rest];
            if (p->bias) total += p->bias[row + r];
            p->y[(input + i) * p->n + row + r] = total;
        }
}

INLINE void rows_of(const Product *p, int64_t from, int64_t to, int is_half) {
    int64_t row = from;
    for (; row + TILE_ROWS <= to; row += TILE_ROWS) {
        int64_t i = 0;
        for (; i + TILE_INPUTS <= p->m; i += TILE_INPUTS) tile(p, row, i, TILE_ROWS, TILE_INPUTS, is_half);
        for (; i < p->m; i++) tile(p, row, i, TILE_ROWS, 1, is_half);
    }
    for (; row < to; row++)
        for (int64_t i = 0; i < p->m; i++) tile(p, row, i, 1, 1, is_half);
}

TARGET static void multiply_rows(const Product *p, int64_t from, int64_t to) {
    if (p->is_half) rows_of(p, from, to, 1);
    else rows_of(p, from, to, 0);
}

/* The pool: one product at a time, its rows cut evenly. Workers sleep on a condition between products. */
static pthread_mutex_t calls = PTHREAD_MUTEX_INITIALIZER; /* one caller at a time uses the pool */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t start = PTHREAD_COND_INITIALIZER;
static int workers, wanted;
static atomic_uint round_;
static atomic_int running;
static Product product;

static void share(int part) {
    int64_t tiles = (product.n + TILE_ROWS - 1) / TILE_ROWS;
    int64_t from = tiles * part / wanted * TILE_ROWS, to = tiles * (part + 1) / wanted * TILE_ROWS;
    multiply_rows(&product, from, to < product.n ? to : product.n);
}

static void *work(void *arg) {
    const int part = (int)(intptr_t)arg;
    unsigned seen = 0;
    for (;;) {
        for (int spin = 0; spin < SPINS && atomic_load(&round_) == seen; spin++) _mm_pause();
        pthread_mutex_lock(&lock);
        while (atomic_load(&round_) == seen) pthread_cond_wait(&start, &lock);
        seen = atomic_load(&round_);
        const int mine = part < wanted;
        pthread_mutex_unlock(&lock);
        if (mine) {
            share(part);
            atomic_fetch_sub(&running, 1);
        }
    }
    return NULL;
}

void multiply(const Product *p, int threads) {
    if (threads <= 1 || p->n * p->k < 1 << 18) {
        multiply_rows(p, 0, p->n);
        return;
    }
    pthread_mutex_lock(&calls);
    pthread_mutex_lock(&lock);
    for (; workers < threads - 1; workers++) {
        pthread_t thread;
        if (pthread_create(&thread, NULL, work, (void *)(intptr_t)(workers + 1))) break;
        pthread_detach(thread);
    }
    product = *p;
    wanted = workers + 1 < threads ? workers + 1 : threads;
    atomic_store(&running, wanted - 1);
    atomic_fetch_add(&round_, 1);
    pthread_cond_broadcast(&start);
    pthread_mutex_unlock(&lock);
    share(0);
    while (atomic_load(&running)) _mm_pause();
    pthread_mutex_unlock(&calls);
}

#endif
