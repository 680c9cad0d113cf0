// A parallel loop whose helpers may come late or not at all.
//
// OpenMP's loops end in a barrier that every thread must reach. Where several processes share few cores, a thread that
// is not running then holds everybody up for a scheduler slice (measured: 8 ms for a 0.1 ms product on 2 busy cores).
// Here the caller and whichever helpers are awake take tasks from one counter, and the caller waits only for helpers
// that are inside a task. Results must not depend on who runs what; every task in this library writes its own output.
//
// Life of a job: 1. the caller takes `busy` (who finds it taken works alone); 2. describes the job, sets `open`, bumps
// `generation`, wakes sleepers; 3. all take tasks; 4. the caller finds none left, clears `open`, waits for `active` = 0.
// A helper counts itself into `active` before it looks at `open`, so no helper sees a job that is being replaced.

#pragma once
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <time.h>

enum {
    HELPERS_MAX = 63,
    SPIN_NS = 100000,  // an idle helper's wait before it sleeps: bridges the gap between two operations of one layer
    PAUSES = 32,       // between two looks at the clock
};

static struct {
    pthread_mutex_t busy, sleep;
    pthread_cond_t wake;
    atomic_long generation, next;
    atomic_int open, active, sleeping;
    int helpers, helpers_wanted;
    long tasks;
    void (*run)(void *, long);
    void *context;
} pool = {.busy = PTHREAD_MUTEX_INITIALIZER, .sleep = PTHREAD_MUTEX_INITIALIZER, .wake = PTHREAD_COND_INITIALIZER};

static inline void relax(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static long now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000L + t.tv_nsec;
}

static void take_tasks(void) {
    for (long i; (i = atomic_fetch_add(&pool.next, 1)) < pool.tasks;) pool.run(pool.context, i);
}

static long await_generation(long seen) {
    for (long end = now_ns() + SPIN_NS; now_ns() < end;)
        for (int i = 0; i < PAUSES; i++, relax())
            if (atomic_load(&pool.generation) != seen) return atomic_load(&pool.generation);
    pthread_mutex_lock(&pool.sleep);
    atomic_fetch_add(&pool.sleeping, 1);
    while (atomic_load(&pool.generation) == seen) pthread_cond_wait(&pool.wake, &pool.sleep);
    atomic_fetch_sub(&pool.sleeping, 1);
    pthread_mutex_unlock(&pool.sleep);
    return atomic_load(&pool.generation);
}

static void *help(void *generation) {
    for (long seen = (long)generation;;) {
        seen = await_generation(seen);
        if (atomic_fetch_add(&pool.active, 1) < pool.helpers_wanted && atomic_load(&pool.open)) take_tasks();
        atomic_fetch_sub(&pool.active, 1);
    }
    return NULL;
}

static void forget_helpers(void) {  // in a forked child: threads are not inherited
    pthread_mutex_init(&pool.busy, NULL);
    pthread_mutex_init(&pool.sleep, NULL);
    pthread_cond_init(&pool.wake, NULL);
    atomic_store(&pool.open, 0);
    atomic_store(&pool.active, 0);
    atomic_store(&pool.sleeping, 0);
    pool.helpers = 0;
}

static void hire(int wanted) {
    static int watching_forks;
    if (!watching_forks) watching_forks = !pthread_atfork(NULL, NULL, forget_helpers);
    for (; pool.helpers < wanted; pool.helpers++) {
        pthread_t thread;
        if (pthread_create(&thread, NULL, help, (void *)atomic_load(&pool.generation))) return;  // fewer will do
        pthread_detach(thread);
    }
}

// run(context, i) for every i in [0, tasks), on at most `threads` threads, the caller's included.
static void parallel_for(int threads, long tasks, void (*run)(void *, long), void *context) {
    if (threads <= 1 || tasks <= 1 || pthread_mutex_trylock(&pool.busy)) {
        for (long i = 0; i < tasks; i++) run(context, i);
        return;
    }
    pool.helpers_wanted = threads - 1 < HELPERS_MAX ? threads - 1 : HELPERS_MAX;
    if (pool.helpers < pool.helpers_wanted) hire(pool.helpers_wanted);
    pool.tasks = tasks, pool.run = run, pool.context = context;
    atomic_store(&pool.next, 0);
    atomic_store(&pool.open, 1);
    atomic_fetch_add(&pool.generation, 1);
    if (atomic_load(&pool.sleeping)) {
        pthread_mutex_lock(&pool.sleep);
        pthread_cond_broadcast(&pool.wake);
        pthread_mutex_unlock(&pool.sleep);
    }
    take_tasks();
    atomic_store(&pool.open, 0);
    for (int i = 0; atomic_load(&pool.active); i++) i < 1000 ? relax() : (void)sched_yield();
    pthread_mutex_unlock(&pool.busy);
}
