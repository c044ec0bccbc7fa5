/* Cross-entropy of rows of logits and its gradient, in one reading from memory; a row stays in the cache. */
#include <string.h>

#include "kernels.h"

#define MIN_PARALLEL_ROWS 8

/* logits: [m, n], which a gradient without codes overwrites; targets: [m], negative: no loss and a gradient of 0;
 * factor: [m]. loss: [m]. codes, scale: [m, n] and [m], or NULL; first: the first row's place among the dithers. */
void nk_cross_entropy(float *logits, size_t m, size_t n, const int64_t *targets, const float *factor, float *loss,
                      float levels, size_t first, int8_t *codes, float *scale) {
#pragma omp parallel for schedule(static) if (m >= MIN_PARALLEL_ROWS)
    for (size_t i = 0; i < m; i++) {
        float *row = logits + i * n;
        int8_t *row_codes = codes == NULL ? NULL : codes + i * n;
        float *row_scale = codes == NULL ? NULL : scale + i;
        if (targets[i] >= 0) {
            kernels->cross_entropy_row(row, n, (size_t)targets[i], factor[i], loss + i, levels,
                                       (uint32_t)(first + i) * DITHER_ROW, row_codes, row_scale);
            continue;
        }
        loss[i] = 0;
        if (codes == NULL) {
            memset(row, 0, n * sizeof *row);
        } else {
            memset(row_codes, 0, n);
            *row_scale = 0;
        }
    }
}
