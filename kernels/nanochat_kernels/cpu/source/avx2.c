/* Every primitive with AVX2, FMA and F16C (x86-64-v3); the integers are those of the portable form, bit for bit.
 *
 * The product: 32 bytes hold 128 weights; two shifts-and-masks per plane give the biased codes as unsigned bytes,
 * `maddubs` multiplies them with the signed activations and adds neighbours into 16 bits, where 16 planes fit
 * (K_BLOCK) before they are widened. A tile unpacks a weight once for eight tokens.
 */
#if defined(__x86_64__)
#include <immintrin.h>
#include <math.h>

#include "kernels.h"
#include "loops.h"

#define AVX2 __attribute__((target("avx2,fma,f16c")))
#define INLINE static inline __attribute__((always_inline, target("avx2,fma,f16c")))

/* How far ahead of its use memory is prefetched; 1 to 8 kB measured alike (docs/kernels.md). */
#ifndef PREFETCH_BYTES
#define PREFETCH_BYTES 2048
#endif
/* A tile reads pieces of rows, which no hardware prefetcher follows: prefetch those of this many rows ahead. */
#define PREFETCH_ROWS 2

INLINE float sum_f32(__m256 v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
}

INLINE int32_t sum_i32(__m256i v) {
    __m128i s = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
}

INLINE float max_f32(__m256 v) {
    __m128 s = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_max_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_max_ss(s, _mm_shuffle_ps(s, s, 1)));
}

/* --- activations --------------------------------------------------------------------------------------------------- */

INLINE __m256i round_codes(const float *x, __m256 step) {
    return _mm256_cvtps_epi32(_mm256_div_ps(_mm256_loadu_ps(x), step));
}

AVX2 static void quantize(const float *x, size_t k, size_t group, int8_t *codes, float *scale, int32_t *sums) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    __m256 m0 = _mm256_setzero_ps(), m1 = m0, m2 = m0, m3 = m0;
    for (size_t i = 0; i < k; i += 32) {
        m0 = _mm256_max_ps(m0, _mm256_andnot_ps(sign, _mm256_loadu_ps(x + i)));
        m1 = _mm256_max_ps(m1, _mm256_andnot_ps(sign, _mm256_loadu_ps(x + i + 8)));
        m2 = _mm256_max_ps(m2, _mm256_andnot_ps(sign, _mm256_loadu_ps(x + i + 16)));
        m3 = _mm256_max_ps(m3, _mm256_andnot_ps(sign, _mm256_loadu_ps(x + i + 24)));
    }
    const float absmax = max_f32(_mm256_max_ps(_mm256_max_ps(m0, m1), _mm256_max_ps(m2, m3)));
    const float step = (absmax > MIN_ABSMAX ? absmax : MIN_ABSMAX) * INVERSE_LEVELS;
    *scale = step;
    const __m256 steps = _mm256_set1_ps(step);
    const __m256i lowest = _mm256_set1_epi8(-127), order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    const __m256i ones8 = _mm256_set1_epi8(1), ones16 = _mm256_set1_epi16(1);
    for (size_t g = 0; g < k / group; g++) {
        __m256i sum = _mm256_setzero_si256();
        for (size_t i = g * group; i < (g + 1) * group; i += 32) {
            const __m256i low = _mm256_packs_epi32(round_codes(x + i, steps), round_codes(x + i + 8, steps));
            const __m256i high = _mm256_packs_epi32(round_codes(x + i + 16, steps), round_codes(x + i + 24, steps));
            __m256i v = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(low, high), order);
            v = _mm256_max_epi8(v, lowest);
            _mm256_storeu_si256((__m256i *)(codes + i), v);
            sum = _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(ones8, v), ones16));
        }
        sums[g] = sum_i32(sum);
    }
}

AVX2 static void rmsnorm(const float *x, const float *weight, float eps, size_t k, float *y) {
    __m256d s0 = _mm256_setzero_pd(), s1 = s0;
    for (size_t i = 0; i < k; i += 8) {
        const __m256d low = _mm256_cvtps_pd(_mm_loadu_ps(x + i)), high = _mm256_cvtps_pd(_mm_loadu_ps(x + i + 4));
        s0 = _mm256_fmadd_pd(low, low, s0);
        s1 = _mm256_fmadd_pd(high, high, s1);
    }
    double lanes[4];
    _mm256_storeu_pd(lanes, _mm256_add_pd(s0, s1));
    const double sum = (lanes[0] + lanes[1]) + (lanes[2] + lanes[3]);
    const __m256 factor = _mm256_set1_ps(1.0f / sqrtf((float)(sum / (double)k) + eps));
    for (size_t i = 0; i < k; i += 8) {
        const __m256 normed = _mm256_mul_ps(_mm256_loadu_ps(x + i), factor);
        _mm256_storeu_ps(y + i, _mm256_mul_ps(normed, _mm256_loadu_ps(weight + i)));
    }
}

