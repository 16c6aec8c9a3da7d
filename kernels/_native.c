/* Matrix times few vectors, for CPUs with AVX2, FMA and F16C.
 *
 * A decode step multiplies every weight by a handful of rows only: its speed is that of memory. These loops
 * read each weight once, widen float16 in registers, and keep several streams in flight. Rows of the weight
 * are shared among the threads of a pool that waits, spinning only briefly, between calls.
 *
 * Called with raw addresses by swarm/kernels/linear.py, which owns every check.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(_WIN32)
#define HAS_KERNELS 1
#include <immintrin.h>
#include <pthread.h>
#include <stdatomic.h>
#else
#define HAS_KERNELS 0
#endif

#if HAS_KERNELS

#define TARGET __attribute__((target("avx2,fma,f16c")))
#define INLINE static inline __attribute__((always_inline)) TARGET
#define TILE_ROWS 2    /* weight rows at once: as many streams from memory */
#define TILE_INPUTS 4  /* input rows at once: each weight is widened once for all of them */
#define AHEAD 4096     /* bytes fetched ahead in each stream, past the end of short rows */
#define MAX_THREADS 64
#define SPINS 2000

typedef struct {
    const float *x;     /* [m, k] */
    const char *w;      /* [n, k], float16 or float32 */
    const float *bias;  /* [n] or NULL */
    float *y;           /* [m, n] */
    int64_t m, n, k;
    int is_half;
} Product;

INLINE float sum(__m256 v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

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

TARGET static void multiply(const Product *p, int64_t from, int64_t to) {
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
    multiply(&product, from, to < product.n ? to : product.n);
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

static void run(const Product *p, int threads) {
    if (threads <= 1 || p->n * p->k < 1 << 18) {
        multiply(p, 0, p->n);
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

static PyObject *linear(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    if (count != 9) {
        PyErr_SetString(PyExc_TypeError, "linear(x, w, bias, y, m, n, k, is_half, threads)");
        return NULL;
    }
    unsigned long long v[9];
    for (int i = 0; i < 9; i++) {
        v[i] = PyLong_AsUnsignedLongLong(args[i]);
        if (v[i] == (unsigned long long)-1 && PyErr_Occurred()) return NULL;
    }
    Product p = {(const float *)v[0], (const char *)v[1], (const float *)v[2], (float *)v[3],
                 (int64_t)v[4],       (int64_t)v[5],      (int64_t)v[6],       (int)v[7]};
    int threads = v[8] < MAX_THREADS ? (int)v[8] : MAX_THREADS;
    Py_BEGIN_ALLOW_THREADS
    run(&p, threads);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

static PyObject *is_supported(PyObject *self, PyObject *none) {
    __builtin_cpu_init();
    return PyBool_FromLong(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                           __builtin_cpu_supports("f16c"));
}

#else

static PyObject *linear(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    PyErr_SetString(PyExc_NotImplementedError, "no kernels for this processor");
    return NULL;
}

static PyObject *is_supported(PyObject *self, PyObject *none) { Py_RETURN_FALSE; }

#endif

static PyMethodDef methods[] = {
    {"linear", (PyCFunction)(void (*)(void))linear, METH_FASTCALL,
     "linear(x, w, bias, y, m, n, k, is_half, threads): y[m, n] = x[m, k] w[n, k]^T + bias, by address."},
    {"is_supported", is_supported, METH_NOARGS, "Whether this processor can run `linear`."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_native", NULL, -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__native(void) { return PyModule_Create(&module); }
