/* Every primitive in plain C: the form for machines without AVX2, and the plain reading of the fast form. */
#include <math.h>
#include <string.h>

#include "kernels.h"
#include "loops.h"

static void quantize(const float *x, size_t k, size_t group, int8_t *codes, float *scale, int32_t *sums) {
    float absmax = MIN_ABSMAX;
    for (size_t i = 0; i < k; i++) absmax = fabsf(x[i]) > absmax ? fabsf(x[i]) : absmax;
    const float step = absmax * INVERSE_LEVELS;
    *scale = step;
    for (size_t g = 0; g < k / group; g++) {
        int32_t sum = 0;
        for (size_t i = g * group; i < (g + 1) * group; i++) {
            float code = rintf(x[i] / step);
            code = code > LEVELS ? LEVELS : code < -LEVELS ? -LEVELS : code;
            codes[i] = (int8_t)code;
            sum += codes[i];
        }
        sums[g] = sum;
    }
}

static void rmsnorm(const float *x, const float *weight, float eps, size_t k, float *y) {
    double sum = 0;
    for (size_t i = 0; i < k; i++) sum += (double)x[i] * x[i];
    const float factor = 1.0f / sqrtf((float)(sum / (double)k) + eps);
    for (size_t i = 0; i < k; i++) y[i] = (x[i] * factor) * weight[i];
}

static void swiglu(const float *gate, const float *up, size_t k, float *y) {
    for (size_t i = 0; i < k; i++) y[i] = gate[i] / (1.0f + expf(-gate[i])) * up[i];
}

/* Σ (w + 1) a over planes `first` to `last` of one block of 128 weights; compilers turn it into vector code. */
static inline int32_t block_dot(const uint8_t *packed, const int8_t *codes, int first, int last) {
    int32_t sum = 0;
    for (int p = first; p < last; p++)
        for (int j = 0; j < PLANE_BYTES; j++) {
            const int16_t biased = packed[j] >> (2 * p) & 3, code = codes[p * PLANE_BYTES + j];
            sum += biased * code;
        }
    return sum;
}

/* Σ (w + 1) a over inputs first to last (multiples of 64) of a row; blocks of codes are `stride` apart. */
static int32_t biased_dot(const uint8_t *row, size_t first, size_t last, const int8_t *codes, size_t stride) {
    int32_t sum = 0;
    for (size_t i = first; i < last;) {
        const size_t block = i / PLANE, end = (block + 1) * PLANE < last ? (block + 1) * PLANE : last;
        sum += block_dot(row + block * PLANE_BYTES, codes + block * stride, (int)(i % PLANE / PLANE_BYTES),
                         (int)((end - block * PLANE) / PLANE_BYTES));
        i = end;
    }
    return sum;
}

static void dots(const uint8_t *packed, size_t rows, size_t k, const int8_t *codes, int32_t total, int32_t *out) {
    for (size_t n = 0; n < rows; n++) out[n] = biased_dot(packed + n * (k / 4), 0, k, codes, PLANE) - total;
}

static float grouped_dot(const uint8_t *row, const float *scales, size_t k, size_t group, const int8_t *codes,
                         size_t stride, const int32_t *sums) {
    float sum = 0;
    for (size_t g = 0; g < k / group; g++)
        sum += scales[g] * (float)(biased_dot(row, g * group, (g + 1) * group, codes, stride) - sums[g]);
    return sum;
}

static void dots_grouped(const uint8_t *packed, const float *scales, size_t rows, size_t k, size_t group,
                         const int8_t *codes, const int32_t *sums, float *out) {
    for (size_t n = 0; n < rows; n++)
        out[n] = grouped_dot(packed + n * (k / 4), scales + n * (k / group), k, group, codes, PLANE, sums);
}

static void tile(const uint8_t *packed, size_t stride, size_t rows, size_t planes, const int8_t *codes, int32_t *out) {
    for (size_t n = 0; n < rows; n++)
        for (size_t t = 0; t < TOKEN_BLOCK; t++)
            out[n * TOKEN_BLOCK + t] +=
                biased_dot(packed + n * stride, 0, planes * PLANE, codes + t * PLANE, TOKEN_BLOCK * PLANE);
}

static void tile_grouped(const uint8_t *packed, const float *scales, size_t rows, size_t k, size_t group,
                         const int8_t *codes, const int32_t *sums, size_t sums_stride, float *out) {
    for (size_t n = 0; n < rows; n++)
        for (size_t t = 0; t < TOKEN_BLOCK; t++)
            out[n * TOKEN_BLOCK + t] = grouped_dot(packed + n * (k / 4), scales + n * (k / group), k, group,
                                                   codes + t * PLANE, TOKEN_BLOCK * PLANE, sums + t * sums_stride);
}

static void scale_tile(const int32_t *dots, const int32_t *totals, const float *a_scale, const float *w_scale,
                       size_t w_scale_stride, size_t rows, size_t tokens, float *y, size_t y_stride) {
    for (size_t t = 0; t < tokens; t++)
        for (size_t n = 0; n < rows; n++)
            y[t * y_stride + n] =
                ((float)(dots[n * TOKEN_BLOCK + t] - totals[t]) * a_scale[t]) * w_scale[n * w_scale_stride];
}

