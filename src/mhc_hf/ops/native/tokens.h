// What is done to the streams of one token: collapsed, mixed, written to, multiplied with each other.
//
// Shapes: x, g [n, C] streams; y [C] what a branch reads or writes; weights [n], h_post [n], h_res [n, n] (into, from).

#ifndef MHC_TOKENS_H
#define MHC_TOKENS_H

#include "vectors.h"

static int are_copies(const stream *x, int64_t C) {
    for (int i = 1; i < N; i++) {
        if (memcmp(x, x + i * C, (size_t)C * sizeof(stream))) return 0;
    }
    return 1;
}

// a sum of n weights; exactly 1 where it is so to rounding, as rows of H_res and a conversion's reads are
INLINE float sum_weights(const float *weights) {
    float total = weights[0];
    for (int i = 1; i < N; i++) total += weights[i];
    return fabsf(total - 1.0f) <= 8 * 0x1p-23f ? 1.0f : total;
}

// out = sum of weights_i x_i; of copies the copy, to the bit
static void collapse_token(const stream *x, const float *weights, int64_t C, stream *out) {
    if (are_copies(x, C)) {
        float total = sum_weights(weights);
        EACH_VECTOR(c, count, C, store(out + c, total * load(x + c, count), count);)
        return;
    }
    EACH_VECTOR(c, count, C, {
        vec total = weights[0] * load(x + c, count);
        UNROLL for (int i = 1; i < N; i++) total += weights[i] * load(x + i * C + c, count);
        store(out + c, total, count);
    })
}

// out_i = h_post_i y
static void spread_token(const stream *y, const float *h_post, int64_t C, stream *out) {
    EACH_VECTOR(c, count, C, {
        vec written = load(y + c, count);
        UNROLL for (int i = 0; i < N; i++) store(out + i * C + c, h_post[i] * written, count);
    })
}

// out_i = h_post_i y + sum of h_res_ij x_j (Eq. 3); without y the second part alone
INLINE void mix_token(const stream *x, const stream *y, const float *h_post, const float *h_res, int64_t C,
                      stream *out) {
    if (are_copies(x, C)) {
        float totals[N];
        for (int i = 0; i < N; i++) totals[i] = sum_weights(h_res + i * N);
        EACH_VECTOR(c, count, C, {
            vec copy = load(x + c, count);
            vec written = y ? load(y + c, count) : copy;
            UNROLL for (int i = 0; i < N; i++) {
                vec total = totals[i] * copy;
                if (y) total = h_post[i] * written + total;
                store(out + i * C + c, total, count);
            }
        })
        return;
    }
    EACH_VECTOR(c, count, C, {
        vec from[N];
        UNROLL for (int j = 0; j < N; j++) from[j] = load(x + j * C + c, count);
        vec written = y ? load(y + c, count) : from[0];
        UNROLL for (int i = 0; i < N; i++) {
            vec total = h_res[i * N] * from[0];
            UNROLL for (int j = 1; j < N; j++) total += h_res[i * N + j] * from[j];
            if (y) total = h_post[i] * written + total;
            store(out + i * C + c, total, count);
        }
    })
}

// dots_i = <x_i, y>
static void dot_token(const stream *x, const stream *y, int64_t C, float *dots) {
    vec totals[N] = {{0}};
    EACH_VECTOR(c, count, C, {
        vec other = load(y + c, count);
        UNROLL for (int i = 0; i < N; i++) totals[i] += load(x + i * C + c, count) * other;
    })
    for (int i = 0; i < N; i++) dots[i] = sum_vec(totals[i]);
}

// dots_ij = <g_i, x_j>, a few rows at a time so that the sums stay in registers
static void dot_token_pairs(const stream *g, const stream *x, int64_t C, float *dots) {
    enum { ROWS = N <= 4 && W == 16 ? N : 2 };
    for (int next = 0; next < N; next += ROWS) {
        // the last rows may be computed twice
        int first = next + ROWS <= N ? next : N - ROWS;
        vec totals[ROWS][N] = {{{0}}};
        EACH_VECTOR(c, count, C, {
            vec rows[ROWS];
            UNROLL for (int i = 0; i < ROWS; i++) rows[i] = load(g + (first + i) * C + c, count);
            UNROLL for (int j = 0; j < N; j++) {
                vec other = load(x + j * C + c, count);
                UNROLL for (int i = 0; i < ROWS; i++) totals[i][j] += rows[i] * other;
            }
        })
        for (int i = 0; i < ROWS; i++) {
            for (int j = 0; j < N; j++) dots[(first + i) * N + j] = sum_vec(totals[i][j]);
        }
    }
}

#endif
