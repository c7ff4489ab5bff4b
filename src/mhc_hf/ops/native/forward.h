// Forward, a tile of tokens at a time: write the streams after a site, read those before one, or both in one pass.
//
// Shapes: x [T, n, C], branch tensors [T, C], numbers a token token-last: h_pre [n, T], h_post [n, T], h_res [n, n, T],
// projected [m, T], inv_rms [T]. A pointer that is null asks for nothing.

#ifndef MHC_FORWARD_H
#define MHC_FORWARD_H

#include "maps.h"
#include "team.h"
#include "tiles.h"

struct sizes {
    int64_t T, C;
    int tile;
};

// x_next = H_res x + H_post y
struct write {
    const stream *x, *y;
    const float *h_post, *h_res;
    stream *x_next;
};

struct read {
    const stream *x;
    const float *phi; // wide rows
    struct gates gates;
    float norm_eps;
    stream *branch_in;
    float *h_pre, *h_post, *h_res, *projected, *inv_rms;
};

struct forward {
    struct sizes sizes;
    const struct write *write;
    const struct read *read;
    int failed;
};

// `rows` numbers a token of a tile, [rows, T] -> lanes
INLINE void load_rows(const float *numbers, int rows, int64_t T, int64_t first, int count, lanes *out) {
    for (int row = 0; row < rows; row++) out[row] = load_lanes(numbers + row * T + first, count);
}

INLINE void store_rows(float *numbers, int rows, int64_t T, int64_t first, int count, const lanes *values) {
    if (!numbers) return;
    for (int row = 0; row < rows; row++) store_lanes(numbers + row * T + first, values[row], count);
}

// the numbers of one token, from lanes and into them
INLINE void take_token(const lanes *values, int rows, int t, float *out) {
    for (int row = 0; row < rows; row++) out[row] = ((const float *)(values + row))[t];
}

INLINE void put_token(lanes *values, int rows, int t, const float *numbers) {
    for (int row = 0; row < rows; row++) ((float *)(values + row))[t] = numbers[row];
}

// the tokens of a tile: the first, and how many
INLINE int find_tile(const struct sizes *sizes, int64_t tile, int64_t *first) {
    *first = tile * sizes->tile;
    return *first + sizes->tile <= sizes->T ? sizes->tile : (int)(sizes->T - *first);
}

static void write_tile(const struct write *site, const struct sizes *sizes, int64_t first, int count) {
    int64_t C = sizes->C;
    lanes posts[N], mixes[N * N];
    load_rows(site->h_post, N, sizes->T, first, count, posts);
    load_rows(site->h_res, N * N, sizes->T, first, count, mixes);
    for (int t = 0; t < count; t++) {
        float h_post[N], h_res[N * N];
        take_token(posts, N, t, h_post);
        take_token(mixes, N * N, t, h_res);
        int64_t token = first + t;
        mix_token(site->x + token * N * C, site->y + token * C, h_post, h_res, C, site->x_next + token * N * C);
    }
}

static void read_tile(const struct read *site, const struct sizes *sizes, int64_t first, int count, float *scratch) {
    int64_t T = sizes->T, C = sizes->C;
    const stream *x = site->x + first * N * C;
    lanes projected[M], squares = {0}, h_pre[N], h_post[N], h_res[N * N];
    memset(projected, 0, sizeof projected);
    const float *wide = widen_tile(x, count, C, scratch);
    project_tile(wide, count, site->phi, N * pad_channels(C), projected, &squares);
    lanes inv_rms = invert_rms(squares, N * C, site->norm_eps);
    compute_maps(&site->gates, projected, inv_rms, h_pre, h_post, h_res);
    store_rows(site->h_pre, N, T, first, count, h_pre);
    store_rows(site->h_post, N, T, first, count, h_post);
    store_rows(site->h_res, N * N, T, first, count, h_res);
    store_rows(site->projected, M, T, first, count, projected);
    store_rows(site->inv_rms, 1, T, first, count, &inv_rms);
    if (!site->branch_in) return;
    for (int t = 0; t < count; t++) {
        float weights[N];
        take_token(h_pre, N, t, weights);
        collapse_token(x + t * N * C, weights, C, site->branch_in + (first + t) * C);
    }
}

static void forward_tile(void *task, int64_t part) {
    struct forward *forward = task;
    const struct sizes *sizes = &forward->sizes;
    int64_t first;
    int count = find_tile(sizes, part, &first);
    if (forward->write) write_tile(forward->write, sizes, first, count);
    if (!forward->read) return;
    float *scratch = 0;
    if (!is_wide(sizes->C)) {
        scratch = allocate((int64_t)count * N * pad_channels(sizes->C) * sizeof(float));
        if (!scratch) {
            forward->failed = 1;
            return;
        }
    }
    read_tile(forward->read, sizes, first, count, scratch);
    free(scratch);
}

// phi as wide rows: `phi` itself, or a copy to be freed; null where there is no memory
static const float *widen_phi(const float *phi, int64_t C, float **copy) {
    *copy = 0;
    if (C % W == 0) return phi;
    *copy = allocate((int64_t)M * N * pad_channels(C) * sizeof(float));
    if (*copy) pad_rows(phi, M * N, C, *copy);
    return *copy;
}

#endif
