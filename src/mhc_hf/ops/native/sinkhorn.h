// Sinkhorn-Knopp of 16 tokens at once, forward and backward (ops/sinkhorn.py has the arguments).
//
// Shapes: m [n, n] of lanes (into, from). A half-step normalises columns, its sums run over the first index, or rows,
// its sums run over the second. The first `log_iters` iterations run on logarithms, so that nothing is lost to underflow.

#ifndef MHC_SINKHORN_H
#define MHC_SINKHORN_H

#include "elementary.h"

// position of the k-th addend of the j-th sum: of a column in even half-steps, of a row in odd ones
INLINE int place(int step, int j, int k) { return step % 2 ? j * N + k : k * N + j; }

INLINE lanes sum_of(const lanes *m, int step, int j) {
    lanes total = m[place(step, j, 0)];
    UNROLL for (int k = 1; k < N; k++) total += m[place(step, j, k)];
    return total;
}

// log_softmax along columns or rows
static void normalize_logs(lanes *log_m, int step) {
    for (int j = 0; j < N; j++) {
        lanes largest = log_m[place(step, j, 0)];
        UNROLL for (int k = 1; k < N; k++) largest = max_lanes(largest, log_m[place(step, j, k)]);
        lanes total = {0};
        for (int k = 0; k < N; k++) total += exp_lanes(log_m[place(step, j, k)] - largest);
        lanes log_total = log_lanes(total);
        UNROLL for (int k = 0; k < N; k++) {
            lanes *entry = &log_m[place(step, j, k)];
            *entry = (*entry - largest) - log_total;
        }
    }
}

INLINE void normalize(lanes *m, int step, lanes *sums) {
    UNROLL for (int j = 0; j < N; j++) {
        lanes total = sum_of(m, step, j), inverse = 1.0f / total;
        UNROLL for (int k = 0; k < N; k++) m[place(step, j, k)] *= inverse;
        if (sums) sums[j] = total;
    }
}

// logits -> H_res in place, of exp(logits) with columns and then rows normalised `iters` times
static void project_doubly_stochastic(lanes *m, int iters, int log_iters) {
    for (int step = 0; step < 2 * log_iters; step++) normalize_logs(m, step);
    for (int k = 0; k < N * N; k++) m[k] = exp_lanes(m[k]);
    for (int iter = log_iters; iter < iters; iter++) {
        normalize(m, 0, 0);
        normalize(m, 1, 0);
    }
}

// lanes that `backpropagate_projection` keeps: matrices after half-steps on logarithms, sums of the others
static inline int64_t count_history(int iters, int log_iters) {
    return 2 * ((int64_t)log_iters * N * N + (int64_t)(iters - log_iters) * N);
}

// g -= p * sums of g: the gradient of a half-step, in logarithms, with p the matrix after it
INLINE void backpropagate_half_step(lanes *g, const lanes *p, int step) {
    UNROLL for (int j = 0; j < N; j++) {
        lanes total = sum_of(g, step, j);
        UNROLL for (int k = 0; k < N; k++) g[place(step, j, k)] -= p[place(step, j, k)] * total;
    }
}

// m: logits -> H_res, g: gradient of H_res -> gradient of the logits, both in place
static void backpropagate_projection(lanes *m, lanes *g, int iters, int log_iters, lanes *history) {
    lanes *step_matrices = history, *sums = history + 2 * (int64_t)log_iters * N * N;
    for (int step = 0; step < 2 * log_iters; step++) {
        normalize_logs(m, step);
        for (int k = 0; k < N * N; k++) step_matrices[step * N * N + k] = exp_lanes(m[k]);
    }
    memcpy(m, step_matrices + (2 * log_iters - 1) * N * N, N * N * sizeof(lanes));
    int steps = 2 * (iters - log_iters);
    for (int step = 0; step < steps; step += 2) {
        normalize(m, 0, sums + step * N);
        normalize(m, 1, sums + (step + 1) * N);
    }

    lanes p[N * N];
    for (int k = 0; k < N * N; k++) {
        p[k] = m[k];
        g[k] *= m[k];
    }
    for (int step = steps - 1; step >= 0; step--) {
        backpropagate_half_step(g, p, step);
        UNROLL for (int j = 0; j < N; j++) {
            UNROLL for (int k = 0; k < N; k++) p[place(step, j, k)] *= sums[step * N + j];
        }
    }
    for (int step = 2 * log_iters - 1; step >= 0; step--) {
        backpropagate_half_step(g, step_matrices + step * N * N, step);
    }
}

#endif