/* exp(x) for x in [-inf, 88]: 2^n · p(r), r = x − n ln 2, a Taylor polynomial of degree 7 on |r| ≤ ln 2 / 2. */
INLINE __m256 exp_ps(__m256 x) {
    x = _mm256_max_ps(_mm256_min_ps(x, _mm256_set1_ps(88.0f)), _mm256_set1_ps(-87.0f));
    const __m256 n = _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(1.44269504088896341f)), 8);
    __m256 r = _mm256_fnmadd_ps(n, _mm256_set1_ps(0.693359375f), x);
    r = _mm256_fnmadd_ps(n, _mm256_set1_ps(-2.12194440e-4f), r);
    __m256 p = _mm256_set1_ps(1.0f / 5040);
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f / 720));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f / 120));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f / 24));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f / 6));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(0.5f));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f));
    const __m256i exponent = _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23);
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), exponent));
}

AVX2 static void swiglu(const float *gate, const float *up, size_t k, float *y) {
    const __m256 one = _mm256_set1_ps(1.0f), sign = _mm256_set1_ps(-0.0f);
    for (size_t i = 0; i < k; i += 8) {
        const __m256 g = _mm256_loadu_ps(gate + i);
        const __m256 silu = _mm256_div_ps(g, _mm256_add_ps(one, exp_ps(_mm256_xor_ps(g, sign))));
        _mm256_storeu_ps(y + i, _mm256_mul_ps(silu, _mm256_loadu_ps(up + i)));
    }
}

/* --- products with packed weights ---------------------------------------------------------------------------------- */

struct planes {
    __m256i p0, p1, p2, p3;
};

INLINE struct planes unpack_block(const uint8_t *packed) {
    const __m256i mask = _mm256_set1_epi8(3), v = _mm256_loadu_si256((const __m256i *)packed);
    return (struct planes){_mm256_and_si256(v, mask), _mm256_and_si256(_mm256_srli_epi16(v, 2), mask),
                           _mm256_and_si256(_mm256_srli_epi16(v, 4), mask),
                           _mm256_and_si256(_mm256_srli_epi16(v, 6), mask)};
}

INLINE __m256i multiply(__m256i biased, const int8_t *codes) {
    return _mm256_maddubs_epi16(biased, _mm256_loadu_si256((const __m256i *)codes));
}

INLINE __m256i multiply_block(struct planes w, const int8_t *codes) {
    return _mm256_add_epi16(_mm256_add_epi16(multiply(w.p0, codes), multiply(w.p1, codes + 32)),
                            _mm256_add_epi16(multiply(w.p2, codes + 64), multiply(w.p3, codes + 96)));
}

/* One row after the other: the rows lie end to end, and one stream of reads reaches the bandwidth of the memory; two or
 * four rows side by side, which share the loads of the activations, are slower (docs/kernels.md). */
AVX2 static void dots(const uint8_t *packed, size_t rows, size_t k, const int8_t *codes, int32_t total, int32_t *out) {
    const __m256i ones = _mm256_set1_epi16(1);
    const size_t planes = k / PLANE;
    const uint8_t *p = packed;
    for (size_t n = 0; n < rows; n++) {
        __m256i wide = _mm256_setzero_si256();
        for (size_t start = 0; start < planes; start += K_BLOCK) {
            const size_t end = start + K_BLOCK < planes ? start + K_BLOCK : planes;
            __m256i narrow = _mm256_setzero_si256();
            for (size_t b = start; b < end; b++, p += PLANE_BYTES) {
                _mm_prefetch((const char *)(p + PREFETCH_BYTES), _MM_HINT_T0);
                narrow = _mm256_add_epi16(narrow, multiply_block(unpack_block(p), codes + b * PLANE));
            }
            wide = _mm256_add_epi32(wide, _mm256_madd_epi16(narrow, ones));
        }
        out[n] = sum_i32(wide) - total;
    }
}

