/* Causal attention of one head and its gradients: compiled once for every set of kernels.
 *
 * A tile is TILE_ROWS rows by TILE_VECTORS vectors of a product that stay in registers; the file that includes this
 * one says how large it is, and what a vector is. Matrices that are read by column are kept in panels: PANEL rows of
 * them side by side, [ceil(T / PANEL)][D][PANEL].
 *
 * Scores are masked by position: tiles beyond the diagonal are left out, so that a row of scores is defined up to
 * `width` of its tile, with zeros behind its own position.
 */
#include <math.h>
#include <string.h>

#define PANEL (LANES * TILE_VECTORS)

/* exp(x) for x up to 88: 2ⁿ · p(r), r = x − n ln 2, p a Taylor polynomial of degree 7 on |r| ≤ ln 2 / 2. Exactly zero
 * where it would be subnormal. */
INLINE VECTOR exp_vector(VECTOR x) {
    x = MAX(SPLAT(-88.0f), x); /* in this order, so that NaN stays */
    VECTOR n = FMADD(x, SPLAT(1.44269504088896341f), SPLAT(ROUND));
    const VECTOR power = POWER_OF_TWO(n);
    n = SUB(n, SPLAT(ROUND));
    VECTOR r = FMADD(n, SPLAT(-0.693359375f), x);
    r = FMADD(n, SPLAT(2.12194440e-4f), r);
    VECTOR p = SPLAT(1.0f / 5040);
    p = FMADD(p, r, SPLAT(1.0f / 720));
    p = FMADD(p, r, SPLAT(1.0f / 120));
    p = FMADD(p, r, SPLAT(1.0f / 24));
    p = FMADD(p, r, SPLAT(1.0f / 6));
    p = FMADD(p, r, SPLAT(0.5f));
    p = FMADD(p, r, SPLAT(1.0f));
    return MUL(FMADD(p, r, SPLAT(1.0f)), power);
}

