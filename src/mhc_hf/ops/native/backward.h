// Backward of a read, and of the write whose mix it owns, a tile of tokens at a time (docs/math.md).
//
// Shapes as in forward.h; d_x_next [T, n, C] is the gradient of the streams after the site. Every part of the work
// walks over tiles of its own, and adds what the parameters are told to sums of its own, which are added in their order.

#ifndef MHC_BACKWARD_H
#define MHC_BACKWARD_H

#include "forward.h"

struct read_backward {
    struct sizes sizes;
    const stream *x, *d_branch_in, *d_x_next;
    const float *phi; // wide rows
    struct gates gates;
    const float *projected, *inv_rms, *d_h_pre, *d_h_post, *d_h_res;
    stream *d_x;
    float *d_phi;
    int64_t num_parts;
    float *d_phi_parts;  // [parts, m] wide rows
    double *sums_parts;  // [parts, m + 3]: bias, alpha
    int failed;
};

// of a part: `history` of Sinkhorn; a block of phi and of x, and its products for every stream, packed
struct buffers {
    lanes *history;
    float *phi, *x, *products;
};

// what the maps are told: gradients given, and dots of the streams
static void dot_tile(const struct read_backward *site, int64_t first, int count, lanes *d_pre, lanes *d_res) {
    int64_t C = site->sizes.C;
    for (int t = 0; t < count; t++) {
        const stream *x = site->x + (first + t) * N * C;
        float dots[N * N];
        if (site->d_branch_in) {
            dot_token(x, site->d_branch_in + (first + t) * C, C, dots);
            for (int i = 0; i < N; i++) d_pre[i][t] += dots[i];
        }
        if (site->d_x_next) {
            dot_token_pairs(site->d_x_next + (first + t) * N * C, x, C, dots);
            for (int k = 0; k < N * N; k++) d_res[k][t] += dots[k];
        }
    }
}

// d_x_i = phi's part + along x + h_pre_i d_branch_in + sum of h_res_ji d_x_next_j, over `vectors` of the channels
static void finish_token(const struct read_backward *site, int64_t token, int64_t c, int vectors, const float *products,
                         const float *h_pre, const float *h_res, float along_x) {
    int64_t C = site->sizes.C;
    const stream *x = site->x + token * N * C, *g = site->d_x_next ? site->d_x_next + token * N * C : 0;
    const stream *read = site->d_branch_in ? site->d_branch_in + token * C : 0;
    stream *d_x = site->d_x + token * N * C;
    int64_t stride = (int64_t)LANES * vectors * W;
    int64_t end = c + vectors * W < C ? c + vectors * W : C;
    EACH_VECTOR(k, count, end - c, {
        vec totals[N];
        UNROLL for (int i = 0; i < N; i++) {
            totals[i] = load_wide(products + i * stride + k) + along_x * load(x + i * C + c + k, count);
        }
        if (read) {
            vec d_read = load(read + c + k, count);
            UNROLL for (int i = 0; i < N; i++) totals[i] += h_pre[i] * d_read;
        }
        if (g) {
            UNROLL for (int j = 0; j < N; j++) {
                vec from = load(g + j * C + c + k, count);
                UNROLL for (int i = 0; i < N; i++) totals[i] += h_res[j * N + i] * from;
            }
        }
        UNROLL for (int i = 0; i < N; i++) store(d_x + i * C + c + k, totals[i], count);
    })
}

// rows of C channels, `vectors` of them from c on, one after the other in float32: what products walk over many times
// must not lie at strides that share a place in the cache
INLINE void pack_streams(const stream *x, int rows, int64_t stride, int64_t c, int64_t C, int vectors, float *out) {
    int64_t rest = C - c;
    for (int row = 0; row < rows; row++) {
        UNROLL for (int v = 0; v < vectors; v++) {
            int64_t left = rest - v * W;
            vec wide = left >= W ? load(x + row * stride + c + v * W, W) : load(x + row * stride + c + v * W, (int)left);
            store_wide(out + (row * vectors + v) * W, wide);
        }
    }
}

INLINE void pack_phi(const float *phi, int64_t width, int vectors, float *out) {
    for (int row = 0; row < M; row++) {
        UNROLL for (int v = 0; v < vectors; v++) {
            store_wide(out + (row * vectors + v) * W, load_wide(phi + row * width + v * W));
        }
    }
}