/* float(Σ w a) of one plane block in 8 lanes; the sum of the activations is subtracted in lane 0. */
INLINE __m256 widen(__m256i narrow, const int32_t *sum) {
    const __m256i wide = _mm256_madd_epi16(narrow, _mm256_set1_epi16(1));
    return _mm256_cvtepi32_ps(_mm256_sub_epi32(wide, _mm256_zextsi128_si256(_mm_cvtsi32_si128(*sum))));
}

AVX2 static void dots_grouped(const uint8_t *packed, const float *scales, size_t rows, size_t k, size_t group,
                              const int8_t *codes, const int32_t *sums, float *out) {
    const size_t groups = k / group;
    for (size_t n = 0; n < rows; n++) {
        const uint8_t *row = packed + n * (k / 4);
        const float *s = scales + n * groups;
        __m256 total = _mm256_setzero_ps();
        if (group == PLANE / 2) {
            for (size_t b = 0; b < k / PLANE; b++) {
                const int8_t *a = codes + b * PLANE;
                _mm_prefetch((const char *)(row + b * PLANE_BYTES + PREFETCH_BYTES), _MM_HINT_T0);
                const struct planes w = unpack_block(row + b * PLANE_BYTES);
                const __m256i low = _mm256_add_epi16(multiply(w.p0, a), multiply(w.p1, a + 32));
                const __m256i high = _mm256_add_epi16(multiply(w.p2, a + 64), multiply(w.p3, a + 96));
                total = _mm256_fmadd_ps(widen(low, sums + 2 * b), _mm256_broadcast_ss(s + 2 * b), total);
                total = _mm256_fmadd_ps(widen(high, sums + 2 * b + 1), _mm256_broadcast_ss(s + 2 * b + 1), total);
            }
        } else {
            const size_t planes = group / PLANE;
            for (size_t g = 0; g < groups; g++) {
                /* Groups longer than K_BLOCK planes are summed piece by piece; only the first subtracts Σ a. */
                for (size_t start = 0; start < planes; start += K_BLOCK) {
                    const size_t end = start + K_BLOCK < planes ? start + K_BLOCK : planes;
                    __m256i narrow = _mm256_setzero_si256();
                    for (size_t b = g * planes + start; b < g * planes + end; b++) {
                        _mm_prefetch((const char *)(row + b * PLANE_BYTES + PREFETCH_BYTES), _MM_HINT_T0);
                        narrow = _mm256_add_epi16(
                            narrow, multiply_block(unpack_block(row + b * PLANE_BYTES), codes + b * PLANE));
                    }
                    const int32_t zero = 0;
                    total = _mm256_fmadd_ps(widen(narrow, start ? &zero : sums + g), _mm256_broadcast_ss(s + g), total);
                }
            }
        }
        out[n] = sum_f32(total);
    }
}

/* Eight vectors of 8 lanes to one: lane i is the sum of the lanes of v[i]. */
INLINE __m256i sum_each(const __m256i v[8]) {
    const __m256i a = _mm256_hadd_epi32(_mm256_hadd_epi32(v[0], v[1]), _mm256_hadd_epi32(v[2], v[3]));
    const __m256i b = _mm256_hadd_epi32(_mm256_hadd_epi32(v[4], v[5]), _mm256_hadd_epi32(v[6], v[7]));
    return _mm256_add_epi32(_mm256_permute2x128_si256(a, b, 0x20), _mm256_permute2x128_si256(a, b, 0x31));
}

INLINE __m256 sum_each_f32(const __m256 v[8]) {
    const __m256 a = _mm256_hadd_ps(_mm256_hadd_ps(v[0], v[1]), _mm256_hadd_ps(v[2], v[3]));
    const __m256 b = _mm256_hadd_ps(_mm256_hadd_ps(v[4], v[5]), _mm256_hadd_ps(v[6], v[7]));
    return _mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
}