static double abs_sum(const float *w, size_t k) {
    double sum = 0;
    for (size_t i = 0; i < k; i++) sum += fabs((double)w[i]);
    return sum;
}

/* round(w / s) clamped to ±1 is (w > s/2) − (w < −s/2), exactly: a float16 s has 11 significant bits. */
static void ternary_codes(const float *w, size_t k, float scale, int8_t *codes) {
    const float half = 0.5f * scale;
    for (size_t i = 0; i < k; i++) codes[i] = (int8_t)((w[i] > half) - (w[i] < -half));
}

static void pack(const int8_t *codes, size_t k, uint8_t *packed) {
    for (size_t block = 0; block < k / PLANE; block++)
        for (size_t j = 0; j < PLANE_BYTES; j++) {
            const int8_t *c = codes + block * PLANE + j;
            packed[block * PLANE_BYTES + j] =
                (uint8_t)((c[0] + 1) | (c[32] + 1) << 2 | (c[64] + 1) << 4 | (c[96] + 1) << 6);
        }
}

static int unpack(const uint8_t *packed, size_t k, int8_t *codes) {
    int invalid = 0;
    for (size_t i = 0; i < k; i++) {
        const int32_t code = packed[i / PLANE * PLANE_BYTES + i % PLANE_BYTES] >> (2 * (i % PLANE / PLANE_BYTES)) & 3;
        invalid |= code == 3;
        codes[i] = (int8_t)(code - 1);
    }
    return invalid;
}

static int32_t dot_int8(const int8_t *a, const int8_t *b, size_t k) {
    int32_t sum = 0;
    for (size_t i = 0; i < k; i++) sum += (int32_t)a[i] * b[i];
    return sum;
}

static float dot_f32(const float *x, const float *y, size_t k) {
    float sum = 0;
    for (size_t i = 0; i < k; i++) sum += x[i] * y[i];
    return sum;
}

static float from_f16(uint16_t bits) {
    const uint32_t sign = (uint32_t)(bits & 0x8000) << 16, exponent = bits >> 10 & 31, fraction = bits & 1023;
    uint32_t word;
    float value;
    if (exponent == 0) {
        value = (float)fraction * 0x1p-24f;
        return sign ? -value : value;
    }
    word = exponent == 31 ? sign | 0x7f800000 | fraction << 13 : sign | (exponent + 112) << 23 | fraction << 13;
    memcpy(&value, &word, sizeof value);
    return value;
}

static float dot_f16(const float *x, const uint16_t *y, size_t k) {
    float sum = 0;
    for (size_t i = 0; i < k; i++) sum += x[i] * from_f16(y[i]);
    return sum;
}

static void dots_f16(const float *x, size_t x_row, const uint16_t *y, size_t k, float out[2]) {
    for (size_t t = 0; t < 2; t++) out[t] = dot_f16(x + t * x_row, y, k);
}

static void f16_to_f32(const uint16_t *x, size_t k, float *y) {
    for (size_t i = 0; i < k; i++) y[i] = from_f16(x[i]);
}

static void axpy(float a, const float *x, size_t k, float *y) {
    for (size_t i = 0; i < k; i++) y[i] += a * x[i];
}

/* For 2^-14 and above float16 has 11 significant bits, below it steps of 2^-24. */
static float round_to_f16(float x) {
    const float magnitude = fabsf(x);
    int exponent;
    frexpf(magnitude, &exponent);
    const float step = magnitude < 0x1p-14f ? 0x1p-24f : ldexpf(1.0f, exponent - 11);
    return copysignf(rintf(magnitude / step) * step, x);
}

static float exp_sum(float *x, size_t k, float maximum) {
    float sum = 0;
    for (size_t i = 0; i < k; i++) sum += x[i] = expf(x[i] - maximum);
    return sum;
}

LOOPS()

#define INLINE LOOP
#define TARGET
#define VECTOR float
#define LANES 1
#define TILE_ROWS 4
#define TILE_VECTORS 16
#define LOAD(p) (*(p))
#define STORE(p, x) (*(p) = (x))
#define SPLAT(x) (x)
#define ADD(a, b) ((a) + (b))
#define SUB(a, b) ((a) - (b))
#define MUL(a, b) ((a) * (b))
#define MAX(a, b) ((a) > (b) ? (a) : (b))
#define FMADD(a, b, c) ((a) * (b) + (c))
#define SUM_LANES(x) (x)
#define MAX_LANES(x) (x)
#define POWER_OF_TWO(n) power_of_two(n)

LOOP float power_of_two(float n) {
    const int32_t bits = (int32_t)((uint32_t)(bits_of(n) + 127) << 23);
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}
#include "attention.h"

const struct kernels portable_kernels = {
    "portable", quantize,  rmsnorm,  swiglu,  dots,    dots_grouped, tile,         tile_grouped,
    scale_tile, abs_sum,   ternary_codes, pack, unpack, dot_int8,     dot_f32,      dot_f16,
    dots_f16,   axpy,      round_to_f16, f16_to_f32, exp_sum, LOOP_NAMES,
    ATTENTION_NAMES,
};
