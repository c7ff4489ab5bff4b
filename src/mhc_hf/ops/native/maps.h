// The three maps of 16 tokens from their projections (Eq. 7 and 8), and the way back.
//
// Shapes: projected and logits [m] of lanes, rows in the order pre, post, res; h_pre [n], h_post [n], h_res [n, n].

#ifndef MHC_MAPS_H
#define MHC_MAPS_H

#include "sinkhorn.h"

struct gates {
    const float *bias;  // [m]
    const float *alpha; // [3]
    int iters, log_iters;
};

// which of the three gating factors is a row's
INLINE int gate_of(int row) { return row < N ? 0 : row < 2 * N ? 1 : 2; }

INLINE lanes invert_rms(lanes squares, int64_t width, float norm_eps) {
    lanes mean = squares * (1.0f / (float)width) + norm_eps;
    for (int k = 0; k < LANES; k++) mean[k] = sqrtf(mean[k]);
    return 1.0f / mean;
}

INLINE lanes compute_logit(const struct gates *gates, int row, lanes z) {
    return gates->bias[row] + gates->alpha[gate_of(row)] * z;
}

static void compute_maps(const struct gates *gates, const lanes *projected, lanes inv_rms, lanes *h_pre, lanes *h_post,
                         lanes *h_res) {
    for (int i = 0; i < N; i++) {
        h_pre[i] = logistic(compute_logit(gates, i, projected[i] * inv_rms));
        h_post[i] = 2.0f * logistic(compute_logit(gates, N + i, projected[N + i] * inv_rms));
    }
    for (int k = 0; k < N * N; k++) h_res[k] = compute_logit(gates, 2 * N + k, projected[2 * N + k] * inv_rms);
    project_doubly_stochastic(h_res, gates->iters, gates->log_iters);
}

// what `backpropagate_maps` tells the streams: h_pre and h_res made again, d_projected, and the factor of x itself
struct told {
    lanes h_pre[N], h_res[N * N], d_projected[M], along_x;
};

// from gradients of the maps, d_pre [n], d_post [n], d_res [n, n]; adds those of the first `count` tokens to the
// parameters' d_bias [m] and d_alpha [3]
static void backpropagate_maps(const struct gates *gates, const lanes *projected, lanes inv_rms, int64_t width,
                               const lanes *d_pre, const lanes *d_post, lanes *d_res, int count, lanes *history,
                               double *d_bias, double *d_alpha, struct told *told) {
    lanes z[M], d_logits[M], d_z_z = {0};
    for (int row = 0; row < M; row++) z[row] = projected[row] * inv_rms;
    for (int i = 0; i < N; i++) {
        lanes pre = logistic(compute_logit(gates, i, z[i])), post = logistic(compute_logit(gates, N + i, z[N + i]));
        told->h_pre[i] = pre;
        d_logits[i] = d_pre[i] * pre * (1.0f - pre);
        d_logits[N + i] = 2.0f * d_post[i] * post * (1.0f - post);
    }
    for (int k = 0; k < N * N; k++) told->h_res[k] = compute_logit(gates, 2 * N + k, z[2 * N + k]);
    backpropagate_projection(told->h_res, d_res, gates->iters, gates->log_iters, history);
    memcpy(d_logits + 2 * N, d_res, N * N * sizeof(lanes));

    for (int row = 0; row < M; row++) {
        lanes d_gate = d_logits[row] * z[row], d_z = d_logits[row] * gates->alpha[gate_of(row)];
        d_z_z += d_z * z[row];
        told->d_projected[row] = d_z * inv_rms;
        for (int k = 0; k < count; k++) {
            d_bias[row] += d_logits[row][k];
            d_alpha[gate_of(row)] += d_gate[k];
        }
    }
    // the gradient of 1/rms lies along x itself
    told->along_x = d_z_z * inv_rms * inv_rms * (-1.0f / (float)width);
}

#endif