AVX2 static void tile(const uint8_t *packed, size_t stride, size_t rows, size_t planes, const int8_t *codes,
                      int32_t *out) {
    const __m256i ones = _mm256_set1_epi16(1);
    for (size_t n = 0; n < rows; n++) {
        const uint8_t *p = packed + n * stride;
        const int8_t *a = codes;
        __m256i sum[TOKEN_BLOCK];
#pragma GCC unroll 8
        for (int t = 0; t < TOKEN_BLOCK; t++) sum[t] = _mm256_setzero_si256();
        for (size_t b = 0; b < planes; b++, p += PLANE_BYTES, a += TOKEN_BLOCK * PLANE) {
            _mm_prefetch((const char *)(p + PREFETCH_ROWS * stride), _MM_HINT_T0);
            const struct planes w = unpack_block(p);
#pragma GCC unroll 8
            for (int t = 0; t < TOKEN_BLOCK; t++)
                sum[t] = _mm256_add_epi16(sum[t], multiply_block(w, a + t * PLANE));
        }
#pragma GCC unroll 8
        for (int t = 0; t < TOKEN_BLOCK; t++) sum[t] = _mm256_madd_epi16(sum[t], ones);
        __m256i *target = (__m256i *)(out + n * TOKEN_BLOCK);
        _mm256_storeu_si256(target, _mm256_add_epi32(_mm256_loadu_si256(target), sum_each(sum)));
    }
}

/* Four tokens at a time: their float sums, their 16-bit sums and the weights fill the registers. */
INLINE void tile_grouped_half(const uint8_t *row, const float *s, size_t k, size_t group, const int8_t *codes,
                              const int32_t *sums, size_t sums_stride, __m256 *total) {
    const size_t groups = k / group;
    __m256 f[4] = {_mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps()};
    if (group == PLANE / 2) {
        for (size_t b = 0; b < k / PLANE; b++) {
            _mm_prefetch((const char *)(row + b * PLANE_BYTES + PREFETCH_BYTES), _MM_HINT_T0);
            const struct planes w = unpack_block(row + b * PLANE_BYTES);
            const __m256 s0 = _mm256_broadcast_ss(s + 2 * b), s1 = _mm256_broadcast_ss(s + 2 * b + 1);
#pragma GCC unroll 4
            for (int t = 0; t < 4; t++) {
                const int8_t *a = codes + (b * TOKEN_BLOCK + (size_t)t) * PLANE;
                const int32_t *sum = sums + (size_t)t * sums_stride + 2 * b;
                f[t] = _mm256_fmadd_ps(widen(_mm256_add_epi16(multiply(w.p0, a), multiply(w.p1, a + 32)), sum), s0, f[t]);
                f[t] = _mm256_fmadd_ps(widen(_mm256_add_epi16(multiply(w.p2, a + 64), multiply(w.p3, a + 96)), sum + 1),
                                       s1, f[t]);
            }
        }
    } else {
        const size_t planes = group / PLANE;
        for (size_t g = 0; g < groups; g++)
            for (size_t start = 0; start < planes; start += K_BLOCK) {
                const size_t end = start + K_BLOCK < planes ? start + K_BLOCK : planes;
                __m256i narrow[4] = {_mm256_setzero_si256(), _mm256_setzero_si256(), _mm256_setzero_si256(),
                                     _mm256_setzero_si256()};
                for (size_t b = g * planes + start; b < g * planes + end; b++) {
                    _mm_prefetch((const char *)(row + b * PLANE_BYTES + PREFETCH_BYTES), _MM_HINT_T0);
                    const struct planes w = unpack_block(row + b * PLANE_BYTES);
#pragma GCC unroll 4
                    for (int t = 0; t < 4; t++)
                        narrow[t] = _mm256_add_epi16(
                            narrow[t], multiply_block(w, codes + (b * TOKEN_BLOCK + (size_t)t) * PLANE));
                }
                const __m256 scale = _mm256_broadcast_ss(s + g);
                const int32_t zero = 0;
#pragma GCC unroll 4
                for (int t = 0; t < 4; t++)
                    f[t] = _mm256_fmadd_ps(widen(narrow[t], start ? &zero : sums + (size_t)t * sums_stride + g), scale,
                                           f[t]);
            }
    }
    for (int t = 0; t < 4; t++) total[t] = f[t];
}

AVX2 static void tile_grouped(const uint8_t *packed, const float *scales, size_t rows, size_t k, size_t group,
                              const int8_t *codes, const int32_t *sums, size_t sums_stride, float *out) {
    for (size_t n = 0; n < rows; n++) {
        const uint8_t *row = packed + n * (k / 4);
        const float *s = scales + n * (k / group);
        __m256 total[TOKEN_BLOCK];
        tile_grouped_half(row, s, k, group, codes, sums, sums_stride, total);
        tile_grouped_half(row, s, k, group, codes + 4 * PLANE, sums + 4 * sums_stride, sums_stride, total + 4);
        _mm256_storeu_ps(out + n * TOKEN_BLOCK, sum_each_f32(total));
    }
}

