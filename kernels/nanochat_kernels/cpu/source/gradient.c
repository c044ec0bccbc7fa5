/* The gradient of a layer's output in int8, for both products of its backward pass, from two readings. */
#include <omp.h>
#include <string.h>

#include "kernels.h"
#include "loops.h"

#define MIN_PARALLEL_ROWS 32

/* dy: [m, n], rows `stride` apart; factor: [n]; weight: [m].
 * codes, scale: [m, n] and [m], of dy · factor by row. column_codes, column_scale: [m, n] and [n], of dy · weight by
 * column, at most ± levels. Returns 0, or -1 without memory. */
int nk_quantize_gradient(const float *dy, size_t stride, size_t m, size_t n, const float *factor, const float *weight,
                         int8_t *codes, float *scale, float levels, int8_t *column_codes, float *column_scale) {
    const size_t width = (n + 15) / 16 * 16; /* no two threads write one cache line */
    const size_t most = m < MIN_PARALLEL_ROWS ? 1 : (size_t)omp_get_max_threads();
    int32_t *maxima = scratch(most * width * sizeof *maxima);
    if (maxima == NULL) return -1;
    memset(maxima, 0, most * width * sizeof *maxima);
    float *inverse = (float *)maxima; /* of thread 0, whose maxima it replaces one by one */
#pragma omp parallel num_threads(most)
    {
        const size_t threads = (size_t)omp_get_num_threads(), thread = (size_t)omp_get_thread_num();
        const size_t first = m * thread / threads, last = m * (thread + 1) / threads;
        for (size_t i = first; i < last; i++)
            kernels->gradient_row(dy + i * stride, factor, weight[i], n, codes + i * n, scale + i,
                                  maxima + thread * width);
#pragma omp barrier
#pragma omp for schedule(static)
        for (size_t j = 0; j < n; j++) {
            int32_t largest = 0;
            for (size_t t = 0; t < threads; t++)
                largest = maxima[t * width + j] > largest ? maxima[t * width + j] : largest;
            const float absmax = absmax_of(largest);
            column_scale[j] = absmax * (1.0f / levels);
            inverse[j] = levels / absmax;
        }
        for (size_t i = first; i < last; i++)
            kernels->gradient_column(dy + i * stride, weight[i], inverse, n, column_codes + i * n);
    }
    return 0;
}
