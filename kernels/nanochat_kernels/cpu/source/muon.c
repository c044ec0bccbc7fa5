/* A whole step of Muon with AVX-512 VNNI: momentum, Newton-Schulz iteration with integer products, and the new weights.
 *
 * The iteration is that of reference/orthogonalize.py. Products of a matrix with its own transpose are computed below
 * the diagonal and mirrored. Small matrices are shared out among the threads, each of which keeps its own in its cache;
 * of large or few ones the rows are. All sums have the same order either way.
 */
#include <omp.h>
#include <string.h>

#include "kernels.h"

#define UNSUPPORTED (-2)

#if defined(__x86_64__)
#include <math.h>

#include "packed_product.h"

#define SMALL (1 << 21)      /* elements of a matrix that one thread computes alone */
#define TINY_NORM 1e-7f

/* X [r, c], r ≤ c, and what is computed of it; rs, cs: from one row of [r, r] or [r, c] to the next. */
struct work {
    size_t r, c, rs, cs;
    float *x, *gram, *scale, *diagonal, *gram_scale, *squares, *step;
    int32_t *product, *tiles; /* [r, r], and PANEL rows of [r, c] for every thread */
    int8_t *codes, *gram_codes;
    uint8_t *by_rows, *by_columns; /* packed: for X Xᵀ and G Gᵀ, and for P X */
};

/* How one step changes weights: the options of nk_muon. */
struct rule {
    float momentum, added, decay, rate, limit; /* added: 1 - momentum */
    int nesterov, tighten;
    const float *coefficients;
    size_t steps;
};

static struct work placed(uint8_t *memory, size_t r, size_t c, size_t threads, size_t *bytes) {
    struct work w = {.r = r, .c = c, .rs = up(r, 64), .cs = up(c, 64)};
    const size_t square = up(r, PANEL) * w.rs;
    size_t used = 0;
#define TAKE(field, size) w.field = (void *)(memory + used), used += up((size), 64)
    TAKE(x, r * w.cs * 4);
    TAKE(gram, square * 4);
    TAKE(product, square * 4);
    TAKE(tiles, threads * PANEL * w.cs * 4);
    TAKE(scale, w.rs * 4);
    TAKE(diagonal, w.rs * 4);
    TAKE(gram_scale, w.rs * 4);
    TAKE(squares, w.rs * 4);
    TAKE(step, w.rs * 4);
    TAKE(codes, r * w.cs);
    TAKE(gram_codes, r * w.rs);
    TAKE(by_rows, up(r, PANEL) * w.cs);
    TAKE(by_columns, up(r, 4) * w.cs);
#undef TAKE
    *bytes = used;
    return w;
}

/* codes · codesᵀ of w->r rows, whole. */
AVX512 static void own_product(const struct work *w, const int8_t *codes, size_t stride) {
    const size_t groups = up(w->r, PANEL) / PANEL, rs = w->rs;
    pack_rows(codes, w->r, stride / 4, w->by_rows);
#pragma omp parallel for schedule(dynamic)
    for (size_t back = 0; back < groups; back++) {
        const size_t first_row = (groups - 1 - back) * PANEL; /* the longest ones first */
        const size_t rows = w->r - first_row < PANEL ? w->r - first_row : PANEL;
        int32_t *out = w->product + first_row * rs;
        product(codes + first_row * stride, stride, rows, w->by_rows, first_row / PANEL + 1, stride / 4, out, rs);
        for (size_t i = 0; i < PANEL; i += LANES)
            for (size_t j = 0; j < first_row; j += LANES) {
                __m512i v[LANES];
                for (size_t k = 0; k < LANES; k++)
                    v[k] = i + k < rows ? _mm512_loadu_si512(out + (i + k) * rs + j) : _mm512_setzero_si512();
                transpose(v);
                for (size_t k = 0; k < LANES; k++)
                    _mm512_storeu_si512(w->product + (j + k) * rs + first_row + i, v[k]);
            }
    }
}

/* Codes and scale of a row of n floats; its room is zero. */
INLINE void row_codes(const float *x, size_t n, __m512 largest, int8_t *codes, float *scale) {
    float absmax = _mm512_reduce_max_ps(largest);
    absmax = absmax < MIN_GRADIENT ? MIN_GRADIENT : absmax;
    const __m512 inverse = _mm512_set1_ps(LEVELS / absmax);
    *scale = absmax * INVERSE_LEVELS;
    for (size_t j = 0; j < n; j += LANES) {
        const __m512i code = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x + j), inverse));
        _mm_storeu_si128((__m128i *)(codes + j), _mm512_cvtsepi32_epi8(code));
    }
}