/* Rows of 8 lanes become columns. */
INLINE void transpose(__m256 v[8]) {
    __m256 t[8], u[8];
    for (int i = 0; i < 8; i += 2) {
        t[i] = _mm256_unpacklo_ps(v[i], v[i + 1]);
        t[i + 1] = _mm256_unpackhi_ps(v[i], v[i + 1]);
    }
    for (int i = 0; i < 8; i += 4)
        for (int j = 0; j < 2; j++) {
            u[i + 2 * j] = _mm256_shuffle_ps(t[i + j], t[i + j + 2], 0x44);
            u[i + 2 * j + 1] = _mm256_shuffle_ps(t[i + j], t[i + j + 2], 0xee);
        }
    for (int i = 0; i < 4; i++) {
        v[i] = _mm256_permute2f128_ps(u[i], u[i + 4], 0x20);
        v[i + 4] = _mm256_permute2f128_ps(u[i], u[i + 4], 0x31);
    }
}

AVX2 static void scale_tile(const int32_t *dots, const int32_t *totals, const float *a_scale, const float *w_scale,
                            size_t w_scale_stride, size_t rows, size_t tokens, float *y, size_t y_stride) {
    size_t n = 0;
    if (w_scale_stride == 1) {
        __m256i total = _mm256_loadu_si256((const __m256i *)totals);
        for (; n + 8 <= rows; n += 8) {
            __m256 v[8];
#pragma GCC unroll 8
            for (int r = 0; r < 8; r++) {
                const __m256i dot = _mm256_loadu_si256((const __m256i *)(dots + (n + (size_t)r) * TOKEN_BLOCK));
                v[r] = _mm256_cvtepi32_ps(_mm256_sub_epi32(dot, total));
            }
            transpose(v);
            const __m256 w = _mm256_loadu_ps(w_scale + n);
            for (size_t t = 0; t < tokens; t++)
                _mm256_storeu_ps(y + t * y_stride + n,
                                 _mm256_mul_ps(_mm256_mul_ps(v[t], _mm256_broadcast_ss(a_scale + t)), w));
        }
    }
    if (n < rows)
        portable_kernels.scale_tile(dots + n * TOKEN_BLOCK, totals, a_scale, w_scale + n * w_scale_stride,
                                    w_scale_stride, rows - n, tokens, y + n, y_stride);
}

/* --- weights ------------------------------------------------------------------------------------------------------- */

AVX2 static double abs_sum(const float *w, size_t k) {
    const __m256d sign = _mm256_set1_pd(-0.0);
    __m256d s0 = _mm256_setzero_pd(), s1 = s0;
    size_t i = 0;
    for (; i + 8 <= k; i += 8) {
        s0 = _mm256_add_pd(s0, _mm256_andnot_pd(sign, _mm256_cvtps_pd(_mm_loadu_ps(w + i))));
        s1 = _mm256_add_pd(s1, _mm256_andnot_pd(sign, _mm256_cvtps_pd(_mm_loadu_ps(w + i + 4))));
    }
    double lanes[4];
    _mm256_storeu_pd(lanes, _mm256_add_pd(s0, s1));
    double sum = (lanes[0] + lanes[1]) + (lanes[2] + lanes[3]);
    for (; i < k; i++) sum += fabs((double)w[i]);
    return sum;
}

/* −1, 0 or 1 per lane as int32: a true comparison is −1. */
INLINE __m256i compare(const float *w, __m256 half, __m256 minus_half) {
    const __m256 v = _mm256_loadu_ps(w);
    return _mm256_sub_epi32(_mm256_castps_si256(_mm256_cmp_ps(v, minus_half, _CMP_LT_OQ)),
                            _mm256_castps_si256(_mm256_cmp_ps(v, half, _CMP_GT_OQ)));
}

AVX2 static void ternary_codes(const float *w, size_t k, float scale, int8_t *codes) {
    const __m256 half = _mm256_set1_ps(0.5f * scale), minus_half = _mm256_set1_ps(-0.5f * scale);
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    size_t i = 0;
    for (; i + 32 <= k; i += 32) {
        const __m256i low = _mm256_packs_epi32(compare(w + i, half, minus_half), compare(w + i + 8, half, minus_half));
        const __m256i high =
            _mm256_packs_epi32(compare(w + i + 16, half, minus_half), compare(w + i + 24, half, minus_half));
        /* compare gives −1 for w < −s/2 and −(−1) for w > s/2. */
        const __m256i v = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(low, high), order);
        _mm256_storeu_si256((__m256i *)(codes + i), v);
    }
    portable_kernels.codes(w + i, k - i, scale, codes + i);
}