/* c [rows, vectors] (+)= Σ_k a[r, k] · b[k, ·]; the element [r, k] of a is a[r · a_row + k · a_column]. */
INLINE void tile_product(const float *a, size_t a_row, size_t a_column, const float *b, size_t b_row, size_t depth,
                         float *c, size_t c_row, int rows, int vectors, int add) {
    VECTOR sum[TILE_ROWS][TILE_VECTORS];
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 16
        for (int v = 0; v < vectors; v++) sum[r][v] = SPLAT(0.0f);
    for (size_t k = 0; k < depth; k++) {
        VECTOR y[TILE_VECTORS];
#pragma GCC unroll 16
        for (int v = 0; v < vectors; v++) y[v] = LOAD(b + k * b_row + v * LANES);
#pragma GCC unroll 16
        for (int r = 0; r < rows; r++) {
            const VECTOR x = SPLAT(a[r * a_row + k * a_column]);
#pragma GCC unroll 16
            for (int v = 0; v < vectors; v++) sum[r][v] = FMADD(x, y[v], sum[r][v]);
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 16
        for (int v = 0; v < vectors; v++) {
            float *at = c + r * c_row + v * LANES;
            STORE(at, add ? ADD(LOAD(at), sum[r][v]) : sum[r][v]);
        }
}

/* The same for at most TILE_ROWS rows and any multiple of LANES columns; b_panel: from one PANEL columns to the next. */
INLINE void row_product(const float *a, size_t a_row, size_t a_column, const float *b, size_t b_row, size_t b_panel,
                        size_t depth, float *c, size_t c_row, size_t rows, size_t columns, int add) {
    size_t n = 0;
    for (; n + PANEL <= columns; n += PANEL, b += b_panel) {
        if (rows == TILE_ROWS)
            tile_product(a, a_row, a_column, b, b_row, depth, c + n, c_row, TILE_ROWS, TILE_VECTORS, add);
        else
            for (size_t r = 0; r < rows; r++)
                tile_product(a + r * a_row, 0, a_column, b, b_row, depth, c + r * c_row + n, 0, 1, TILE_VECTORS, add);
    }
    for (; n < columns; n += LANES, b += LANES) {
        if (rows == TILE_ROWS)
            tile_product(a, a_row, a_column, b, b_row, depth, c + n, c_row, TILE_ROWS, 1, add);
        else
            for (size_t r = 0; r < rows; r++)
                tile_product(a + r * a_row, 0, a_column, b, b_row, depth, c + r * c_row + n, 0, 1, 1, add);
    }
}

/* x [t, d] by panels, zeros behind its last row. */
TARGET static void attention_panels(const float *x, size_t x_row, size_t t, size_t d, float *panels) {
    for (size_t first = 0; first < t; first += PANEL, panels += d * PANEL) {
        const size_t rows = t - first < PANEL ? t - first : PANEL;
        if (rows < PANEL) memset(panels, 0, d * PANEL * sizeof *panels);
        for (size_t i = 0; i < d; i += 16)
            for (size_t r = 0; r < rows; r++)
                for (size_t j = i; j < i + 16; j++) panels[j * PANEL + r] = x[(first + r) * x_row + j];
    }
}

/* A row of scores, of which the first n count, to exp(scale · s − shift), and to zero up to `width`. Returns the sum. */
INLINE float exp_row(float *s, size_t n, size_t width, float scale, float shift) {
    VECTOR sum = SPLAT(0.0f);
    for (size_t j = n; j < width; j += LANES) STORE(s + j, SPLAT(-INFINITY));
    for (size_t j = 0; j < width; j += LANES) {
        const VECTOR e = exp_vector(FMADD(LOAD(s + j), SPLAT(scale), SPLAT(-shift)));
        STORE(s + j, e);
        sum = ADD(sum, e);
    }
    return SUM_LANES(sum);
}

INLINE float row_max(float *s, size_t n, size_t width) {
    VECTOR top = SPLAT(-INFINITY);
    for (size_t j = n; j < width; j += LANES) STORE(s + j, top);
    for (size_t j = 0; j < width; j += LANES) top = MAX(top, LOAD(s + j));
    return MAX_LANES(top);
}

/* y [t, d] and lse [t] of one head; k in panels. scores: [TILE_ROWS, width of t]. */
TARGET static void attention_forward(const float *q, size_t q_row, const float *k, const float *v, size_t t, size_t d,
                                     float scale, float *scores, float *y, size_t y_row, float *lse) {
    const size_t stride = score_stride(t);
    for (size_t i = 0; i < t; i += TILE_ROWS) {
        const size_t rows = t - i < TILE_ROWS ? t - i : TILE_ROWS, width = score_width(i + rows);
        float inverse[TILE_ROWS];
        row_product(q + i * q_row, q_row, 1, k, PANEL, d * PANEL, d, scores, stride, rows, width, 0);
        for (size_t r = 0; r < rows; r++) {
            float *s = scores + r * stride;
            const float shift = row_max(s, i + r + 1, width) * scale;
            const float sum = exp_row(s, i + r + 1, width, scale, shift);
            inverse[r] = 1.0f / sum;
            lse[i + r] = shift + logf(sum);
        }
        row_product(scores, stride, 1, v, d, PANEL, i + rows, y + i * y_row, y_row, rows, d, 0);
        for (size_t r = 0; r < rows; r++)
            for (float *at = y + (i + r) * y_row, *end = at + d; at < end; at += LANES)
                STORE(at, MUL(LOAD(at), SPLAT(inverse[r])));
    }
}

/* p · (g − Σ p g / Σ p) · scale into g, for a row of probabilities p and its gradient g. Their sum, which is 1 but for
 * the rounding of lse, keeps what cancels exact. */
INLINE void softmax_gradient(const float *p, float *g, float p_sum, size_t width, float scale) {
    VECTOR sum = SPLAT(0.0f);
    for (size_t j = 0; j < width; j += LANES) sum = FMADD(LOAD(p + j), LOAD(g + j), sum);
    const VECTOR mean = SPLAT(SUM_LANES(sum) / p_sum), factor = SPLAT(scale);
    for (size_t j = 0; j < width; j += LANES)
        STORE(g + j, MUL(MUL(LOAD(p + j), factor), SUB(LOAD(g + j), mean)));
}

/* Gradients of one head from those of its queries at `positions` [rows], ascending: dq [t, d] of these rows, and sums
 * into dk and dv [t, d]. q, dy: [rows, d]; k: as it is and, like v, in panels; lse: [t]. */
TARGET static void attention_backward(const float *q, const float *dy, const size_t *positions, size_t rows,
                                      const float *k, const float *k_panels, const float *v_panels, const float *lse,
                                      size_t t, size_t d, float scale, float *scores, float *slopes, float *dq,
                                      size_t dq_row, float *dk, float *dv, float *dq_tile) {
    const size_t stride = score_stride(t);
    for (size_t i = 0; i < rows; i += TILE_ROWS) {
        const size_t n = rows - i < TILE_ROWS ? rows - i : TILE_ROWS, end = positions[i + n - 1] + 1;
        const size_t width = score_width(end);
        float *p = scores + i * stride, *g = slopes + i * stride;
        row_product(q + i * d, d, 1, k_panels, PANEL, d * PANEL, d, p, stride, n, width, 0);
        row_product(dy + i * d, d, 1, v_panels, PANEL, d * PANEL, d, g, stride, n, width, 0);
        for (size_t r = 0; r < n; r++) {
            const size_t position = positions[i + r];
            const float sum = exp_row(p + r * stride, position + 1, width, scale, lse[position]);
            softmax_gradient(p + r * stride, g + r * stride, sum, width, scale);
        }
        row_product(g, stride, 1, k, d, PANEL, end, dq_tile, d, n, d, 0);
        for (size_t r = 0; r < n; r++) memcpy(dq + positions[i + r] * dq_row, dq_tile + r * d, d * sizeof *dq);
    }
    size_t first = 0;
    for (size_t j = 0; j <= positions[rows - 1]; j += TILE_ROWS) {
        while (positions[first] < j) first++;
        const size_t n = t - j < TILE_ROWS ? t - j : TILE_ROWS, at = first * stride + j;
        row_product(scores + at, 1, stride, dy + first * d, d, PANEL, rows - first, dv + j * d, d, n, d, 1);
        row_product(slopes + at, 1, stride, q + first * d, d, PANEL, rows - first, dk + j * d, d, n, d, 1);
    }
}

#define ATTENTION_NAMES attention_panels, attention_forward, attention_backward
