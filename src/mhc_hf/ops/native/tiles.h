// Tiles of up to 16 tokens, and the products of their streams with phi, register block by register block.
//
// Shapes: a wide row is the n streams of a token in float32, each padded with zeros to whole vectors, n * padded
// numbers in all: rows of phi and of its gradient have the same form. Numbers a token are lanes.

#ifndef MHC_TILES_H
#define MHC_TILES_H

#include <stdlib.h>

#include "tokens.h"

// tokens and rows, or rows and vectors, whose sums a block keeps in registers
#if defined(__AVX512F__) || defined(__aarch64__)
enum { BLOCK_TOKENS = 4, BLOCK_ROWS = 6, BLOCK_VECTORS = 4 };
#else
enum { BLOCK_TOKENS = 4, BLOCK_ROWS = 2, BLOCK_VECTORS = 2 };
#endif

INLINE int64_t pad_channels(int64_t C) { return (C + W - 1) / W * W; }

// tokens of a tile: 16, or fewer where 16 would leave the cache
INLINE int choose_tile(int64_t C) {
    int64_t tokens = (1 << 17) / (N * C) / BLOCK_TOKENS * BLOCK_TOKENS;
    return tokens < BLOCK_TOKENS ? BLOCK_TOKENS : tokens > LANES ? LANES : (int)tokens;
}

static void *allocate(int64_t bytes) { return aligned_alloc(64, (size_t)((bytes + 64) / 64 * 64)); }

// whether streams and phi lie in memory as wide rows do
INLINE int is_wide(int64_t C) { return STREAM_BITS == 32 && C % W == 0; }

// rows of C floats, padded
static void pad_rows(const float *rows, int64_t num_rows, int64_t C, float *out) {
    int64_t padded = pad_channels(C);
    for (int64_t row = 0; row < num_rows; row++) {
        memcpy(out + row * padded, rows + row * C, (size_t)C * sizeof(float));
        memset(out + row * padded + C, 0, (size_t)(padded - C) * sizeof(float));
    }
}

// the wide rows of `count` tokens: where they lie, or in `scratch`
static const float *widen_tile(const stream *x, int count, int64_t C, float *scratch) {
    if (is_wide(C)) return (const float *)x;
    int64_t padded = pad_channels(C);
    for (int64_t row = 0; row < (int64_t)count * N; row++) {
        EACH_VECTOR(c, filled, C, store_wide(scratch + row * padded + c, load(x + row * C + c, filled));)
    }
    return scratch;
}

// <x_t, phi_row> of a few tokens and rows
INLINE void project_block(int tokens, int rows, const float *x, const float *phi, int64_t width, lanes *projected,
                          int first) {
    vec totals[BLOCK_TOKENS][8];
    UNROLL for (int t = 0; t < tokens; t++) {
        UNROLL for (int r = 0; r < rows; r++) totals[t][r] = (vec){0};
    }
    for (int64_t c = 0; c < width; c += W) {
        vec wide[BLOCK_TOKENS];
        UNROLL for (int t = 0; t < tokens; t++) wide[t] = load_wide(x + t * width + c);
        UNROLL for (int r = 0; r < rows; r++) {
            vec row = load_wide(phi + r * width + c);
            UNROLL for (int t = 0; t < tokens; t++) totals[t][r] += wide[t] * row;
        }
    }
    UNROLL for (int t = 0; t < tokens; t++) {
        UNROLL for (int r = 0; r < rows; r++) projected[r][first + t] = sum_vec(totals[t][r]);
    }
}

INLINE void project_rows(int tokens, int rows, const float *x, const float *phi, int64_t width, lanes *projected,
                         int first) {
    for (int next = 0; next < M; next += rows) {
        // the last rows may be computed twice
        int row = next + rows <= M ? next : M - rows;
        project_block(tokens, rows, x, phi + row * width, width, projected + row, first);
    }
}