// d_x and the tile's part of d_phi over `vectors` of the channels
INLINE void backpropagate_channels(const struct read_backward *site, int64_t first, int count, int64_t c, int vectors,
                                   const struct told *told, const struct buffers *buffers, float *d_phi) {
    int64_t C = site->sizes.C, padded = pad_channels(C), width = N * padded;
    int64_t stride = (int64_t)LANES * vectors * W;
    for (int i = 0; i < N; i++) {
        pack_phi(site->phi + i * padded + c, width, vectors, buffers->phi);
        pack_streams(site->x + (first * N + i) * C, count, N * C, c, C, vectors, buffers->x);
        combine_rows(vectors, told->d_projected, count, buffers->phi, buffers->products + i * stride);
        add_products(vectors, told->d_projected, buffers->x, count, width, d_phi + i * padded + c);
    }
    for (int t = 0; t < count; t++) {
        float h_pre[N], h_res[N * N], along_x;
        take_token(told->h_pre, N, t, h_pre);
        take_token(told->h_res, N * N, t, h_res);
        take_token(&told->along_x, 1, t, &along_x);
        finish_token(site, first + t, c, vectors, buffers->products + t * vectors * W, h_pre, h_res, along_x);
    }
}

static void backpropagate_tile(const struct read_backward *site, int64_t part, int64_t first, int count,
                               const struct buffers *buffers) {
    int64_t T = site->sizes.T, C = site->sizes.C, padded = pad_channels(C);
    lanes d_pre[N], d_post[N], d_res[N * N], projected[M], inv_rms;
    memset(d_pre, 0, sizeof d_pre);
    memset(d_post, 0, sizeof d_post);
    memset(d_res, 0, sizeof d_res);
    if (site->d_h_pre) load_rows(site->d_h_pre, N, T, first, count, d_pre);
    if (site->d_h_post) load_rows(site->d_h_post, N, T, first, count, d_post);
    if (site->d_h_res) load_rows(site->d_h_res, N * N, T, first, count, d_res);
    load_rows(site->projected, M, T, first, count, projected);
    load_rows(site->inv_rms, 1, T, first, count, &inv_rms);
    dot_tile(site, first, count, d_pre, d_res);

    struct told told;
    double *sums = site->sums_parts + part * (M + 3);
    backpropagate_maps(&site->gates, projected, inv_rms, N * C, d_pre, d_post, d_res, count, buffers->history, sums,
                       sums + M, &told);

    float *d_phi = site->d_phi_parts + part * M * N * padded;
    int64_t c = 0;
    for (; c + BLOCK_VECTORS * W <= padded; c += BLOCK_VECTORS * W) {
        backpropagate_channels(site, first, count, c, BLOCK_VECTORS, &told, buffers, d_phi);
    }
    for (; c < padded; c += W) {
        backpropagate_channels(site, first, count, c, 1, &told, buffers, d_phi);
    }
}

static void backpropagate_part(void *task, int64_t part) {
    struct read_backward *site = task;
    const struct sizes *sizes = &site->sizes;
    int64_t num_tiles = (sizes->T + sizes->tile - 1) / sizes->tile, width = N * pad_channels(sizes->C);
    int64_t block = BLOCK_VECTORS * W * sizeof(float);
    struct buffers buffers = {
        allocate(count_history(site->gates.iters, site->gates.log_iters) * (int64_t)sizeof(lanes)),
        allocate(block * M),
        allocate(block * LANES),
        allocate(block * LANES * N),
    };
    if (buffers.history && buffers.phi && buffers.x && buffers.products) {
        memset(site->d_phi_parts + part * M * width, 0, (size_t)(M * width) * sizeof(float));
        int64_t end = num_tiles * (part + 1) / site->num_parts;
        for (int64_t tile = num_tiles * part / site->num_parts; tile < end; tile++) {
            int64_t first;
            int count = find_tile(sizes, tile, &first);
            backpropagate_tile(site, part, first, count, &buffers);
        }
    } else {
        site->failed = 1;
    }
    free(buffers.history);
    free(buffers.phi);
    free(buffers.x);
    free(buffers.products);
}

// one row of d_phi: the sum over parts, in their order
static void add_parts(void *task, int64_t row) {
    const struct read_backward *site = task;
    int64_t C = site->sizes.C, padded = pad_channels(C), part_size = M * N * padded;
    for (int i = 0; i < N; i++) {
        const float *parts = site->d_phi_parts + (row * N + i) * padded;
        float *out = site->d_phi + (row * N + i) * C;
        memcpy(out, parts, (size_t)C * sizeof(float));
        for (int64_t part = 1; part < site->num_parts; part++) {
            const float *other = parts + part * part_size;
            for (int64_t c = 0; c < C; c++) out[c] += other[c];
        }
    }
}

#endif