/* x = keep · x + product · step; if there are codes, also those and their scale. Returns Σ x². */
INLINE float x_row(float *x, const int32_t *product, float keep, float step, size_t n, int8_t *codes, float *scale) {
    __m512 largest = _mm512_setzero_ps(), squares = _mm512_setzero_ps();
    for (size_t j = 0; j < n; j += LANES) {
        __m512 v = _mm512_loadu_ps(x + j);
        if (product != NULL) {
            const __m512 sum = _mm512_cvtepi32_ps(_mm512_loadu_si512(product + j));
            v = _mm512_fmadd_ps(v, _mm512_set1_ps(keep), _mm512_mul_ps(sum, _mm512_set1_ps(step)));
            _mm512_storeu_ps(x + j, v);
        }
        largest = _mm512_max_ps(largest, _mm512_abs_ps(v));
        squares = _mm512_fmadd_ps(v, v, squares);
    }
    if (codes != NULL) row_codes(x, n, largest, codes, scale);
    return _mm512_reduce_add_ps(squares);
}

/* The row i of G from the product of codes, without its diagonal: floats, codes, scale, and Σ of squares. */
INLINE void gram_row(const struct work *w, size_t i) {
    float *gram = w->gram + i * w->rs;
    const int32_t *sums = w->product + i * w->rs;
    const __m512 own = _mm512_set1_ps(w->scale[i]);
    for (size_t j = 0; j < w->r; j += LANES) {
        const __m512 scale = _mm512_mul_ps(_mm512_loadu_ps(w->scale + j), own);
        _mm512_storeu_ps(gram + j, _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_loadu_si512(sums + j)), scale));
    }
    gram[i] = 0;
    w->squares[i] = x_row(gram, NULL, 0, 0, w->r, w->gram_codes + i * w->rs, w->gram_scale + i);
}

/* The row i of b G + c G² without its diagonal, times the scales of X by column: codes and scale. */
INLINE void polynomial_row(const struct work *w, size_t i, float b, float c) {
    float *gram = w->gram + i * w->rs;
    const int32_t *square = w->product + i * w->rs;
    const __m512 of_square = _mm512_set1_ps(c * w->gram_scale[i]), weight = _mm512_set1_ps(c);
    const __m512 own = _mm512_set1_ps(b + c * w->diagonal[i]);
    __m512 largest = _mm512_setzero_ps();
    for (size_t j = 0; j < w->r; j += LANES) {
        const __m512 linear = _mm512_fmadd_ps(_mm512_loadu_ps(w->diagonal + j), weight, own);
        const __m512 scale = _mm512_mul_ps(_mm512_loadu_ps(w->gram_scale + j), of_square);
        __m512 v = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_loadu_si512(square + j)), scale);
        v = _mm512_mul_ps(_mm512_fmadd_ps(linear, _mm512_loadu_ps(gram + j), v), _mm512_loadu_ps(w->scale + j));
        if (j == i / LANES * LANES) v = _mm512_maskz_mov_ps((__mmask16)~(1u << i % LANES), v);
        _mm512_storeu_ps(gram + j, v);
        largest = _mm512_max_ps(largest, _mm512_abs_ps(v));
    }
    row_codes(gram, w->r, largest, w->gram_codes + i * w->rs, w->step + i);
}

/* m = lerp(m, g, 1 − β); returns lerp(g, m, β) or m: as torch computes them. */
INLINE __m512 moved(float *m, __m512 g, const struct rule *rule, __mmask16 mask) {
    const float added = rule->added;
    const __m512 old = _mm512_maskz_loadu_ps(mask, m), change = _mm512_sub_ps(g, old);
    const __m512 now = added < 0.5f ? _mm512_fmadd_ps(_mm512_set1_ps(added), change, old)
                                    : _mm512_fmadd_ps(_mm512_set1_ps(added - 1), change, g);
    _mm512_mask_storeu_ps(m, mask, now);
    if (!rule->nesterov) return now;
    const __m512 back = _mm512_sub_ps(now, g);
    return rule->momentum < 0.5f ? _mm512_fmadd_ps(_mm512_set1_ps(rule->momentum), back, g)
                                 : _mm512_fmadd_ps(_mm512_set1_ps(rule->momentum - 1), back, now);
}

