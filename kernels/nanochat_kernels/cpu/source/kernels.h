/* The CPU backend: interface between its files, and what Python calls (names that start with nk_).
 *
 * Layout of weights: plane-128 (see reference/packing.py): 128 inputs of a row are 32 bytes, byte j holds the biased
 * codes w + 1 of inputs j, j + 32, j + 64 and j + 96. K is always a multiple of 128. The biased codes are
 * multiplied, and the sum of the activations is subtracted from the integer result: Σ (w + 1) a − Σ a = Σ w a.
 *
 * Every primitive exists in a portable form and, on x86, in an AVX2 form; the products also with AVX-512 VNNI.
 * `kernels` points at the set that this machine runs, chosen once at load. No file is compiled for a particular
 * machine: the instruction set is a target of each function.
 */
#ifndef NANOCHAT_KERNELS_H
#define NANOCHAT_KERNELS_H

#include <stddef.h>
#include <stdint.h>

#define PLANE 128            /* inputs per block of the packed layout */
#define PLANE_BYTES 32       /* bytes of such a block */
#define TOKEN_BLOCK 8        /* tokens that a tile of the matrix product holds in registers */
#define MAX_VECTOR_TOKENS 3  /* more tokens than this are cheaper as a tile */
#define ROW_BLOCK 64         /* rows of weights that stay in the cache while token blocks pass */
#define K_BLOCK 16           /* planes summed in 16 bits: 16 · 4 · 2 · 2 · 127 = 32512 */

#define MIN_ABSMAX 1e-5f
#define LEVELS 127.0f
#define INVERSE_LEVELS (1.0f / 127.0f)
#define MIN_SCALE 1e-5f
#define MAX_SCALE 65504.0f   /* the largest float16 */
#define MIN_GRADIENT 1e-30f
#define DITHER_COLUMN 0xc13fa9a9u /* 2³² / 1.3247 and its square: the plastic number */
#define DITHER_ROW 0x91e10da5u

#define MAX_PANEL 32         /* rows of a panel of attention, in the widest form */
#define MAX_TILE_ROWS 8      /* queries whose scores are computed together */

/* Keys that a row of scores has room for: full vectors, and full tiles of keys. */
static inline size_t score_width(size_t t) { return (t + 15) / 16 * 16; }

/* From one row of scores to the next: a vector may end behind the row, and rows start at different lines of the cache. */
static inline size_t score_stride(size_t t) { return score_width(t) + 16; }

