/* Threads that share the parts of a kernel's work, and scratch space of their own.
 *
 * One piece of work at a time, in more parts than threads: whoever has time takes the next one, and nobody waits for a
 * thread that the system does not run. Workers spin briefly after each piece of work, since the next one follows at once
 * within a step, and then sleep on a condition.
 */
#include "kernels.h"

#if HAS_KERNELS

#include <immintrin.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>

#define SPINS 2000
#define PARTS_A_THREAD 3
#define MOST_PARTS 4096
#define ALIGNMENT 64
#define SLOTS 3

/* A ticket has the number of the piece of work, how many parts it has, and which one is next. */
#define NEXT(ticket) ((int64_t)((ticket) & 0xffff))
#define PARTS(ticket) ((int64_t)((ticket) >> 16 & 0xffff))

static pthread_mutex_t calls = PTHREAD_MUTEX_INITIALIZER; /* one caller at a time uses the pool */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t start = PTHREAD_COND_INITIALIZER;
static int workers;
static _Atomic uint64_t ticket;
static atomic_int done, sleeping;
static struct {
    Work work;
    void *arg;
    int64_t count;
} job; /* as long as one of its parts is not done, it stays as it is */

static int has_parts(void) {
    const uint64_t now = atomic_load(&ticket);
    return NEXT(now) < PARTS(now);
}

static void do_parts(void) {
    while (has_parts()) {
        const uint64_t mine = atomic_fetch_add(&ticket, 1);
        const int64_t part = NEXT(mine), parts = PARTS(mine);
        if (part >= parts) return;
        const int64_t from = job.count * part / parts, to = job.count * (part + 1) / parts;
        if (from < to) job.work(job.arg, from, to);
        atomic_fetch_add(&done, 1);
    }
}

static void *be_worker(void *arg) {
    for (;;) {
        for (int spin = 0; spin < SPINS && !has_parts(); spin++) _mm_pause();
        if (!has_parts()) {
            pthread_mutex_lock(&lock);
            atomic_fetch_add(&sleeping, 1);
            while (!has_parts()) pthread_cond_wait(&start, &lock);
            atomic_fetch_sub(&sleeping, 1);
            pthread_mutex_unlock(&lock);
        }
        do_parts();
    }
    return arg;
}

static void have_workers(int count) {
    for (; workers < count; workers++) {
        pthread_t thread;
        if (pthread_create(&thread, NULL, be_worker, NULL)) return;
        pthread_detach(thread);
    }
}

static void share(Work work, void *arg, int64_t count, int64_t parts, int threads) {
    if (threads > parts) threads = (int)parts;
    if (threads <= 1) {
        if (count > 0) work(arg, 0, count);
        return;
    }
    pthread_mutex_lock(&calls);
    have_workers(threads - 1);
    job.work = work, job.arg = arg, job.count = count;
    atomic_store(&done, 0);
    atomic_store(&ticket, ((atomic_load(&ticket) >> 32) + 1) << 32 | (uint64_t)parts << 16);
    if (atomic_load(&sleeping)) {
        pthread_mutex_lock(&lock);
        pthread_cond_broadcast(&start);
        pthread_mutex_unlock(&lock);
    }
    do_parts();
    for (int spin = 0; atomic_load(&done) < parts; spin++) {
        if (spin < SPINS) _mm_pause();
        else sched_yield();
    }
    pthread_mutex_unlock(&calls);
}

void parallel(Work work, void *arg, int64_t count, int threads) {
    const int64_t most = (int64_t)threads * PARTS_A_THREAD;
    share(work, arg, count, count < most ? count : most, threads);
}

void parallel_each(Work work, void *arg, int64_t count, int threads) {
    share(work, arg, count, count < MOST_PARTS ? count : MOST_PARTS, threads);
}

float *scratch(int slot, int64_t floats) {
    static _Thread_local float *held[SLOTS];
    static _Thread_local int64_t sizes[SLOTS];
    if (floats > sizes[slot]) {
        free(held[slot]);
        sizes[slot] = (floats + floats / 4 + ALIGNMENT) / ALIGNMENT * ALIGNMENT;
        held[slot] = aligned_alloc(ALIGNMENT, sizeof(float) * (size_t)sizes[slot]);
        if (!held[slot]) sizes[slot] = 0;
    }
    return held[slot];
}

#endif
