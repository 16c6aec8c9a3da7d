/* A few tokens of one session through the decoder layers of the Llama family, float32 activations.
 *
 * The same arithmetic as transformers' layers, without a call for each small operation: on one token those
 * cost more than the weights do. swarm/kernels/decode.py owns every check.
 */
#include "kernels.h"

#if HAS_KERNELS

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* e^v to about 1e-7 relative, for v <= 0 and not too small (Cephes' polynomial). */
INLINE __m256 exp8(__m256 v) {
    v = _mm256_max_ps(v, _mm256_set1_ps(-87.0f));
    __m256 n = _mm256_round_ps(_mm256_mul_ps(v, _mm256_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT);
    __m256 r = _mm256_fnmadd_ps(n, _mm256_set1_ps(0.693359375f), v);
    r = _mm256_fnmadd_ps(n, _mm256_set1_ps(-2.12194440e-4f), r);
    __m256 p = _mm256_set1_ps(1.9875691500e-4f);
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.3981999507e-3f));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(8.3334519073e-3f));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(4.1665795894e-2f));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.6666665459e-1f));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(0.5f));
    p = _mm256_fmadd_ps(p, _mm256_mul_ps(r, r), _mm256_add_ps(r, _mm256_set1_ps(1.0f)));
    __m256i power = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
    return _mm256_mul_ps(p, _mm256_castsi256_ps(power));
}

INLINE float dot(const float *a, const float *b, int64_t n) {
    __m256 acc = _mm256_setzero_ps();
    for (int64_t i = 0; i < n; i += 8) acc = _mm256_fmadd_ps(_mm256_loadu_ps(a + i), _mm256_loadu_ps(b + i), acc);
    return sum(acc);
}

/* y = x / rms(x) * weight, over n values; x and y may be the same. */
TARGET static void rms_norm(const float *x, const float *weight, float *y, int64_t n, float eps) {
    __m256 factor = _mm256_set1_ps(1.0f / sqrtf(dot(x, x, n) / (float)n + eps));
    for (int64_t i = 0; i < n; i += 8) {
        __m256 normal = _mm256_mul_ps(_mm256_loadu_ps(x + i), factor);
        _mm256_storeu_ps(y + i, _mm256_mul_ps(_mm256_loadu_ps(weight + i), normal));
    }
}

/* Rotary position embedding of one head, in place: halves of it are the two parts of each rotated pair. */
TARGET static void rotate(float *x, const float *cos, const float *sin, int64_t dim) {
    const int64_t half = dim / 2;
    for (int64_t i = 0; i < half; i++) {
        float a = x[i], b = x[i + half];
        x[i] = a * cos[i] - b * sin[i];
        x[i + half] = b * cos[i + half] + a * sin[i + half];
    }
}

/* Scores to weights over n positions, in place; there is room for n rounded up to 8. */
TARGET static void softmax(float *scores, int64_t n) {
    float most = scores[0], total = 0;
    for (int64_t i = 1; i < n; i++) most = scores[i] > most ? scores[i] : most;
    for (int64_t i = n; i % 8; i++) scores[i] = -INFINITY;
    __m256 totals = _mm256_setzero_ps();
    for (int64_t i = 0; i < n; i += 8) {
        __m256 e = exp8(_mm256_sub_ps(_mm256_loadu_ps(scores + i), _mm256_set1_ps(most)));
        if (i + 8 > n) {
            float last[8];
            _mm256_storeu_ps(last, e);
            memset(last + (n - i), 0, sizeof(float) * (size_t)(i + 8 - n));
            e = _mm256_loadu_ps(last);
        }
        totals = _mm256_add_ps(totals, e);
        _mm256_storeu_ps(scores + i, e);
    }
    total = sum(totals);
    for (int64_t i = 0; i < n; i += 8)
        _mm256_storeu_ps(scores + i, _mm256_div_ps(_mm256_loadu_ps(scores + i), _mm256_set1_ps(total)));
}

/* One query head over the positions [from, to) of its keys and values, into out [dim]. */
TARGET static void attend(const float *query, const float *keys, const float *values, int64_t from, int64_t to,
                          int64_t dim, float scale, float *scores, float *out) {
    for (int64_t at = from; at < to; at++) scores[at - from] = scale * dot(query, keys + at * dim, dim);
    softmax(scores, to - from);
    memset(out, 0, sizeof(float) * (size_t)dim);
    for (int64_t at = from; at < to; at++) {
        const __m256 weight = _mm256_set1_ps(scores[at - from]);
        const float *value = values + at * dim;
        for (int64_t i = 0; i < dim; i += 8)
            _mm256_storeu_ps(out + i, _mm256_fmadd_ps(weight, _mm256_loadu_ps(value + i), _mm256_loadu_ps(out + i)));
    }
}

static void product(const Shape *s, const float *x, const char *w, const float *bias, float *y, int64_t n, int64_t k) {
    const Product p = {x, w, bias, y, s->rows, n, k, s->is_half};
    multiply(&p, s->threads);
}

typedef struct {
    float *normal, *q, *k, *v, *mixed, *gate, *up, *scores; /* `normal` also takes what is added to x */
} Scratch;

