/* Causal attention in training, forward and backward, float32: the loops over batch, heads and blocks of queries.
 *
 * Every key/value head of every sequence is a task of one thread, so that the result does not depend on how many
 * there are. The arithmetic of one head is in attention.h.
 */
#include <omp.h>
#include <string.h>

#include "kernels.h"

#define QUERY_BLOCK 64

/* A tensor [B, H, T, D], its elements D next to each other; strides in elements. */
struct heads {
    float *start;
    size_t batch, head, row;
};

static float *head_of(const struct heads *x, size_t batch, size_t head) {
    return x->start + batch * x->batch + head * x->head;
}

/* Floats of a matrix [t, d] in panels. */
static size_t panel_floats(size_t t, size_t d) { return (t + MAX_PANEL - 1) / MAX_PANEL * MAX_PANEL * d; }

/* Rows of d floats that lie `from_row` and `to_row` apart. */
static void copy_rows(const float *from, size_t from_row, size_t t, size_t d, float *to, size_t to_row) {
    for (size_t i = 0; i < t; i++) memcpy(to + i * to_row, from + i * from_row, d * sizeof *to);
}

/* heads: q, k, v, y. lse: [B, H, T]. Returns 0, or -1 without memory. */
int nk_attention(const struct heads *x, size_t batch, size_t heads, size_t kv_heads, size_t t, size_t d, float scale,
                 float *lse) {
    const size_t group = heads / kv_heads;
    int failed = 0;
#pragma omp parallel for schedule(static)
    for (size_t task = 0; task < batch * kv_heads; task++) {
        const size_t b = task / kv_heads, kv = task % kv_heads;
        float *k = scratch((panel_floats(t, d) + t * d + MAX_TILE_ROWS * score_stride(t)) * sizeof *k);
        if (k == NULL) {
            failed = -1;
            continue;
        }
        float *v = k + panel_floats(t, d), *scores = v + t * d;
        kernels->attention_panels(head_of(x + 1, b, kv), x[1].row, t, d, k);
        copy_rows(head_of(x + 2, b, kv), x[2].row, t, d, v, d);
        for (size_t h = kv * group; h < (kv + 1) * group; h++)
            kernels->attention_forward(head_of(x, b, h), x[0].row, k, v, t, d, scale, scores,
                                       head_of(x + 3, b, h), x[3].row, lse + (b * heads + h) * t);
    }
    return failed;
}

static int is_zero(const float *x, size_t d) {
    for (size_t i = 0; i < d; i++)
        if (x[i] != 0) return 0; /* NaN is not zero */
    return 1;
}

/* heads: q, k, v, dy, dq, dk, dv. Queries without a gradient take no part. Returns 0, or -1 without memory. */
int nk_attention_backward(const struct heads *x, size_t batch, size_t heads, size_t kv_heads, size_t t, size_t d,
                          float scale, const float *lse) {
    const size_t group = heads / kv_heads;
    const size_t panel = panel_floats(t, d), scores = QUERY_BLOCK * score_stride(t), block = QUERY_BLOCK * d;
    int failed = 0;
#pragma omp parallel for schedule(static)
    for (size_t task = 0; task < batch * kv_heads; task++) {
        const size_t b = task / kv_heads, kv = task % kv_heads;
        float *start = scratch((2 * panel + 3 * t * d + 2 * scores + 2 * block + MAX_TILE_ROWS * d) * sizeof *start);
        if (start == NULL) {
            failed = -1;
            continue;
        }
        float *k_panels = start, *v_panels = k_panels + panel, *k = v_panels + panel, *dk = k + t * d, *dv = dk + t * d;
        float *p = dv + t * d, *g = p + scores, *q = g + scores, *dy = q + block, *tile = dy + block;
        kernels->attention_panels(head_of(x + 1, b, kv), x[1].row, t, d, k_panels);
        kernels->attention_panels(head_of(x + 2, b, kv), x[2].row, t, d, v_panels);
        copy_rows(head_of(x + 1, b, kv), x[1].row, t, d, k, d);
        memset(dk, 0, 2 * t * d * sizeof *dk);
        for (size_t h = kv * group; h < (kv + 1) * group; h++) {
            size_t positions[QUERY_BLOCK], n = 0;
            for (size_t i = 0; i < t; i++) {
                const float *gradient = head_of(x + 3, b, h) + i * x[3].row;
                if (is_zero(gradient, d)) {
                    memset(head_of(x + 4, b, h) + i * x[4].row, 0, d * sizeof *dk);
                } else {
                    memcpy(q + n * d, head_of(x, b, h) + i * x[0].row, d * sizeof *q);
                    memcpy(dy + n * d, gradient, d * sizeof *dy);
                    positions[n++] = i;
                }
                if (n == 0 || (n < QUERY_BLOCK && i + 1 < t)) continue;
                kernels->attention_backward(q, dy, positions, n, k, k_panels, v_panels,
                                            lse + (b * heads + h) * t, t, d, scale, p, g,
                                            head_of(x + 4, b, h), x[4].row, dk, dv, tile);
                n = 0;
            }
        }
        copy_rows(dk, d, t, d, head_of(x + 5, b, kv), x[5].row);
        copy_rows(dv, d, t, d, head_of(x + 6, b, kv), x[6].row);
    }
    return failed;
}
