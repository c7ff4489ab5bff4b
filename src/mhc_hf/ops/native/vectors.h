// Vectors: `vec` runs along channels, `lanes` across tokens; streams are widened on load and rounded once on store.
//
// A build is for one number of streams (-DSTREAMS=n) and one dtype of them (-DSTREAM_BITS=32, or 16 with -DBFLOAT or
// without). Vectors are the compiler's own (GCC and Clang), so the same source serves every processor; their width is
// that of its registers. No -ffast-math: NaN and infinity must come out as what they are.

#ifndef MHC_VECTORS_H
#define MHC_VECTORS_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

enum { N = STREAMS, M = (STREAMS + 2) * STREAMS };

#if defined(__AVX512F__)
enum { W = 16 };
#elif defined(__AVX__)
enum { W = 8 };
#else
enum { W = 4 };
#endif
enum { LANES = 16 };

typedef float vec __attribute__((vector_size(4 * W)));
typedef uint32_t vec_bits __attribute__((vector_size(4 * W)));
typedef uint16_t vec_halves __attribute__((vector_size(2 * W)));
// numbers a token of 16 tokens, one in each lane
typedef float lanes __attribute__((vector_size(4 * LANES)));
typedef int32_t lanes_bits __attribute__((vector_size(4 * LANES)));

#if STREAM_BITS == 32
typedef float stream;
typedef vec vec_streams;
#else
typedef uint16_t stream;
typedef vec_halves vec_streams;
#endif

// run a body for c = 0, W, 2W...; `count` channels from there, W but in the last
#define EACH_VECTOR(c, count, C, ...)                                                                                  \
    {                                                                                                                  \
        int64_t c = 0;                                                                                                 \
        for (; c + W <= (C); c += W) {                                                                                 \
            enum { count = W };                                                                                        \
            __VA_ARGS__                                                                                                \
        }                                                                                                              \
        if (c < (C)) {                                                                                                 \
            const int count = (int)((C)-c);                                                                            \
            __VA_ARGS__                                                                                                \
        }                                                                                                              \
    }

INLINE vec choose(vec_bits mask, vec_bits yes, vec_bits no) { return (vec)((mask & yes) | (~mask & no)); }

#if STREAM_BITS == 32

INLINE vec widen(vec_streams x) { return x; }
INLINE vec_streams narrow(vec x) { return x; }

#elif defined(BFLOAT)

INLINE vec widen(vec_streams x) { return (vec)(__builtin_convertvector(x, vec_bits) << 16); }

INLINE vec_streams narrow(vec x) {
    vec_bits bits = (vec_bits)x;
    vec_bits is_nan = (vec_bits)((bits & 0x7fffffff) > 0x7f800000);
    // to the nearest, ties to even
    vec_bits rounded = bits + 0x7fff + ((bits >> 16) & 1);
    vec_bits chosen = (vec_bits)choose(is_nan, bits | 0x400000, rounded);
    return __builtin_convertvector(chosen >> 16, vec_halves);
}

#else

INLINE vec widen(vec_streams x) {
    vec_bits half = __builtin_convertvector(x, vec_bits);
    vec_bits shifted = (half & 0x7fff) << 13;
    // exponents are 112 apart: a product with 2^112 moves them, subnormal halves too; infinity and NaN have none to move
    vec moved = (vec)shifted * 0x1p112f;
    vec_bits special = (vec_bits)(shifted >= 0x0f800000);
    vec_bits chosen = (vec_bits)choose(special, shifted | 0x7f800000, (vec_bits)moved);
    return (vec)(chosen | ((half & 0x8000) << 16));
}

INLINE vec_streams narrow(vec x) {
    vec_bits bits = (vec_bits)x;
    vec_bits sign = (bits >> 16) & 0x8000;
    bits &= 0x7fffffff;
    // to the nearest, ties to even, while the exponent moves by 112; 65520 and above become infinity
    vec_bits normal = (bits + 0xfff + ((bits >> 13) & 1) - 0x38000000) >> 13;
    // below 2^-14 the last place is worth 2^-24: an addition of 0.5 rounds to it
    vec_bits subnormal = (vec_bits)((vec)bits + 0.5f) - 0x3f000000;
    vec_bits half = (vec_bits)choose((vec_bits)(bits < 0x38800000), subnormal, normal);
    half = (vec_bits)choose((vec_bits)(bits >= 0x477ff000), (vec_bits){0} + 0x7c00, half);
    half = (vec_bits)choose((vec_bits)(bits > 0x7f800000), (vec_bits){0} + 0x7e00, half);
    return __builtin_convertvector(half | sign, vec_halves);
}

#endif

// `count` channels of a stream in float32; zeros after them
INLINE vec load(const stream *x, int count) {
    vec_streams raw = {0};
    if (count == W) {
        memcpy(&raw, x, sizeof raw);
    } else {
        for (int k = 0; k < count; k++) raw[k] = x[k];
    }
    return widen(raw);
}

INLINE void store(stream *out, vec value, int count) {
    vec_streams raw = narrow(value);
    if (count == W) {
        memcpy(out, &raw, sizeof raw);
    } else {
        for (int k = 0; k < count; k++) out[k] = raw[k];
    }
}

INLINE vec load_wide(const float *x) {
    vec value;
    memcpy(&value, x, sizeof value);
    return value;
}

INLINE void store_wide(float *out, vec value) { memcpy(out, &value, sizeof value); }

INLINE float sum_vec(vec value) {
    float parts[W];
    memcpy(parts, &value, sizeof parts);
    UNROLL for (int half = W / 2; half > 0; half /= 2) {
        UNROLL for (int k = 0; k < half; k++) parts[k] += parts[k + half];
    }
    return parts[0];
}

// numbers of `count` tokens; zeros after them
INLINE lanes load_lanes(const float *row, int count) {
    lanes value = {0};
    if (count == LANES) {
        memcpy(&value, row, sizeof value);
    } else {
        for (int k = 0; k < count; k++) value[k] = row[k];
    }
    return value;
}

INLINE void store_lanes(float *row, lanes value, int count) {
    if (count == LANES) {
        memcpy(row, &value, sizeof value);
    } else {
        for (int k = 0; k < count; k++) row[k] = value[k];
    }
}

#endif
