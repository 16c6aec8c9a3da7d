/* Threads that share the parts of a kernel's work, and scratch space of their own.
 *
 * One piece of work at a time. Workers spin briefly after each, since the next one follows at once within a step, and
 * then sleep on a condition.
 */
#include "kernels.h"

#if HAS_KERNELS

#include <immintrin.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>

#define SPINS 2000
#define ALIGNMENT 64

static pthread_mutex_t calls = PTHREAD_MUTEX_INITIALIZER; /* one caller at a time uses the pool */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t start = PTHREAD_COND_INITIALIZER;
static int workers, parts;
static atomic_uint round_;
static atomic_int running;
static struct {
    Work work;
    void *arg;
    int64_t count;
} job;

static void do_part(int part) {
    int64_t from = job.count * part / parts, to = job.count * (part + 1) / parts;
    if (from < to) job.work(job.arg, from, to);
}

static void *be_worker(void *arg) {
    const int part = (int)(intptr_t)arg;
    unsigned seen = 0;
    for (;;) {
        for (int spin = 0; spin < SPINS && atomic_load(&round_) == seen; spin++) _mm_pause();
        pthread_mutex_lock(&lock);
        while (atomic_load(&round_) == seen) pthread_cond_wait(&start, &lock);
        seen = atomic_load(&round_);
        const int has_part = part < parts;
        pthread_mutex_unlock(&lock);
        if (has_part) {
            do_part(part);
            atomic_fetch_sub(&running, 1);
        }
    }
    return NULL;
}

void parallel(Work work, void *arg, int64_t count, int threads) {
    if (threads > count) threads = (int)count;
    if (threads <= 1) {
        if (count > 0) work(arg, 0, count);
        return;
    }
    pthread_mutex_lock(&calls);
    pthread_mutex_lock(&lock);
    for (; workers < threads - 1; workers++) {
        pthread_t thread;
        if (pthread_create(&thread, NULL, be_worker, (void *)(intptr_t)(workers + 1))) break;
        pthread_detach(thread);
    }
    job.work = work, job.arg = arg, job.count = count;
    parts = workers + 1 < threads ? workers + 1 : threads;
    atomic_store(&running, parts - 1);
    atomic_fetch_add(&round_, 1);
    pthread_cond_broadcast(&start);
    pthread_mutex_unlock(&lock);
    do_part(0);
    while (atomic_load(&running)) _mm_pause();
    pthread_mutex_unlock(&calls);
}

float *scratch(int slot, int64_t floats) {
    static _Thread_local float *held[2];
    static _Thread_local int64_t sizes[2];
    if (floats > sizes[slot]) {
        free(held[slot]);
        sizes[slot] = (floats + floats / 4 + ALIGNMENT) / ALIGNMENT * ALIGNMENT;
        held[slot] = aligned_alloc(ALIGNMENT, sizeof(float) * (size_t)sizes[slot]);
        if (!held[slot]) sizes[slot] = 0;
    }
    return held[slot];
}

#endif