// phi @ x_vec and the sum of squares of each token
static void project_tile(const float *x, int count, const float *phi, int64_t width, lanes *projected, lanes *squares) {
    int t = 0;
    for (; t + BLOCK_TOKENS <= count; t += BLOCK_TOKENS) {
        project_rows(BLOCK_TOKENS, BLOCK_ROWS, x + t * width, phi, width, projected, t);
    }
    for (; t < count; t++) project_rows(1, 8, x + t * width, phi, width, projected, t);
    for (t = 0; t < count; t++) {
        const float *row = x + t * width;
        vec totals[N] = {{0}};
        for (int64_t c = 0; c < width; c += N * W) {
            UNROLL for (int i = 0; i < N; i++) {
                vec wide = load_wide(row + c + i * W);
                totals[i] += wide * wide;
            }
        }
        UNROLL for (int i = 1; i < N; i++) totals[0] += totals[i];
        (*squares)[t] = sum_vec(totals[0]);
    }
}

// out_t = sum of weights_row,t phi_row over a few vectors; phi [m, vectors * W], out [LANES, vectors * W]
INLINE void combine_rows(int vectors, const lanes *weights, int count, const float *phi, float *out) {
    for (int t = 0; t < count; t += BLOCK_TOKENS) {
        vec totals[BLOCK_TOKENS][BLOCK_VECTORS];
        UNROLL for (int k = 0; k < BLOCK_TOKENS; k++) {
            UNROLL for (int v = 0; v < vectors; v++) totals[k][v] = (vec){0};
        }
        for (int row = 0; row < M; row++) {
            const float *row_weights = (const float *)(weights + row) + t;
            vec wide[BLOCK_VECTORS];
            UNROLL for (int v = 0; v < vectors; v++) wide[v] = load_wide(phi + (row * vectors + v) * W);
            UNROLL for (int k = 0; k < BLOCK_TOKENS; k++) {
                UNROLL for (int v = 0; v < vectors; v++) totals[k][v] += row_weights[k] * wide[v];
            }
        }
        UNROLL for (int k = 0; k < BLOCK_TOKENS; k++) {
            UNROLL for (int v = 0; v < vectors; v++) store_wide(out + ((t + k) * vectors + v) * W, totals[k][v]);
        }
    }
}

// d_phi_row += sum of weights_row,t x_t over a few rows and vectors; x [LANES, vectors * W], rows of d_phi wide ones
INLINE void add_products_block(int rows, int vectors, const lanes *weights, const float *x, int count, int64_t width,
                               float *d_phi) {
    vec totals[4][BLOCK_VECTORS];
    UNROLL for (int r = 0; r < rows; r++) {
        UNROLL for (int v = 0; v < vectors; v++) totals[r][v] = (vec){0};
    }
    for (int t = 0; t < count; t++) {
        vec wide[BLOCK_VECTORS];
        UNROLL for (int v = 0; v < vectors; v++) wide[v] = load_wide(x + (t * vectors + v) * W);
        UNROLL for (int r = 0; r < rows; r++) {
            float weight = ((const float *)(weights + r))[t];
            UNROLL for (int v = 0; v < vectors; v++) totals[r][v] += weight * wide[v];
        }
    }
    UNROLL for (int r = 0; r < rows; r++) {
        UNROLL for (int v = 0; v < vectors; v++) {
            float *sum = d_phi + r * width + v * W;
            store_wide(sum, load_wide(sum) + totals[r][v]);
        }
    }
}

INLINE void add_products(int vectors, const lanes *weights, const float *x, int count, int64_t width, float *d_phi) {
    int row = 0;
    for (; row + 4 <= M; row += 4) {
        add_products_block(4, vectors, weights + row, x, count, width, d_phi + row * width);
    }
    for (; row < M; row++) add_products_block(1, vectors, weights + row, x, count, width, d_phi + row * width);
}

#endif
