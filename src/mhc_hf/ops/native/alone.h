// The ops of one map alone, and Sinkhorn alone.
//
// Shapes: x, g [T, n, C] streams; y [T, C]; weights [n, T], or [n, n, T] (into, from) where streams are mixed.

#ifndef MHC_ALONE_H
#define MHC_ALONE_H

#include "forward.h"

struct alone {
    struct sizes sizes;
    const stream *x, *y, *g;
    const float *weights;
    stream *out;
    float *dots;
};

// out = sum of weights_i x_i [T, C]; with y also dots_i = <x_i, y>
static void collapse_tile(void *task, int64_t part) {
    const struct alone *op = task;
    int64_t C = op->sizes.C, first;
    int count = find_tile(&op->sizes, part, &first);
    lanes weights[N], dots[N];
    load_rows(op->weights, N, op->sizes.T, first, count, weights);
    for (int t = 0; t < count; t++) {
        const stream *x = op->x + (first + t) * N * C;
        float row[N];
        take_token(weights, N, t, row);
        collapse_token(x, row, C, op->out + (first + t) * C);
        if (!op->y) continue;
        dot_token(x, op->y + (first + t) * C, C, row);
        put_token(dots, N, t, row);
    }
    if (op->y) store_rows(op->dots, N, op->sizes.T, first, count, dots);
}

// out_i = weights_i y [T, n, C] and dots_i = <x_i, y>
static void spread_tile(void *task, int64_t part) {
    const struct alone *op = task;
    int64_t C = op->sizes.C, first;
    int count = find_tile(&op->sizes, part, &first);
    lanes weights[N], dots[N];
    load_rows(op->weights, N, op->sizes.T, first, count, weights);
    for (int t = 0; t < count; t++) {
        const stream *y = op->y + (first + t) * C;
        float row[N];
        take_token(weights, N, t, row);
        spread_token(y, row, C, op->out + (first + t) * N * C);
        dot_token(op->x + (first + t) * N * C, y, C, row);
        put_token(dots, N, t, row);
    }
    store_rows(op->dots, N, op->sizes.T, first, count, dots);
}

// out_j = sum of weights_ij g_i [T, n, C] and dots_ij = <g_i, x_j>
static void mix_back_tile(void *task, int64_t part) {
    const struct alone *op = task;
    int64_t C = op->sizes.C, first;
    int count = find_tile(&op->sizes, part, &first);
    lanes weights[N * N], dots[N * N];
    load_rows(op->weights, N * N, op->sizes.T, first, count, weights);
    for (int t = 0; t < count; t++) {
        const stream *g = op->g + (first + t) * N * C;
        float pairs[N * N], transposed[N * N];
        take_token(weights, N * N, t, pairs);
        for (int k = 0; k < N * N; k++) transposed[k] = pairs[k % N * N + k / N];
        mix_token(g, 0, 0, transposed, C, op->out + (first + t) * N * C);
        dot_token_pairs(g, op->x + (first + t) * N * C, C, pairs);
        put_token(dots, N * N, t, pairs);
    }
    store_rows(op->dots, N * N, op->sizes.T, first, count, dots);
}

struct sinkhorn {
    struct sizes sizes;
    int iters, log_iters;
    const float *logits, *grad;
    float *out;
    int failed;
};

static void sinkhorn_tile(void *task, int64_t part) {
    const struct sinkhorn *op = task;
    int64_t first;
    int count = find_tile(&op->sizes, part, &first);
    lanes m[N * N];
    load_rows(op->logits, N * N, op->sizes.T, first, count, m);
    project_doubly_stochastic(m, op->iters, op->log_iters);
    store_rows(op->out, N * N, op->sizes.T, first, count, m);
}

static void sinkhorn_back_tile(void *task, int64_t part) {
    struct sinkhorn *op = task;
    int64_t first;
    int count = find_tile(&op->sizes, part, &first);
    lanes m[N * N], g[N * N], *history = allocate(count_history(op->iters, op->log_iters) * (int64_t)sizeof(lanes));
    if (!history) {
        op->failed = 1;
        return;
    }
    load_rows(op->logits, N * N, op->sizes.T, first, count, m);
    load_rows(op->grad, N * N, op->sizes.T, first, count, g);
    backpropagate_projection(m, g, op->iters, op->log_iters, history);
    store_rows(op->out, N * N, op->sizes.T, first, count, g);
    free(history);
}

#endif
