// exp, log and the logistic function of 16 tokens at once, to a unit in the last place; NaN in, NaN out.

#ifndef MHC_ELEMENTARY_H
#define MHC_ELEMENTARY_H

#include "vectors.h"

INLINE lanes choose_lanes(lanes_bits mask, lanes yes, lanes no) {
    return (lanes)((mask & (lanes_bits)yes) | (~mask & (lanes_bits)no));
}

INLINE lanes max_lanes(lanes a, lanes b) { return choose_lanes(a > b, a, b); }

// exp(x) = 2^k exp(r) with |r| <= ln(2) / 2; Taylor's series of degree 7 is off by 7e-9 there
INLINE lanes exp_lanes(lanes x) {
    x = choose_lanes(x < -120.0f, (lanes){0} - 120.0f, x);
    x = choose_lanes(x > 120.0f, (lanes){0} + 120.0f, x);
    // the addition rounds to an integer
    lanes k = (x * 0x1.715476p0f + 0x1.8p23f) - 0x1.8p23f;
    lanes r = (x - k * 0x1.62e4p-1f) - k * 0x1.7f7d1cp-20f;
    lanes tail = 1.0f / 5040 * r + 1.0f / 720;
    tail = tail * r + 1.0f / 120;
    tail = tail * r + 1.0f / 24;
    tail = tail * r + 1.0f / 6;
    tail = tail * r + 0.5f;
    lanes value = 1.0f + (r + r * r * tail);
    // in two steps, so that 2^k may leave the range of a float on either side
    lanes_bits exponent = __builtin_convertvector(k, lanes_bits), half = exponent >> 1;
    return value * (lanes)((half + 127) << 23) * (lanes)((exponent - half + 127) << 23);
}

// log of x in [1, 2^100]: x = 2^k m with m in [0.7, 1.4], log(m) = 2 atanh((m - 1) / (m + 1)), series to the ninth power
INLINE lanes log_lanes(lanes x) {
    lanes_bits bits = (lanes_bits)x;
    // 0x3f3504f3 is sqrt(1/2)
    lanes_bits k = (bits - 0x3f3504f3) >> 23;
    lanes m = (lanes)(bits - (k << 23)), f = (m - 1.0f) / (m + 1.0f), f2 = f * f;
    lanes tail = 1.0f / 9 * f2 + 1.0f / 7;
    tail = tail * f2 + 1.0f / 5;
    tail = tail * f2 + 1.0f / 3;
    lanes exponent = __builtin_convertvector(k, lanes);
    // x - x is zero, or NaN where x is no number
    return exponent * 0x1.62e43p-1f + (2.0f * (f + f * f2 * tail) - exponent * 0x1.05c61p-29f) + (x - x);
}

INLINE lanes logistic(lanes x) { return 1.0f / (1.0f + exp_lanes(-x)); }

#endif
