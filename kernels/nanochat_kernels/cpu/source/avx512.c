/* The products with AVX-512 VNNI: `dpbusd` multiplies and adds four bytes into 32 bits, with no 16-bit step between.
 *
 * Everything else is the AVX2 form, even the product of one token with one scale per row, which waits for memory either
 * way. A block of 128 weights is two registers of 64: planes 0 and 1, planes 2 and 3.
 */
#if defined(__x86_64__)
#include <immintrin.h>

#include "kernels.h"
#include "loops.h"

#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")))
#define INLINE static inline __attribute__((always_inline, target("avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")))

#define PREFETCH_BYTES 2048
#define PREFETCH_ROWS 2

struct halves {
    __m512i low, high;
};

INLINE struct halves unpack_block(const uint8_t *packed) {
    const __m512i v = _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *)packed)), mask = _mm512_set1_epi8(3);
    const __m512i low = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(2), 1);
    const __m512i high = _mm512_inserti64x4(_mm512_set1_epi16(4), _mm256_set1_epi16(6), 1);
    return (struct halves){_mm512_and_si512(_mm512_srlv_epi16(v, low), mask),
                           _mm512_and_si512(_mm512_srlv_epi16(v, high), mask)};
}

INLINE __m512i multiply(__m512i sum, __m512i biased, const int8_t *codes) {
    return _mm512_dpbusd_epi32(sum, biased, _mm512_loadu_si512(codes));
}

/* float(Σ w a) in 16 lanes; the sum of the activations is subtracted in lane 0. */
INLINE __m512 to_float(__m512i dots, int32_t sum) {
    return _mm512_cvtepi32_ps(_mm512_sub_epi32(dots, _mm512_zextsi128_si512(_mm_cvtsi32_si128(sum))));
}

/* Σ_g scale_g · float(Σ w a) of one row for `tokens` tokens, whose blocks of codes are `stride` apart. */
INLINE void grouped(const uint8_t *row, const float *s, size_t k, size_t group, const int8_t *codes, size_t stride,
                    const int32_t *sums, size_t sums_stride, int tokens, float *out) {
    const size_t planes = group / PLANE;
    __m512 total[TOKEN_BLOCK];
#pragma GCC unroll 8
    for (int t = 0; t < tokens; t++) total[t] = _mm512_setzero_ps();
    if (planes == 0) {
        for (size_t b = 0; b < k / PLANE; b++) {
            _mm_prefetch((const char *)(row + b * PLANE_BYTES + PREFETCH_BYTES), _MM_HINT_T0);
            const struct halves w = unpack_block(row + b * PLANE_BYTES);
            const __m512 s0 = _mm512_set1_ps(s[2 * b]), s1 = _mm512_set1_ps(s[2 * b + 1]), zero = _mm512_setzero_ps();
#pragma GCC unroll 8
            for (int t = 0; t < tokens; t++) {
                const int8_t *a = codes + b * stride + (size_t)t * PLANE;
                const int32_t *sum = sums + (size_t)t * sums_stride + 2 * b;
                const __m512i none = _mm512_castps_si512(zero);
                total[t] = _mm512_fmadd_ps(to_float(multiply(none, w.low, a), sum[0]), s0, total[t]);
                total[t] = _mm512_fmadd_ps(to_float(multiply(none, w.high, a + 64), sum[1]), s1, total[t]);
            }
        }
    } else {
        for (size_t g = 0; g < k / group; g++) {
            __m512i dots[TOKEN_BLOCK];
#pragma GCC unroll 8
            for (int t = 0; t < tokens; t++) dots[t] = _mm512_setzero_si512();
            for (size_t b = g * planes; b < (g + 1) * planes; b++) {
                _mm_prefetch((const char *)(row + b * PLANE_BYTES + PREFETCH_BYTES), _MM_HINT_T0);
                const struct halves w = unpack_block(row + b * PLANE_BYTES);
#pragma GCC unroll 8
                for (int t = 0; t < tokens; t++) {
                    const int8_t *a = codes + b * stride + (size_t)t * PLANE;
                    dots[t] = multiply(multiply(dots[t], w.low, a), w.high, a + 64);
                }
            }
            const __m512 scale = _mm512_set1_ps(s[g]);
#pragma GCC unroll 8
            for (int t = 0; t < tokens; t++)
                total[t] = _mm512_fmadd_ps(to_float(dots[t], sums[(size_t)t * sums_stride + g]), scale, total[t]);
        }
    }
#pragma GCC unroll 8
    for (int t = 0; t < tokens; t++) out[t] = _mm512_reduce_add_ps(total[t]);
}

AVX512 static void dots_grouped(const uint8_t *packed, const float *scales, size_t rows, size_t k, size_t group,
                                const int8_t *codes, const int32_t *sums, float *out) {
    for (size_t n = 0; n < rows; n++)
        grouped(packed + n * (k / 4), scales + n * (k / group), k, group, codes, PLANE, sums, 0, 1, out + n);
}