AVX2 static void pack(const int8_t *codes, size_t k, uint8_t *packed) {
    const __m256i one = _mm256_set1_epi8(1);
    for (size_t b = 0; b < k / PLANE; b++) {
        const __m256i *c = (const __m256i *)(codes + b * PLANE);
        __m256i v = _mm256_add_epi8(_mm256_loadu_si256(c), one);
        /* Codes are at most 2, so a 16-bit shift moves nothing across a byte. */
        for (int p = 1; p < 4; p++)
            v = _mm256_or_si256(v, _mm256_slli_epi16(_mm256_add_epi8(_mm256_loadu_si256(c + p), one), 2 * p));
        _mm256_storeu_si256((__m256i *)(packed + b * PLANE_BYTES), v);
    }
}

AVX2 static int unpack(const uint8_t *packed, size_t k, int8_t *codes) {
    const __m256i one = _mm256_set1_epi8(1), two = _mm256_set1_epi8(2);
    __m256i invalid = _mm256_setzero_si256();
    for (size_t b = 0; b < k / PLANE; b++) {
        const struct planes w = unpack_block(packed + b * PLANE_BYTES);
        const __m256i planes[4] = {w.p0, w.p1, w.p2, w.p3};
        for (int p = 0; p < 4; p++) {
            invalid = _mm256_or_si256(invalid, _mm256_cmpgt_epi8(planes[p], two));
            _mm256_storeu_si256((__m256i *)(codes + b * PLANE + 32 * p), _mm256_sub_epi8(planes[p], one));
        }
    }
    return !_mm256_testz_si256(invalid, invalid);
}

/* Through 16 bits, where products of any two int8 are exact. */
AVX2 static int32_t dot_int8(const int8_t *a, const int8_t *b, size_t k) {
    __m256i sum = _mm256_setzero_si256();
    size_t i = 0;
    for (; i + 16 <= k; i += 16) {
        const __m256i x = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(a + i)));
        const __m256i y = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(b + i)));
        sum = _mm256_add_epi32(sum, _mm256_madd_epi16(x, y));
    }
    return sum_i32(sum) + portable_kernels.dot_int8(a + i, b + i, k - i);
}

/* --- float vectors of attention and head --------------------------------------------------------------------------- */

AVX2 static float dot_f32(const float *x, const float *y, size_t k) {
    __m256 s0 = _mm256_setzero_ps(), s1 = s0;
    size_t i = 0;
    for (; i + 16 <= k; i += 16) {
        s0 = _mm256_fmadd_ps(_mm256_loadu_ps(x + i), _mm256_loadu_ps(y + i), s0);
        s1 = _mm256_fmadd_ps(_mm256_loadu_ps(x + i + 8), _mm256_loadu_ps(y + i + 8), s1);
    }
    return sum_f32(_mm256_add_ps(s0, s1)) + portable_kernels.dot_f32(x + i, y + i, k - i);
}

AVX2 static float dot_f16(const float *x, const uint16_t *y, size_t k) {
    __m256 s0 = _mm256_setzero_ps(), s1 = s0, s2 = s0, s3 = s0;
    size_t i = 0;
    for (; i + 32 <= k; i += 32) {
        _mm_prefetch((const char *)(y + i) + PREFETCH_BYTES, _MM_HINT_T0);
        const __m128i *h = (const __m128i *)(y + i);
        s0 = _mm256_fmadd_ps(_mm256_loadu_ps(x + i), _mm256_cvtph_ps(_mm_loadu_si128(h)), s0);
        s1 = _mm256_fmadd_ps(_mm256_loadu_ps(x + i + 8), _mm256_cvtph_ps(_mm_loadu_si128(h + 1)), s1);
        s2 = _mm256_fmadd_ps(_mm256_loadu_ps(x + i + 16), _mm256_cvtph_ps(_mm_loadu_si128(h + 2)), s2);
        s3 = _mm256_fmadd_ps(_mm256_loadu_ps(x + i + 24), _mm256_cvtph_ps(_mm_loadu_si128(h + 3)), s3);
    }
    const float sum = sum_f32(_mm256_add_ps(_mm256_add_ps(s0, s1), _mm256_add_ps(s2, s3)));
    return sum + portable_kernels.dot_f16(x + i, y + i, k - i);
}

