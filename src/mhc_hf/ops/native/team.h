// Work shared by threads of PyTorch's own pool: a second pool would spin against it.
//
// The pool is reached through GOMP_parallel of the OpenMP library that PyTorch has loaded, which Python looks up and
// hands over; without one, everything runs on the calling thread. Work comes in parts that threads take from a counter:
// what a part computes does not depend on who computes it.

#ifndef MHC_TEAM_H
#define MHC_TEAM_H

#include <stdint.h>

typedef void (*parallel_region)(void (*work)(void *), void *data, unsigned num_threads, unsigned flags);

static parallel_region run_region;

struct team {
    void (*work)(void *task, int64_t part);
    void *task;
    int64_t num_parts, next;
};

static void take_parts(void *data) {
    struct team *team = data;
    for (;;) {
        int64_t part = __atomic_fetch_add(&team->next, 1, __ATOMIC_RELAXED);
        if (part >= team->num_parts) return;
        team->work(team->task, part);
    }
}

static void share_work(void (*work)(void *, int64_t), void *task, int64_t num_parts, int num_threads) {
    struct team team = {work, task, num_parts, 0};
    if (num_threads > num_parts) num_threads = (int)num_parts;
    if (num_threads > 1 && run_region) {
        run_region(take_parts, &team, (unsigned)num_threads, 0);
    } else {
        take_parts(&team);
    }
}

#endif
