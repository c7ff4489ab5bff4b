// The functions that Python calls (launch.py). Each returns 0, or 1 where there was no memory.
//
// Shapes: x [T, n, C], branch tensors [T, C], numbers a token token-last: h_pre [n, T], h_post [n, T], h_res [n, n, T],
// projected [m, T], inv_rms [T], m = (n+2)*n; all contiguous. Streams and branch tensors in the dtype of the build,
// everything else float32.

#include "alone.h"
#include "backward.h"

void mhc_use_pool(parallel_region region) { run_region = region; }

static struct sizes measure(int64_t T, int64_t C) { return (struct sizes){T, C, choose_tile(C)}; }

static int64_t count_tiles(const struct sizes *sizes) { return (sizes->T + sizes->tile - 1) / sizes->tile; }

// fewer numbers than this are not worth waking a thread
static int limit_threads(const struct sizes *sizes, int num_threads) {
    return sizes->T * N * sizes->C < (1 << 15) ? 1 : num_threads;
}

static int run_forward(struct forward *forward, int num_threads) {
    share_work(forward_tile, forward, count_tiles(&forward->sizes), limit_threads(&forward->sizes, num_threads));
    return forward->failed;
}

int mhc_write(int num_threads, int64_t T, int64_t C, const stream *x, const stream *y, const float *h_post,
              const float *h_res, stream *x_next) {
    struct write write = {x, y, h_post, h_res, x_next};
    struct forward forward = {measure(T, C), &write, 0, 0};
    return run_forward(&forward, num_threads);
}

// with `y`, `x` is what the site before read, and is written to `x_next` first; without, `x` itself is read
int mhc_read(int num_threads, int64_t T, int64_t C, int iters, int log_iters, float norm_eps, const stream *x,
             const stream *y, const float *write_h_post, const float *write_h_res, stream *x_next, const float *phi,
             const float *bias, const float *alpha, stream *branch_in, float *h_pre, float *h_post, float *h_res,
             float *projected, float *inv_rms) {
    float *copy;
    const float *wide_phi = widen_phi(phi, C, &copy);
    if (!wide_phi) return 1;
    struct write write = {x, y, write_h_post, write_h_res, x_next};
    struct read read = {y ? x_next : x, wide_phi, {bias, alpha, iters, log_iters}, norm_eps, branch_in, h_pre, h_post,
                        h_res,          projected, inv_rms};
    struct forward forward = {measure(T, C), y ? &write : 0, &read, 0};
    int failed = run_forward(&forward, num_threads);
    free(copy);
    return failed;
}

int mhc_read_backward(int num_threads, int64_t T, int64_t C, int iters, int log_iters, const stream *x,
                      const float *phi, const float *bias, const float *alpha, const float *projected,
                      const float *inv_rms, const stream *d_branch_in, const float *d_h_pre, const float *d_h_post,
                      const float *d_h_res, const stream *d_x_next, stream *d_x, float *d_phi, float *d_bias,
                      float *d_alpha) {
    float *copy;
    const float *wide_phi = widen_phi(phi, C, &copy);
    struct sizes sizes = measure(T, C);
    int64_t num_tiles = count_tiles(&sizes), width = N * pad_channels(C);
    num_threads = limit_threads(&sizes, num_threads);
    int64_t num_parts = num_threads < num_tiles ? num_threads : num_tiles > 0 ? num_tiles : 1;
    struct read_backward site = {
        .sizes = sizes,
        .x = x,
        .d_branch_in = d_branch_in,
        .d_x_next = d_x_next,
        .phi = wide_phi,
        .gates = {bias, alpha, iters, log_iters},
        .projected = projected,
        .inv_rms = inv_rms,
        .d_h_pre = d_h_pre,
        .d_h_post = d_h_post,
        .d_h_res = d_h_res,
        .d_x = d_x,
        .d_phi = d_phi,
        .num_parts = num_parts,
        .d_phi_parts = allocate(num_parts * M * width * (int64_t)sizeof(float)),
        .sums_parts = calloc((size_t)(num_parts * (M + 3)), sizeof(double)),
    };
    site.failed = !(wide_phi && site.d_phi_parts && site.sums_parts);
    if (!site.failed) share_work(backpropagate_part, &site, num_parts, num_threads);
    if (!site.failed) {
        share_work(add_parts, &site, M, num_threads);
        for (int row = 0; row < M + 3; row++) {
            double total = 0;
            for (int64_t part = 0; part < num_parts; part++) total += site.sums_parts[part * (M + 3) + row];
            *(row < M ? d_bias + row : d_alpha + row - M) = (float)total;
        }
    }
    free(copy);
    free(site.d_phi_parts);
    free(site.sums_parts);
    return site.failed;
}

// out = sum of weights_i x_i [T, C]; where `y` is given also dots_i = <x_i, y> [n, T]
int mhc_collapse(int num_threads, int64_t T, int64_t C, const stream *x, const float *weights, const stream *y,
                 stream *out, float *dots) {
    struct alone op = {measure(T, C), x, y, 0, weights, out, dots};
    share_work(collapse_tile, &op, count_tiles(&op.sizes), limit_threads(&op.sizes, num_threads));
    return 0;
}

// out_i = weights_i y [T, n, C] and dots_i = <x_i, y> [n, T]
int mhc_spread(int num_threads, int64_t T, int64_t C, const stream *x, const float *weights, const stream *y,
               stream *out, float *dots) {
    struct alone op = {measure(T, C), x, y, 0, weights, out, dots};
    share_work(spread_tile, &op, count_tiles(&op.sizes), limit_threads(&op.sizes, num_threads));
    return 0;
}

// out_j = sum of h_res_ij g_i [T, n, C] and dots_ij = <g_i, x_j> [n, n, T]
int mhc_mix_backward(int num_threads, int64_t T, int64_t C, const stream *x, const float *h_res, const stream *g,
                     stream *out, float *dots) {
    struct alone op = {measure(T, C), x, 0, g, h_res, out, dots};
    share_work(mix_back_tile, &op, count_tiles(&op.sizes), limit_threads(&op.sizes, num_threads));
    return 0;
}

// with `grad` the gradient of the logits, without it H_res; all [n, n, T]
int mhc_sinkhorn(int num_threads, int64_t T, int iters, int log_iters, const float *logits, const float *grad,
                 float *out) {
    // an iteration reads and writes a matrix twice
    struct sinkhorn op = {{T, iters, LANES}, iters, log_iters, logits, grad, out, 0};
    share_work(grad ? sinkhorn_back_tile : sinkhorn_tile, &op, count_tiles(&op.sizes),
               limit_threads(&op.sizes, num_threads));
    return op.failed;
}