INLINE void new_weights(float *weight, __m512 x, const struct rule *rule, __mmask16 mask) {
    const __m512 kept = _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, weight), _mm512_set1_ps(rule->decay));
    _mm512_mask_storeu_ps(weight, mask, _mm512_fmadd_ps(x, _mm512_set1_ps(rule->rate), kept));
}

/* New momentum, and X from it, transposed where the weights [c, r] are taller than wide. */
AVX512 static void start(const struct work *w, const float *gradient, float *momentum, int tall,
                         const struct rule *rule) {
    const size_t r = w->r, c = w->c;
    if (w->cs != c)
        for (size_t i = 0; i < r; i++) memset(w->x + i * w->cs + c, 0, (w->cs - c) * 4);
    if (!tall) {
#pragma omp parallel for schedule(static)
        for (size_t i = 0; i < r; i++)
            for (size_t j = 0; j < c; j += LANES) {
                const __mmask16 mask = first(c - j);
                const __m512 g = _mm512_maskz_loadu_ps(mask, gradient + i * c + j);
                _mm512_mask_storeu_ps(w->x + i * w->cs + j, mask, moved(momentum + i * c + j, g, rule, mask));
            }
        return;
    }
#pragma omp parallel for schedule(static)
    for (size_t j = 0; j < c; j += LANES)
        for (size_t i = 0; i < r; i += LANES) {
            const __mmask16 mask = first(r - i);
            __m512i v[LANES];
            for (size_t k = 0; k < LANES; k++) {
                const size_t place = (j + k) * r + i;
                const int inside = j + k < c;
                const __m512 g = inside ? _mm512_maskz_loadu_ps(mask, gradient + place) : _mm512_setzero_ps();
                v[k] = inside ? _mm512_castps_si512(moved(momentum + place, g, rule, mask)) : _mm512_setzero_si512();
            }
            transpose(v);
            for (size_t k = 0; k < LANES && i + k < r; k++)
                _mm512_mask_storeu_epi32(w->x + (i + k) * w->cs + j, first(c - j), v[k]);
        }
}

/* Some rows of X into the weights. */
AVX512 static void finish(const struct work *w, size_t from, size_t rows, float *weight, int tall,
                          const struct rule *rule) {
    const size_t r = w->r, c = w->c;
    if (!tall) {
        for (size_t i = from; i < from + rows; i++)
            for (size_t j = 0; j < c; j += LANES)
                new_weights(weight + i * c + j, _mm512_loadu_ps(w->x + i * w->cs + j), rule, first(c - j));
        return;
    }
    for (size_t j = 0; j < c; j += LANES)
        for (size_t i = from; i < from + rows; i += LANES) {
            __m512i v[LANES];
            for (size_t k = 0; k < LANES; k++)
                v[k] = i + k < r ? _mm512_loadu_si512(w->x + (i + k) * w->cs + j) : _mm512_setzero_si512();
            transpose(v);
            for (size_t k = 0; k < LANES && j + k < c; k++)
                new_weights(weight + (j + k) * r + i, _mm512_castsi512_ps(v[k]), rule, first(from + rows - i));
        }
}

/* Codes of X, and 1 / max(‖X‖, TINY_NORM) / limit, by which `scale` and `diagonal` are those of the normalised X. */
AVX512 static float normalised(const struct work *w, float limit) {
    double sum = 0;
#pragma omp parallel for schedule(static)
    for (size_t i = 0; i < w->r; i++)
        w->diagonal[i] = x_row(w->x + i * w->cs, NULL, 0, 0, w->cs, w->codes + i * w->cs, w->scale + i);
    for (size_t i = 0; i < w->r; i++) sum += (double)w->diagonal[i];
    const float norm = (float)sqrt(sum), inverse = 1 / ((norm < TINY_NORM ? TINY_NORM : norm) * limit);
    for (size_t i = 0; i < w->r; i++) {
        w->scale[i] *= inverse;
        w->diagonal[i] *= inverse * inverse;
    }
    return inverse;
}

/* 1 / ‖G‖^½, a bound of what X can be multiplied by while no singular value exceeds 1. */
static float room(const struct work *w) {
    double sum = 0;
    for (size_t i = 0; i < w->r; i++) sum += (double)w->diagonal[i] * (double)w->diagonal[i] + (double)w->squares[i];
    return sum > 0 ? (float)(1 / sqrt(sqrt(sum))) : 1;
}

