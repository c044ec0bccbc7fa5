/* One step of the Newton-Schulz iteration between its three integer products, which the caller computes. */
#include <omp.h>

#include "kernels.h"

#define MIN_PARALLEL_ELEMENTS 16384

/* x = keep · x + product · step, where there is a product; then codes and scale of every row, and Σ x² in `squares`.
 * x, product, codes: [r, c]; keep, step, scale, squares: [r]. */
void nk_iterate(float *x, const int32_t *product, const float *keep, const float *step, size_t r, size_t c,
                int8_t *codes, float *scale, float *squares) {
#pragma omp parallel for schedule(static) if (r * c > MIN_PARALLEL_ELEMENTS)
    for (size_t i = 0; i < r; i++) {
        const int32_t *row = product == NULL ? NULL : product + i * c;
        squares[i] = kernels->iterate_row(x + i * c, row, row == NULL ? 0 : keep[i], row == NULL ? 0 : step[i], c,
                                          codes + i * c, scale + i);
    }
}

/* G = X Xᵀ without its diagonal, from the product [r, r] of the codes of X and their scales [r]: float [r, r], and its
 * codes, their scales and the sums of squares of its rows. */
void nk_gram(const int32_t *product, const float *scales, size_t r, float *gram, int8_t *codes, float *gram_scales,
             float *squares) {
#pragma omp parallel for schedule(static) if (r * r > MIN_PARALLEL_ELEMENTS)
    for (size_t i = 0; i < r; i++)
        squares[i] = kernels->gram_row(product + i * r, scales, scales[i], i, r, gram + i * r, codes + i * r,
                                       gram_scales + i);
}

/* (b G + c G²) without its diagonal, times the scales of X by column, as codes and scales of its rows. gram: G without
 * its diagonal [r, r], overwritten; diagonal: [r]; square: product of the codes of G with themselves [r, r]. */
void nk_polynomial(float *gram, const int32_t *square, const float *diagonal, const float *gram_scales,
                   const float *scales, float b, float c, size_t r, int8_t *codes, float *scale) {
#pragma omp parallel for schedule(static) if (r * r > MIN_PARALLEL_ELEMENTS)
    for (size_t i = 0; i < r; i++)
        kernels->polynomial_row(gram + i * r, square + i * r, diagonal, gram_scales, scales, b, c, i, r, codes + i * r,
                                scale + i);
}
