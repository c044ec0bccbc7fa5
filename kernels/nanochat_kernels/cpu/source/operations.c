/* The functions that Python calls: whole matrices, rows shared among OpenMP threads. The caller checks shapes.
 *
 * A call below MIN_PARALLEL_BYTES of work stays on one thread: waking the others costs some microseconds.
 */
#include <omp.h>
#include <stdlib.h>
#include <string.h>

#include "kernels.h"

#define MIN_PARALLEL_BYTES 65536

const struct kernels *kernels = &portable_kernels;

/* The set of that name, if this machine can run it. */
static const struct kernels *available(const char *name) {
    if (strcmp(name, "portable") == 0) return &portable_kernels;
#if defined(__x86_64__)
    __builtin_cpu_init();
    const int avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    if (avx2 && strcmp(name, "avx2") == 0) return &avx2_kernels;
    if (avx2 && strcmp(name, "avx512") == 0 && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni"))
        return avx512_kernels();
#endif
    return NULL;
}

/* Also called when the library is loaded; NULL asks for the best. Returns the name of the set in use from now on, or
 * NULL if this machine lacks the requested one. */
const char *nk_select(const char *name) {
    static const char *const best_first[] = {"avx512", "avx2", "portable"};
    const struct kernels *chosen = name != NULL ? available(name) : NULL;
    for (size_t i = 0; name == NULL && chosen == NULL; i++) chosen = available(best_first[i]);
    if (chosen == NULL) return NULL;
    kernels = chosen;
    return kernels->name;
}

__attribute__((constructor)) static void choose_at_load(void) { nk_select(NULL); }

int nk_threads(void) { return omp_get_max_threads(); }
void nk_set_threads(int n) { omp_set_num_threads(n); }

struct memory {
    void *start;
    size_t size;
};

static void *grown(struct memory *m, size_t bytes) {
    if (bytes > m->size) {
        free(m->start);
        m->size = (bytes + 4095) / 4096 * 4096;
        m->start = aligned_alloc(64, m->size);
        if (m->start == NULL) m->size = 0;
    }
    return m->start;
}

void *scratch(size_t bytes) {
    static _Thread_local struct memory m;
    return grown(&m, bytes);
}

/* x: [m, k]; codes: [m, k]; scale: [m]; sums: [m, k / group]. */
void nk_quantize(const float *x, size_t m, size_t k, size_t group, int8_t *codes, float *scale, int32_t *sums) {
#pragma omp parallel for schedule(static) if (m * k * 4 > MIN_PARALLEL_BYTES && m > 1)
    for (size_t i = 0; i < m; i++)
        kernels->quantize(x + i * k, k, group, codes + i * k, scale + i, sums + i * (k / group));
}

/* nk_quantize after RMSNorm. Returns 0, or -1 without memory. */
int nk_rmsnorm_quantize(const float *x, const float *weight, float eps, size_t m, size_t k, size_t group,
                        int8_t *codes, float *scale, int32_t *sums) {
    int failed = 0;
#pragma omp parallel for schedule(static) if (m * k * 4 > MIN_PARALLEL_BYTES && m > 1)
    for (size_t i = 0; i < m; i++) {
        float *y = scratch(k * sizeof *y);
        if (y == NULL) {
            failed = -1;
            continue;
        }
        kernels->rmsnorm(x + i * k, weight, eps, k, y);
        kernels->quantize(y, k, group, codes + i * k, scale + i, sums + i * (k / group));
    }
    return failed;
}

/* gate, up: [m, k] with rows `stride` apart. Returns 0, or -1 without memory. */
int nk_swiglu_quantize(const float *gate, const float *up, size_t stride, size_t m, size_t k, size_t group,
                       int8_t *codes, float *scale, int32_t *sums) {
    int failed = 0;
#pragma omp parallel for schedule(static) if (m * k * 4 > MIN_PARALLEL_BYTES && m > 1)
    for (size_t i = 0; i < m; i++) {
        float *y = scratch(k * sizeof *y);
        if (y == NULL) {
            failed = -1;
            continue;
        }
        kernels->swiglu(gate + i * stride, up + i * stride, k, y);
        kernels->quantize(y, k, group, codes + i * k, scale + i, sums + i * (k / group));
    }
    return failed;
}

void gemv_rows(const uint8_t *packed, const float *scales, size_t groups, size_t first, size_t last, size_t k,
               const int8_t *codes, float a_scale, const int32_t *sums, float *y) {
    const uint8_t *w = packed + first * (k / 4);
    const float *s = scales + first * groups;
    if (groups > 1) {
        kernels->dots_grouped(w, s, last - first, k, k / groups, codes, sums, y + first);
        for (size_t n = first; n < last; n++) y[n] *= a_scale;
        return;
    }
    int32_t dots[ROW_BLOCK];
    for (size_t n = first; n < last; n += ROW_BLOCK) {
        const size_t rows = last - n < ROW_BLOCK ? last - n : ROW_BLOCK;
        kernels->dots(packed + n * (k / 4), rows, k, codes, sums[0], dots);
        for (size_t r = 0; r < rows; r++) y[n + r] = ((float)dots[r] * a_scale) * scales[n + r];
    }
}

static void gemv(const uint8_t *packed, const float *scales, size_t groups, size_t n, size_t k, const int8_t *codes,
                 float a_scale, const int32_t *sums, float *y) {
#pragma omp parallel if (n * (k / 4) > MIN_PARALLEL_BYTES)
    {
        const size_t threads = (size_t)omp_get_num_threads(), thread = (size_t)omp_get_thread_num();
        gemv_rows(packed, scales, groups, n * thread / threads, n * (thread + 1) / threads, k, codes, a_scale, sums, y);
    }
}

void interleave_block(const int8_t *codes, size_t tokens, size_t k, int8_t *out) {
    for (size_t t = 0; t < TOKEN_BLOCK; t++)
        for (size_t b = 0; b < k / PLANE; b++) {
            int8_t *target = out + (b * TOKEN_BLOCK + t) * PLANE;
            if (t < tokens)
                memcpy(target, codes + t * k + b * PLANE, PLANE);
            else
                memset(target, 0, PLANE);
        }
}

static void interleave(const int8_t *codes, size_t m, size_t k, int8_t *out) {
#pragma omp parallel for schedule(static)
    for (size_t t = 0; t < m; t += TOKEN_BLOCK)
        interleave_block(codes + t * k, m - t < TOKEN_BLOCK ? m - t : TOKEN_BLOCK, k, out + t * k);
}

void multiply_tile(const uint8_t *packed, const float *scales, size_t groups, size_t rows, size_t k,
                   const int8_t *codes, const float *a_scale, const int32_t *sums, size_t tokens, float *y,
                   size_t y_stride) {
    if (groups == 1) {
        int32_t dots[ROW_BLOCK * TOKEN_BLOCK] __attribute__((aligned(64))) = {0};
        int32_t totals[TOKEN_BLOCK] = {0};
        for (size_t t = 0; t < tokens; t++) totals[t] = sums[t];
        for (size_t start = 0; start < k / PLANE; start += K_BLOCK) {
            const size_t planes = k / PLANE - start < K_BLOCK ? k / PLANE - start : K_BLOCK;
            kernels->tile(packed + start * PLANE_BYTES, k / 4, rows, planes, codes + start * PLANE * TOKEN_BLOCK, dots);
        }
        kernels->scale_tile(dots, totals, a_scale, scales, 1, rows, tokens, y, y_stride);
        return;
    }
    float products[ROW_BLOCK * TOKEN_BLOCK] __attribute__((aligned(64)));
    kernels->tile_grouped(packed, scales, rows, k, k / groups, codes, sums, groups, products);
    for (size_t t = 0; t < tokens; t++)
        for (size_t r = 0; r < rows; r++) y[t * y_stride + r] = products[r * TOKEN_BLOCK + t] * a_scale[t];
}

/* codes: [m, k]; a_scale: [m]; sums: [m, groups], one per scale of a row; packed: [n, k / 4]; scales: [n, groups].
 * y: [m, n]. Returns 0, or -1 without memory. */
int nk_ternary_matmul(const int8_t *codes, const float *a_scale, const int32_t *sums, const uint8_t *packed,
                      const float *scales, size_t groups, float *y, size_t m, size_t n, size_t k) {
    if (m <= MAX_VECTOR_TOKENS) {
        for (size_t i = 0; i < m; i++)
            gemv(packed, scales, groups, n, k, codes + i * k, a_scale[i], sums + i * groups, y + i * n);
        return 0;
    }
    const size_t blocks = (m + TOKEN_BLOCK - 1) / TOKEN_BLOCK, row_blocks = (n + ROW_BLOCK - 1) / ROW_BLOCK;
    /* The tile reads the sums of eight tokens even if there are fewer. */
    const size_t sums_bytes = blocks * TOKEN_BLOCK * groups * sizeof *sums;
    int8_t *interleaved = scratch(blocks * TOKEN_BLOCK * k + sums_bytes);
    if (interleaved == NULL) return -1;
    int32_t *padded = (int32_t *)(interleaved + blocks * TOKEN_BLOCK * k);
    memset(padded, 0, sums_bytes);
    memcpy(padded, sums, m * groups * sizeof *sums);
    interleave(codes, m, k, interleaved);
#pragma omp parallel for schedule(static)
    for (size_t rb = 0; rb < row_blocks; rb++) {
        const size_t first = rb * ROW_BLOCK, rows = n - first < ROW_BLOCK ? n - first : ROW_BLOCK;
        for (size_t block = 0; block < blocks; block++) {
            const size_t t = block * TOKEN_BLOCK, tokens = m - t < TOKEN_BLOCK ? m - t : TOKEN_BLOCK;
            multiply_tile(packed + first * (k / 4), scales + first * groups, groups, rows, k, interleaved + t * k,
                          a_scale + t, padded + t * groups, tokens, y + t * n + first, n);
        }
    }
    return 0;
}

/* Activations in float: quantise and multiply in one call. Returns 0, or -1 without memory. */
int nk_linear(const float *x, const uint8_t *packed, const float *scales, size_t groups, float *y, size_t m, size_t n,
              size_t k) {
    static _Thread_local struct memory activations; /* beside `scratch`, which the product uses */
    const size_t codes_bytes = (m * k + 63) / 64 * 64;
    int8_t *codes = grown(&activations, codes_bytes + m * (1 + groups) * 4);
    if (codes == NULL) return -1;
    float *scale = (float *)(codes + codes_bytes);
    int32_t *sums = (int32_t *)(scale + m);
    nk_quantize(x, m, k, k / groups, codes, scale, sums);
    return nk_ternary_matmul(codes, scale, sums, packed, scales, groups, y, m, n, k);
}

/* a: int8 [m, k]; b: int8 [n, k]; y: [m, n] = (float(a · b) · a_scale) · b_scale; b_stride: 0 for a single scale. */
void nk_int8_matmul(const int8_t *a, const int8_t *b, const float *a_scale, const float *b_scale, size_t b_stride,
                    float *y, size_t m, size_t n, size_t k) {
#pragma omp parallel for schedule(static)
    for (size_t j0 = 0; j0 < n; j0 += ROW_BLOCK)
        for (size_t i = 0; i < m; i++)
            for (size_t j = j0; j < n && j < j0 + ROW_BLOCK; j++)
                y[i * n + j] = ((float)kernels->dot_int8(a + i * k, b + j * k, k) * a_scale[i]) * b_scale[j * b_stride];
}

static float f16_scale(double mean) {
    const float value = (float)mean;
    return kernels->round_to_f16(value < MIN_SCALE ? MIN_SCALE : value > MAX_SCALE ? MAX_SCALE : value);
}

/* w: [n, k]. group: inputs per scale, k for one per row, 0 for one for all rows. scales: [n, k / group], or [1] for 0.
 * codes: [n, k] or NULL; packed: [n, k / 4] or NULL. Returns 0, or -1 without memory. */
int nk_ternarize(const float *w, size_t n, size_t k, size_t group, int8_t *codes, uint8_t *packed, float *scales) {
    float shared = 0;
    int failed = 0;
    if (group == 0) {
        double *sums = scratch(n * sizeof *sums), sum = 0;
        if (sums == NULL) return -1;
#pragma omp parallel for schedule(static)
        for (size_t i = 0; i < n; i++) sums[i] = kernels->abs_sum(w + i * k, k);
        for (size_t i = 0; i < n; i++) sum += sums[i];
        shared = scales[0] = f16_scale(sum / ((double)n * (double)k));
    }
    const size_t width = group ? group : k;
#pragma omp parallel for schedule(static)
    for (size_t i = 0; i < n; i++) {
        int8_t *row = codes != NULL ? codes + i * k : scratch(k);
        if (row == NULL) {
            failed = -1;
            continue;
        }
        for (size_t g = 0; g < k / width; g++) {
            const float *piece = w + i * k + g * width;
            float scale = shared;
            if (group) scale = scales[i * (k / width) + g] = f16_scale(kernels->abs_sum(piece, width) / (double)width);
            kernels->codes(piece, width, scale, row + g * width);
        }
        if (packed != NULL) kernels->pack(row, k, packed + i * (k / 4));
    }
    return failed;
}

/* packed: [n, k / 4]; codes: [n, k]. Returns the number of rows with a code 3. */
int nk_unpack(const uint8_t *packed, size_t n, size_t k, int8_t *codes) {
    int invalid = 0;
#pragma omp parallel for schedule(static) reduction(+ : invalid)
    for (size_t i = 0; i < n; i++) invalid += kernels->unpack(packed + i * (k / 4), k, codes + i * k);
    return invalid;
}

/* Reads memory with every thread: the ceiling for the product of a matrix and a vector. */
uint64_t nk_read_sum(const uint64_t *p, size_t bytes) {
    uint64_t total = 0;
#pragma omp parallel reduction(+ : total)
    {
        const size_t threads = (size_t)omp_get_num_threads(), thread = (size_t)omp_get_thread_num();
        const size_t words = bytes / 64 * 8;
        const size_t first = words * thread / threads / 8 * 8, last = words * (thread + 1) / threads / 8 * 8;
        uint64_t s[8] = {0};
        for (size_t i = first; i < last; i += 8) {
            __builtin_prefetch(p + i + 256);
            for (int j = 0; j < 8; j++) s[j] += p[i + (size_t)j];
        }
        for (int j = 0; j < 8; j++) total += s[j];
    }
    return total;
}