AVX2 static void dots_f16(const float *x, size_t x_row, const uint16_t *y, size_t k, float out[2]) {
    __m256 s[2][4];
    size_t i = 0;
    for (int t = 0; t < 2; t++)
        for (int j = 0; j < 4; j++) s[t][j] = _mm256_setzero_ps();
    for (; i + 32 <= k; i += 32) {
        _mm_prefetch((const char *)(y + i) + PREFETCH_BYTES, _MM_HINT_T0);
#pragma GCC unroll 4
        for (size_t j = 0; j < 4; j++) {
            const __m256 h = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(y + i) + j));
            s[0][j] = _mm256_fmadd_ps(_mm256_loadu_ps(x + i + 8 * j), h, s[0][j]);
            s[1][j] = _mm256_fmadd_ps(_mm256_loadu_ps(x + x_row + i + 8 * j), h, s[1][j]);
        }
    }
    for (size_t t = 0; t < 2; t++)
        out[t] = sum_f32(_mm256_add_ps(_mm256_add_ps(s[t][0], s[t][1]), _mm256_add_ps(s[t][2], s[t][3]))) +
                 portable_kernels.dot_f16(x + t * x_row + i, y + i, k - i);
}

AVX2 static void axpy(float a, const float *x, size_t k, float *y) {
    const __m256 factor = _mm256_set1_ps(a);
    size_t i = 0;
    for (; i + 8 <= k; i += 8)
        _mm256_storeu_ps(y + i, _mm256_fmadd_ps(factor, _mm256_loadu_ps(x + i), _mm256_loadu_ps(y + i)));
    portable_kernels.axpy(a, x + i, k - i, y + i);
}

AVX2 static float round_to_f16(float x) { return _cvtsh_ss(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT)); }

AVX2 static void f16_to_f32(const uint16_t *x, size_t k, float *y) {
    size_t i = 0;
    for (; i + 8 <= k; i += 8) _mm256_storeu_ps(y + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(x + i))));
    portable_kernels.f16_to_f32(x + i, k - i, y + i);
}

AVX2 static float exp_sum(float *x, size_t k, float maximum) {
    const __m256 top = _mm256_set1_ps(maximum);
    __m256 sum = _mm256_setzero_ps();
    size_t i = 0;
    for (; i + 8 <= k; i += 8) {
        const __m256 e = exp_ps(_mm256_sub_ps(_mm256_loadu_ps(x + i), top));
        _mm256_storeu_ps(x + i, e);
        sum = _mm256_add_ps(sum, e);
    }
    return sum_f32(sum) + portable_kernels.exp_sum(x + i, k - i, maximum);
}

LOOPS(AVX2)

INLINE __m256 power_of_two(__m256 n) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_castps_si256(n), _mm256_set1_epi32(127)), 23));
}

#define TARGET AVX2
#define VECTOR __m256
#define LANES 8
#define TILE_ROWS 4
#define TILE_VECTORS 2
#define LOAD(p) _mm256_loadu_ps(p)
#define STORE(p, x) _mm256_storeu_ps(p, x)
#define SPLAT(x) _mm256_set1_ps(x)
#define ADD(a, b) _mm256_add_ps(a, b)
#define SUB(a, b) _mm256_sub_ps(a, b)
#define MUL(a, b) _mm256_mul_ps(a, b)
#define MAX(a, b) _mm256_max_ps(a, b)
#define FMADD(a, b, c) _mm256_fmadd_ps(a, b, c)
#define SUM_LANES(x) sum_f32(x)
#define MAX_LANES(x) max_f32(x)
#define POWER_OF_TWO(n) power_of_two(n)
#include "attention.h"

const struct kernels avx2_kernels = {
    "avx2",     quantize, rmsnorm,       swiglu, dots,   dots_grouped, tile,    tile_grouped,
    scale_tile, abs_sum,  ternary_codes, pack,   unpack, dot_int8,     dot_f32, dot_f16,
    dots_f16,   axpy,     round_to_f16,  f16_to_f32, exp_sum, LOOP_NAMES,
    ATTENTION_NAMES,
};
#endif