TARGET static void add(float *x, const float *y, int64_t n) {
    for (int64_t i = 0; i < n; i += 8)
        _mm256_storeu_ps(x + i, _mm256_add_ps(_mm256_loadu_ps(x + i), _mm256_loadu_ps(y + i)));
}

static void norm_rows(const Shape *s, const float *x, const float *weight, float *y) {
    for (int64_t r = 0; r < s->rows; r++) rms_norm(x + r * s->hidden, weight, y + r * s->hidden, s->hidden, s->eps);
}

/* Norm and rotate each head of x [rows, heads, dim], in place. */
static void place(const Shape *s, float *x, int64_t heads, const float *norm, const float *cos, const float *sin) {
    for (int64_t r = 0; r < s->rows; r++)
        for (int64_t h = 0; h < heads; h++) {
            float *head = x + (r * heads + h) * s->dim;
            if (norm) rms_norm(head, norm, head, s->dim, s->eps);
            rotate(head, cos + r * s->dim, sin + r * s->dim, s->dim);
        }
}

static void append(const Shape *s, const float *x, float *slab) {
    for (int64_t r = 0; r < s->rows; r++)
        for (int64_t h = 0; h < s->kv_heads; h++)
            memcpy(slab + (h * s->capacity + s->position + r) * s->dim, x + (r * s->kv_heads + h) * s->dim,
                   sizeof(float) * (size_t)s->dim);
}

static void attention(const Layer *l, const Slab *slab, const Shape *s, const Scratch *t, const float *cos,
                      const float *sin) {
    const int64_t group = s->heads / s->kv_heads, kv = s->kv_heads * s->dim, all = s->heads * s->dim;
    product(s, t->normal, l->q, l->q_bias, t->q, all, s->hidden);
    product(s, t->normal, l->k, l->k_bias, t->k, kv, s->hidden);
    product(s, t->normal, l->v, l->v_bias, t->v, kv, s->hidden);
    place(s, t->q, s->heads, l->q_norm, cos, sin);
    place(s, t->k, s->kv_heads, l->k_norm, cos, sin);
    append(s, t->k, slab->keys);
    append(s, t->v, slab->values);
    for (int64_t r = 0; r < s->rows; r++) {
        const int64_t to = s->position + r + 1;
        const int64_t from = l->window && to > l->window ? to - l->window : 0;
        for (int64_t h = 0; h < s->heads; h++) {
            const int64_t lane = (h / group) * s->capacity * s->dim, at = (r * s->heads + h) * s->dim;
            attend(t->q + at, slab->keys + lane, slab->values + lane, from, to, s->dim, s->scale, t->scores,
                   t->mixed + at);
        }
    }
    product(s, t->mixed, l->o, l->o_bias, t->normal, s->hidden, all);
}

TARGET static void mlp(const Layer *l, const Shape *s, const Scratch *t) {
    product(s, t->normal, l->gate, l->gate_bias, t->gate, s->intermediate, s->hidden);
    product(s, t->normal, l->up, l->up_bias, t->up, s->intermediate, s->hidden);
    const __m256 one = _mm256_set1_ps(1.0f), sign = _mm256_set1_ps(-0.0f), zero = _mm256_setzero_ps();
    for (int64_t i = 0; i < s->rows * s->intermediate; i += 8) {
        __m256 g = _mm256_loadu_ps(t->gate + i);
        __m256 e = exp8(_mm256_or_ps(g, sign)); /* e^-|g|: never overflows */
        __m256 top = _mm256_blendv_ps(one, e, _mm256_cmp_ps(g, zero, _CMP_LT_OQ));
        __m256 silu = _mm256_mul_ps(g, _mm256_div_ps(top, _mm256_add_ps(one, e)));
        _mm256_storeu_ps(t->gate + i, _mm256_mul_ps(silu, _mm256_loadu_ps(t->up + i)));
    }
    product(s, t->gate, l->down, l->down_bias, t->normal, s->hidden, s->intermediate);
}

int decode(const Layer *layers, const Slab *slabs, int64_t count, const Shape *s, float *x, const float *cos,
           const float *sin) {
    const int64_t sizes[] = {s->rows * s->hidden,          s->rows * s->heads * s->dim, s->rows * s->kv_heads * s->dim,
                             s->rows * s->kv_heads * s->dim, s->rows * s->heads * s->dim, s->rows * s->intermediate,
                             s->rows * s->intermediate,    s->position + s->rows + 8};
    float *parts[8];
    int64_t total = 0;
    for (int i = 0; i < 8; i++) total += sizes[i];
    float *scratch = malloc(sizeof(float) * (size_t)total);
    if (!scratch) return -1;
    for (int64_t i = 0, at = 0; i < 8; at += sizes[i++]) parts[i] = scratch + at;
    const Scratch t = {parts[0], parts[1], parts[2], parts[3], parts[4], parts[5], parts[6], parts[7]};
    for (int64_t i = 0; i < count; i++) {
        norm_rows(s, x, layers[i].attention_norm, t.normal);
        attention(&layers[i], &slabs[i], s, &t, cos, sin);
        add(x, t.normal, s->rows * s->hidden);
        norm_rows(s, x, layers[i].mlp_norm, t.normal);
        mlp(&layers[i], s, &t);
        add(x, t.normal, s->rows * s->hidden);
    }
    free(scratch);
    return 0;
}

#endif