AVX512 static void tile_grouped(const uint8_t *packed, const float *scales, size_t rows, size_t k, size_t group,
                                const int8_t *codes, const int32_t *sums, size_t sums_stride, float *out) {
    for (size_t n = 0; n < rows; n++)
        grouped(packed + n * (k / 4), scales + n * (k / group), k, group, codes, TOKEN_BLOCK * PLANE, sums, sums_stride,
                TOKEN_BLOCK, out + n * TOKEN_BLOCK);
}

/* Lane i of the result is the sum of the lanes of v[i]. */
INLINE __m256i sum_each(const __m512i v[TOKEN_BLOCK]) {
    __m256i h[TOKEN_BLOCK];
#pragma GCC unroll 8
    for (int t = 0; t < TOKEN_BLOCK; t++)
        h[t] = _mm256_add_epi32(_mm512_castsi512_si256(v[t]), _mm512_extracti64x4_epi64(v[t], 1));
    const __m256i a = _mm256_hadd_epi32(_mm256_hadd_epi32(h[0], h[1]), _mm256_hadd_epi32(h[2], h[3]));
    const __m256i b = _mm256_hadd_epi32(_mm256_hadd_epi32(h[4], h[5]), _mm256_hadd_epi32(h[6], h[7]));
    return _mm256_add_epi32(_mm256_permute2x128_si256(a, b, 0x20), _mm256_permute2x128_si256(a, b, 0x31));
}

/* Two rows side by side share the loads of the activations, which would limit a single one. */
INLINE void tile_of(const uint8_t *p, size_t stride, int rows, size_t planes, const int8_t *codes, int32_t *out) {
    const int8_t *a = codes;
    __m512i sum[2][TOKEN_BLOCK];
#pragma GCC unroll 2
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
        for (int t = 0; t < TOKEN_BLOCK; t++) sum[r][t] = _mm512_setzero_si512();
    for (size_t b = 0; b < planes; b++, p += PLANE_BYTES, a += TOKEN_BLOCK * PLANE) {
        struct halves w[2];
#pragma GCC unroll 2
        for (int r = 0; r < rows; r++) {
            _mm_prefetch((const char *)(p + (size_t)(r + PREFETCH_ROWS) * stride), _MM_HINT_T0);
            w[r] = unpack_block(p + (size_t)r * stride);
        }
#pragma GCC unroll 8
        for (int t = 0; t < TOKEN_BLOCK; t++) {
            const __m512i low = _mm512_loadu_si512(a + t * PLANE), high = _mm512_loadu_si512(a + t * PLANE + 64);
#pragma GCC unroll 2
            for (int r = 0; r < rows; r++)
                sum[r][t] = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(sum[r][t], w[r].low, low), w[r].high, high);
        }
    }
#pragma GCC unroll 2
    for (int r = 0; r < rows; r++) {
        __m256i *target = (__m256i *)(out + r * TOKEN_BLOCK);
        _mm256_storeu_si256(target, _mm256_add_epi32(_mm256_loadu_si256(target), sum_each(sum[r])));
    }
}

AVX512 static void tile(const uint8_t *packed, size_t stride, size_t rows, size_t planes, const int8_t *codes,
                        int32_t *out) {
    size_t n = 0;
    for (; n + 2 <= rows; n += 2) tile_of(packed + n * stride, stride, 2, planes, codes, out + n * TOKEN_BLOCK);
    for (; n < rows; n++) tile_of(packed + n * stride, stride, 1, planes, codes, out + n * TOKEN_BLOCK);
}

LOOPS(AVX512)

INLINE __m512 power_of_two(__m512 n) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(_mm512_castps_si512(n), _mm512_set1_epi32(127)), 23));
}

#define TARGET AVX512
#define VECTOR __m512
#define LANES 16
#define TILE_ROWS 8
#define TILE_VECTORS 2
#define LOAD(p) _mm512_loadu_ps(p)
#define STORE(p, x) _mm512_storeu_ps(p, x)
#define SPLAT(x) _mm512_set1_ps(x)
#define ADD(a, b) _mm512_add_ps(a, b)
#define SUB(a, b) _mm512_sub_ps(a, b)
#define MUL(a, b) _mm512_mul_ps(a, b)
#define MAX(a, b) _mm512_max_ps(a, b)
#define FMADD(a, b, c) _mm512_fmadd_ps(a, b, c)
#define SUM_LANES(x) _mm512_reduce_add_ps(x)
#define MAX_LANES(x) _mm512_reduce_max_ps(x)
#define POWER_OF_TWO(n) power_of_two(n)
#include "attention.h"

const struct kernels *avx512_kernels(void) {
    static struct kernels k;
    k = avx2_kernels;
    k.name = "avx512";
    k.dots_grouped = dots_grouped;
    k.tile = tile;
    k.tile_grouped = tile_grouped;
    k.gradient_row = gradient_row;
    k.gradient_column = gradient_column;
    k.iterate_row = iterate_row;
    k.gram_row = gram_row;
    k.polynomial_row = polynomial_row;
    k.cross_entropy_row = cross_entropy_row;
    k.attention_panels = attention_panels;
    k.attention_forward = attention_forward;
    k.attention_backward = attention_backward;
    return &k;
}
#endif