/* One matrix: gradient, momentum and weight [c, r] if tall, else [r, c]. */
AVX512 static void one(const struct work *w, const float *gradient, float *momentum, float *weight, int tall,
                       const struct rule *rule) {
    const size_t r = w->r, rs = w->rs, cs = w->cs;
    memset(w->scale, 0, (size_t)((uint8_t *)w->codes - (uint8_t *)w->scale)); /* the rooms of all vectors */
    for (size_t i = 0; rs != r && i < r; i++) memset(w->gram_codes + i * rs + r, 0, rs - r);
    start(w, gradient, momentum, tall, rule);
    float factor = normalised(w, rule->limit);
    for (size_t k = 0; k < rule->steps; k++) {
        float a = rule->coefficients[3 * k], b = rule->coefficients[3 * k + 1], c = rule->coefficients[3 * k + 2];
        const int last = k + 1 == rule->steps;
        own_product(w, w->codes, cs);
#pragma omp parallel for schedule(static)
        for (size_t i = 0; i < r; i++) gram_row(w, i);
        if (k == 0 && rule->tighten) {
            const float t = room(w);
            a *= t, b *= t * t * t, c *= t * t * t * t * t;
        }
        own_product(w, w->gram_codes, rs);
#pragma omp parallel for schedule(static)
        for (size_t i = 0; i < r; i++) polynomial_row(w, i, b, c);
        pack_columns(w->codes, r, cs, w->by_columns);
#pragma omp parallel for schedule(static)
        for (size_t from = 0; from < r; from += PANEL) {
            const size_t rows = r - from < PANEL ? r - from : PANEL;
            int32_t *tile = w->tiles + (size_t)omp_get_thread_num() * PANEL * cs;
            product(w->gram_codes + from * rs, rs, rows, w->by_columns, cs / PANEL, up(r, 4) / 4, tile, cs);
            for (size_t i = from; i < from + rows; i++) {
                const float d = w->diagonal[i], keep = (a + b * d + c * (d * d + w->squares[i])) * factor;
                w->diagonal[i] = x_row(w->x + i * cs, tile + (i - from) * cs, keep, w->step[i], cs,
                                       last ? NULL : w->codes + i * cs, w->scale + i);
            }
            if (last) finish(w, from, rows, weight, tall, rule);
        }
        factor = 1;
    }
}

static int all(void *const *matrices, size_t count, size_t rows, size_t columns, const struct rule *rule) {
    const int tall = rows > columns;
    const size_t r = tall ? columns : rows, c = tall ? rows : columns, threads = (size_t)omp_get_max_threads();
    const int alone = rows * columns <= SMALL && (count % threads == 0 || count > 2 * threads);
    int failed = 0;
    size_t bytes;
    placed(NULL, r, c, alone ? 1 : threads, &bytes);
    if (!alone) {
        uint8_t *memory = scratch(bytes);
        const struct work w = placed(memory, r, c, threads, &bytes);
        for (size_t i = 0; memory != NULL && i < count; i++)
            one(&w, matrices[3 * i], matrices[3 * i + 1], matrices[3 * i + 2], tall, rule);
        return memory == NULL ? -1 : 0;
    }
#pragma omp parallel
    {
        uint8_t *memory = scratch(bytes);
        if (memory == NULL) {
#pragma omp atomic write
            failed = -1;
        }
#pragma omp barrier
        const struct work w = placed(memory, r, c, 1, &(size_t){0});
#pragma omp for schedule(dynamic)
        for (size_t i = 0; i < count; i++)
            if (!failed) one(&w, matrices[3 * i], matrices[3 * i + 1], matrices[3 * i + 2], tall, rule);
    }
    return failed;
}
#endif

/* matrices: pointers to gradient, momentum and weight of each, float [rows, columns]; coefficients: (a, b, c) of each
 * iteration. added: 1 - momentum. limit: what X is divided by besides its norm; tighten: also by the root of the norm
 * of X Xᵀ. Weights become decay · w + rate · X. Returns 0, or with nothing changed -1: no memory, -2: no VNNI. */
int nk_muon(void *const *matrices, size_t count, size_t rows, size_t columns, float momentum, float added, int nesterov,
            const float *coefficients, size_t steps, float limit, int tighten, float decay, float rate) {
#if defined(__x86_64__)
    if (strcmp(kernels->name, "avx512") == 0) {
        const struct rule rule = {momentum, added, decay, rate, limit, nesterov, tighten, coefficients, steps};
        return all(matrices, count, rows, columns, &rule);
    }
#endif
    return UNSUPPORTED;
}
