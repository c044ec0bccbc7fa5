/* Loops over a row that a compiler turns into vector code: plain C, compiled once for every set of kernels.
 *
 * Magnitudes are compared as the bits of their floats, whose order is the same and puts NaN last, so that what is not
 * finite reaches the scale. Codes are rounded half to even by adding 1.5 · 2²³, after which the lowest bits are the
 * integer.
 */
#ifndef NANOCHAT_LOOPS_H
#define NANOCHAT_LOOPS_H

#include <math.h>
#include <string.h>

#include "kernels.h"

#define LOOP static inline __attribute__((always_inline))
#define ROUND 12582912.0f /* 1.5 · 2²³ */
#define ROUND_BITS 0x4b400000
#define LANES 32 /* partial sums of a row, in an order that is the same with all instructions */

LOOP int32_t bits_of(float x) {
    int32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

LOOP int32_t magnitude(float x) { return bits_of(x) & 0x7fffffff; }

LOOP int8_t rounded_code(float x) { return (int8_t)(bits_of(x + ROUND) - ROUND_BITS); }

/* The largest of some magnitudes, at least MIN_GRADIENT. */
LOOP float absmax_of(int32_t largest) {
    float absmax;
    memcpy(&absmax, &largest, sizeof absmax);
    return absmax < MIN_GRADIENT ? MIN_GRADIENT : absmax;
}

/* One row of a gradient: its codes and scale after `factor` [n], and |x · weight| taken into the maxima [n]. */
LOOP void gradient_row_loop(const float *x, const float *factor, float weight, size_t n, int8_t *codes, float *scale,
                            int32_t *maxima) {
    int32_t largest = 0;
    for (size_t i = 0; i < n; i++) {
        const int32_t by_row = magnitude(x[i] * factor[i]), by_column = magnitude(x[i] * weight);
        largest = by_row > largest ? by_row : largest;
        maxima[i] = by_column > maxima[i] ? by_column : maxima[i];
    }
    const float absmax = absmax_of(largest), inverse = LEVELS / absmax;
    *scale = absmax * INVERSE_LEVELS;
    for (size_t i = 0; i < n; i++) codes[i] = rounded_code((x[i] * factor[i]) * inverse);
}

/* The same row for the codes by column; inverse: [n]. */
LOOP void gradient_column_loop(const float *x, float weight, const float *inverse, size_t n, int8_t *codes) {
    for (size_t i = 0; i < n; i++) codes[i] = rounded_code((x[i] * weight) * inverse[i]);
}

/* A row of a matrix X that is orthogonalised: x = keep · x + product · step, or x as it is without a product. Then its
 * codes and their scale. Returns Σ x². */
LOOP float iterate_row_loop(float *x, const int32_t *product, float keep, float step, size_t n, int8_t *codes,
                            float *scale) {
    int32_t largest = 0;
    float squares[16] = {0};
    if (product != NULL)
        for (size_t i = 0; i < n; i++) x[i] = keep * x[i] + (float)product[i] * step;
    for (size_t i = 0; i < n; i++) largest = magnitude(x[i]) > largest ? magnitude(x[i]) : largest;
    size_t i = 0;
    for (; i + 16 <= n; i += 16)
        for (size_t j = 0; j < 16; j++) squares[j] += x[i + j] * x[i + j];
    for (; i < n; i++) squares[0] += x[i] * x[i];
    const float absmax = absmax_of(largest), inverse = LEVELS / absmax;
    *scale = absmax * INVERSE_LEVELS;
    for (i = 0; i < n; i++) codes[i] = rounded_code(x[i] * inverse);
    float sum = 0;
    for (size_t j = 0; j < 16; j++) sum += squares[j];
    return sum;
}

/* A row of the Gram matrix from the product of codes, without its element `own`: float [n], and its codes and scale.
 * Returns the sum of squares. */
LOOP float gram_row_loop(const int32_t *product, const float *scales, float scale, size_t own, size_t n, float *gram,
                         int8_t *codes, float *code_scale) {
    for (size_t j = 0; j < n; j++) gram[j] = (float)product[j] * (scales[j] * scale);
    gram[own] = 0;
    return iterate_row_loop(gram, NULL, 0, 0, n, codes, code_scale);
}

/* The same row of the polynomial b G + c G², without its diagonal, times the scales of the rows of X: codes and scale.
 * gram: G without its diagonal, which is `diagonal`; square: product of the codes of two rows of it, whose scales are
 * gram_scales. gram is overwritten. */
LOOP void polynomial_row_loop(float *gram, const int32_t *square, const float *diagonal, const float *gram_scales,
                              const float *scales, float b, float c, size_t own, size_t n, int8_t *codes, float *scale) {
    const float d = diagonal[own], s = gram_scales[own];
    for (size_t j = 0; j < n; j++)
        gram[j] = ((b + c * (d + diagonal[j])) * gram[j] + c * ((float)square[j] * (s * gram_scales[j]))) * scales[j];
    gram[own] = 0;
    iterate_row_loop(gram, NULL, 0, 0, n, codes, scale);
}

/* exp(x) of x ≤ 0 to two last places: 2ⁿ p(r), r = x − n ln 2, a Taylor polynomial of degree 7. 0 below −64, so that
 * nothing is subnormal later; NaN where x is. */
LOOP float exp_of(float x) {
    const float shifted = x * 1.44269504088896341f + ROUND, n = shifted - ROUND;
    const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = r * (1.0f / 5040) + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = (p * r) * r + (r + 1.0f);
    const int32_t bits = (int32_t)((uint32_t)(bits_of(shifted) - ROUND_BITS + 127) << 23);
    float power;
    memcpy(&power, &bits, sizeof power);
    return x < -64.0f ? 0.0f : p * power;
}

/* u in [−½, ½) for the element i of a row: multiples of an irrational number, which fill every interval evenly. */
LOOP float dither(uint32_t offset, size_t i) {
    const uint32_t u = offset + (uint32_t)i * DITHER_COLUMN;
    return (float)(int32_t)(u >> 16) * 0x1p-16f - 0.5f;
}

/* A row of logits: its cross-entropy in `loss`, and the gradient of factor · loss. In place as float32; or, with codes,
 * the softmax without the target's −1 as codes and their scale, rounded down after a dither in [0, 1). */
LOOP void cross_entropy_row_loop(float *x, size_t n, size_t target, float factor, float *loss, float levels,
                                 uint32_t offset, int8_t *codes, float *scale) {
    float lanes[LANES];
    const size_t whole = n / LANES * LANES;
    float maximum = x[0];
    const float picked = x[target];
    for (size_t j = 0; j < LANES; j++) lanes[j] = maximum;
    for (size_t i = 0; i < whole; i += LANES)
        for (size_t j = 0; j < LANES; j++) lanes[j] = x[i + j] > lanes[j] ? x[i + j] : lanes[j];
    for (size_t i = whole; i < n; i++) maximum = x[i] > maximum ? x[i] : maximum;
    for (size_t j = 0; j < LANES; j++) maximum = lanes[j] > maximum ? lanes[j] : maximum;
    for (size_t j = 0; j < LANES; j++) lanes[j] = 0;
    for (size_t i = 0; i < whole; i += LANES)
        for (size_t j = 0; j < LANES; j++) lanes[j] += x[i + j] = exp_of(x[i + j] - maximum);
    for (size_t i = whole; i < n; i++) lanes[0] += x[i] = exp_of(x[i] - maximum);
    for (size_t width = LANES / 2; width > 0; width /= 2)
        for (size_t j = 0; j < width; j++) lanes[j] += lanes[j + width];
    *loss = logf(lanes[0]) + (maximum - picked);
    if (codes != NULL) {
        for (size_t i = 0; i < n; i++) codes[i] = rounded_code(x[i] * levels + dither(offset, i));
        *scale = factor / (lanes[0] * levels);
        return;
    }
    const float share = factor / lanes[0];
    for (size_t i = 0; i < n; i++) x[i] *= share;
    x[target] -= factor;
}

/* The loops as functions with the given attributes, and their names for `struct kernels`. */
#define LOOPS(ATTRIBUTES)                                                                                             \
    ATTRIBUTES static void gradient_row(const float *x, const float *factor, float weight, size_t n, int8_t *codes,   \
                                        float *scale, int32_t *maxima) {                                              \
        gradient_row_loop(x, factor, weight, n, codes, scale, maxima);                                                \
    }                                                                                                                 \
    ATTRIBUTES static void gradient_column(const float *x, float weight, const float *inverse, size_t n,              \
                                           int8_t *codes) {                                                           \
        gradient_column_loop(x, weight, inverse, n, codes);                                                           \
    }                                                                                                                 \
    ATTRIBUTES static float iterate_row(float *x, const int32_t *product, float keep, float step, size_t n,           \
                                        int8_t *codes, float *scale) {                                                \
        return iterate_row_loop(x, product, keep, step, n, codes, scale);                                             \
    }                                                                                                                 \
    ATTRIBUTES static float gram_row(const int32_t *product, const float *scales, float scale, size_t own, size_t n,  \
                                     float *gram, int8_t *codes, float *code_scale) {                                 \
        return gram_row_loop(product, scales, scale, own, n, gram, codes, code_scale);                                \
    }                                                                                                                 \
    ATTRIBUTES static void polynomial_row(float *gram, const int32_t *square, const float *diagonal,                  \
                                          const float *gram_scales, const float *scales, float b, float c,            \
                                          size_t own, size_t n, int8_t *codes, float *scale) {                        \
        polynomial_row_loop(gram, square, diagonal, gram_scales, scales, b, c, own, n, codes, scale);                 \
    }                                                                                                                 \
    ATTRIBUTES static void cross_entropy_row(float *x, size_t n, size_t target, float factor, float *loss,            \
                                             float levels, uint32_t offset, int8_t *codes, float *scale) {            \
        cross_entropy_row_loop(x, n, target, factor, loss, levels, offset, codes, scale);                             \
    }
#define LOOP_NAMES gradient_row, gradient_column, iterate_row, gram_row, polynomial_row, cross_entropy_row

#endif