struct kernels {
    const char *name;
    /* One row of activations: codes, their scale, and the sum of the codes of every `group` inputs. */
    void (*quantize)(const float *x, size_t k, size_t group, int8_t *codes, float *scale, int32_t *sums);
    /* y = x · weight / sqrt(mean(x²) + eps) */
    void (*rmsnorm)(const float *x, const float *weight, float eps, size_t k, float *y);
    /* y = silu(gate) · up */
    void (*swiglu)(const float *gate, const float *up, size_t k, float *y);
    /* Exact Σ w a of `rows` consecutive rows; total = Σ a. */
    void (*dots)(const uint8_t *packed, size_t rows, size_t k, const int8_t *codes, int32_t total, int32_t *out);
    /* Σ_g scale_g · float(Σ_{k in g} w a) of `rows` consecutive rows; group: 64 or a multiple of 128. */
    void (*dots_grouped)(const uint8_t *packed, const float *scales, size_t rows, size_t k, size_t group,
                         const int8_t *codes, const int32_t *sums, float *out);
    /* The same for TOKEN_BLOCK tokens at once: codes interleaved by plane, [K/128][TOKEN_BLOCK][128]. out: [rows][8]. */
    void (*tile)(const uint8_t *packed, size_t stride, size_t rows, size_t planes, const int8_t *codes, int32_t *out);
    void (*tile_grouped)(const uint8_t *packed, const float *scales, size_t rows, size_t k, size_t group,
                         const int8_t *codes, const int32_t *sums, size_t sums_stride, float *out);
    /* y[token][row] = (float(dots[row][token] − totals[token]) · a_scale[token]) · w_scale[row] for a block of rows. */
    void (*scale_tile)(const int32_t *dots, const int32_t *totals, const float *a_scale, const float *w_scale,
                       size_t w_scale_stride, size_t rows, size_t tokens, float *y, size_t y_stride);
    /* Σ |w| in float64, and codes of a row by the scale of each of its groups. */
    double (*abs_sum)(const float *w, size_t k);
    void (*codes)(const float *w, size_t k, float scale, int8_t *codes);
    void (*pack)(const int8_t *codes, size_t k, uint8_t *packed);
    /* Codes of a packed row; returns non-zero if there is a code 3. */
    int (*unpack)(const uint8_t *packed, size_t k, int8_t *codes);
    /* Exact Σ a b of int8 vectors of any length. */
    int32_t (*dot_int8)(const int8_t *a, const int8_t *b, size_t k);
    /* Σ x y; the second operand float32 or float16. */
    float (*dot_f32)(const float *x, const float *y, size_t k);
    float (*dot_f16)(const float *x, const uint16_t *y, size_t k);
    /* dot_f16 of two rows of x, x_row apart, with y: the same bits, and y is converted once. */
    void (*dots_f16)(const float *x, size_t x_row, const uint16_t *y, size_t k, float out[2]);
    /* y += a · x */
    void (*axpy)(float a, const float *x, size_t k, float *y);
    /* float32 to the nearest float16 and back, half to even. */
    float (*round_to_f16)(float x);
    void (*f16_to_f32)(const uint16_t *x, size_t k, float *y);
    /* exp of k values, in place; returns their sum. All values must be at most 0. */
    float (*exp_sum)(float *x, size_t k, float maximum);
    /* Rows of a gradient in int8, and of a matrix that is orthogonalised in int8: loops.h. */
    void (*gradient_row)(const float *x, const float *factor, float weight, size_t n, int8_t *codes, float *scale,
                         int32_t *maxima);
    void (*gradient_column)(const float *x, float weight, const float *inverse, size_t n, int8_t *codes);
    float (*iterate_row)(float *x, const int32_t *product, float keep, float step, size_t n, int8_t *codes,
                         float *scale);
    float (*gram_row)(const int32_t *product, const float *scales, float scale, size_t own, size_t n, float *gram,
                      int8_t *codes, float *code_scale);
    void (*polynomial_row)(float *gram, const int32_t *square, const float *diagonal, const float *gram_scales,
                           const float *scales, float b, float c, size_t own, size_t n, int8_t *codes, float *scale);
    /* A row of logits: its loss, and the gradient in place or as codes. */
    void (*cross_entropy_row)(float *x, size_t n, size_t target, float factor, float *loss, float levels,
                              uint32_t offset, int8_t *codes, float *scale);
    /* One head of causal attention: attention.h. */
    void (*attention_panels)(const float *x, size_t x_row, size_t t, size_t d, float *panels);
    void (*attention_forward)(const float *q, size_t q_row, const float *k, const float *v, size_t t, size_t d,
                              float scale, float *scores, float *y, size_t y_row, float *lse);
    void (*attention_backward)(const float *q, const float *dy, const size_t *positions, size_t rows, const float *k,
                               const float *k_panels, const float *v_panels, const float *lse, size_t t, size_t d,
                               float scale, float *scores, float *slopes, float *dq, size_t dq_row, float *dk,
                               float *dv, float *dq_tile);
};

extern const struct kernels portable_kernels;
#if defined(__x86_64__)
extern const struct kernels avx2_kernels;
const struct kernels *avx512_kernels(void); /* AVX2's, with other products */
#endif
extern const struct kernels *kernels;

/* Memory of the calling thread, which grows and is kept; aligned to 64 bytes; NULL if there is none. */
void *scratch(size_t bytes);

/* Rows of a matrix product for a range of rows and one token; shared by nk_ternary_matmul and the decoder. */
void gemv_rows(const uint8_t *packed, const float *scales, size_t groups, size_t first, size_t last, size_t k,
               const int8_t *codes, float a_scale, const int32_t *sums, float *y);

/* Codes of up to TOKEN_BLOCK tokens [tokens, k] as a tile takes them, [K/128][TOKEN_BLOCK][128]; so eight tokens are
 * never one cache set apart. */
void interleave_block(const int8_t *codes, size_t tokens, size_t k, int8_t *out);

/* Up to ROW_BLOCK rows of weights times such a block. sums: [tokens, groups], or of eight tokens if groups > 1. */
void multiply_tile(const uint8_t *packed, const float *scales, size_t groups, size_t rows, size_t k,
                   const int8_t *codes, const float *a_scale, const int32_t *sums, size_t tokens, float *y,
                   size_t y_stride);

#endif
