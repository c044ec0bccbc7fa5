/* Products of int8 codes with AVX-512 VNNI whose second operand is packed once: a part of muon.c.
 *
 * `dpbusd` multiplies unsigned bytes by signed ones, so 128 is added to what is packed, and the starting value of every
 * sum takes it back. The second operand lies in panels of 32 of its columns, four of the elements that are summed next
 * to each other. Rows of codes have room up to the next multiple of 64, which is zero.
 */
#ifndef NANOCHAT_PACKED_PRODUCT_H
#define NANOCHAT_PACKED_PRODUCT_H

#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")))
#define INLINE AVX512 static inline __attribute__((always_inline))
#define PANEL 32             /* columns of a panel, and rows that are computed together */
#define TILE 8               /* rows whose sums are in registers */
#define LANES 16

static size_t up(size_t n, size_t to) { return (n + to - 1) / to * to; }

/* v[i] becomes the lane i of every register. */
INLINE void transpose(__m512i v[LANES]) {
    __m512i t[LANES], u[LANES];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
        t[2 * i] = _mm512_unpacklo_epi32(v[2 * i], v[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_epi32(v[2 * i], v[2 * i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < LANES; i += 4) {
        u[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        u[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        u[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        u[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
        const __m512i a = _mm512_shuffle_i32x4(u[j], u[4 + j], 0x88), c = _mm512_shuffle_i32x4(u[j], u[4 + j], 0xdd);
        const __m512i b = _mm512_shuffle_i32x4(u[8 + j], u[12 + j], 0x88);
        const __m512i d = _mm512_shuffle_i32x4(u[8 + j], u[12 + j], 0xdd);
        v[j] = _mm512_shuffle_i32x4(a, b, 0x88);
        v[4 + j] = _mm512_shuffle_i32x4(c, d, 0x88);
        v[8 + j] = _mm512_shuffle_i32x4(a, b, 0xdd);
        v[12 + j] = _mm512_shuffle_i32x4(c, d, 0xdd);
    }
}

INLINE __mmask16 first(size_t n) { return n >= LANES ? 0xffff : (__mmask16)((1u << n) - 1); }

/* The rows of codes [n, 4 · quads] as columns of panels. */
AVX512 static void pack_rows(const int8_t *codes, size_t n, size_t quads, uint8_t *packed) {
#pragma omp parallel for schedule(static)
    for (size_t i = 0; i < up(n, PANEL); i += LANES)
        for (size_t q = 0; q < quads; q += LANES) {
            __m512i v[LANES];
            for (size_t j = 0; j < LANES; j++)
                v[j] = i + j < n ? _mm512_loadu_si512(codes + (i + j) * 4 * quads + 4 * q) : _mm512_setzero_si512();
            transpose(v);
            uint8_t *to = packed + i / PANEL * PANEL * 4 * quads + i % PANEL * 4 + q * 4 * PANEL;
            for (size_t j = 0; j < LANES; j++)
                _mm512_storeu_si512(to + j * 4 * PANEL, _mm512_xor_si512(v[j], _mm512_set1_epi8(-128)));
        }
}

/* codes [n, stride] in panels of its own columns. */
AVX512 static void pack_columns(const int8_t *codes, size_t n, size_t stride, uint8_t *packed) {
    const size_t quads = up(n, 4) / 4;
#pragma omp parallel for schedule(static)
    for (size_t q = 0; q < quads; q++)
        for (size_t j = 0; j < stride; j += LANES) {
            __m128i v[4];
            for (size_t i = 0; i < 4; i++)
                v[i] = 4 * q + i < n ? _mm_loadu_si128((const __m128i *)(codes + (4 * q + i) * stride + j))
                                     : _mm_setzero_si128();
            for (size_t i = 0; i < 4; i++) v[i] = _mm_xor_si128(v[i], _mm_set1_epi8(-128));
            const __m128i low = _mm_unpacklo_epi8(v[0], v[1]), high = _mm_unpackhi_epi8(v[0], v[1]);
            const __m128i low2 = _mm_unpacklo_epi8(v[2], v[3]), high2 = _mm_unpackhi_epi8(v[2], v[3]);
            __m128i *to = (__m128i *)(packed + j / PANEL * PANEL * 4 * quads + q * 4 * PANEL + j % PANEL * 4);
            _mm_storeu_si128(to, _mm_unpacklo_epi16(low, low2));
            _mm_storeu_si128(to + 1, _mm_unpackhi_epi16(low, low2));
            _mm_storeu_si128(to + 2, _mm_unpacklo_epi16(high, high2));
            _mm_storeu_si128(to + 3, _mm_unpackhi_epi16(high, high2));
        }
}

INLINE void product_tile(const int8_t *a, size_t stride, int rows, const int32_t *start, const uint8_t *panel,
                         size_t quads, int32_t *out, size_t out_stride) {
    __m512i sum[TILE][2];
#pragma GCC unroll 8
    for (int i = 0; i < rows; i++) sum[i][0] = sum[i][1] = _mm512_set1_epi32(start[i]);
    for (size_t q = 0; q < quads; q++, panel += 4 * PANEL) {
        const __m512i left = _mm512_loadu_si512(panel), right = _mm512_loadu_si512(panel + 64);
#pragma GCC unroll 8
        for (int i = 0; i < rows; i++) {
            int32_t four;
            memcpy(&four, a + (size_t)i * stride + 4 * q, sizeof four);
            const __m512i of_row = _mm512_set1_epi32(four);
            sum[i][0] = _mm512_dpbusd_epi32(sum[i][0], left, of_row);
            sum[i][1] = _mm512_dpbusd_epi32(sum[i][1], right, of_row);
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < rows; i++) {
        _mm512_storeu_si512(out + (size_t)i * out_stride, sum[i][0]);
        _mm512_storeu_si512(out + (size_t)i * out_stride + LANES, sum[i][1]);
    }
}

/* Up to PANEL rows of codes a times some packed panels. */
AVX512 static void product(const int8_t *a, size_t stride, size_t rows, const uint8_t *packed, size_t panels,
                           size_t quads, int32_t *out, size_t out_stride) {
    int32_t start[PANEL];
    for (size_t i = 0; i < rows; i++) {
        __m512i sum = _mm512_setzero_si512();
        for (size_t k = 0; k < 4 * quads; k += 64)
            sum = _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(1), _mm512_loadu_si512(a + i * stride + k));
        start[i] = -128 * _mm512_reduce_add_epi32(sum);
    }
    for (size_t p = 0; p < panels; p++) {
        const uint8_t *panel = packed + p * PANEL * 4 * quads;
        int32_t *to = out + p * PANEL;
        size_t i = 0;
        for (; i + TILE <= rows; i += TILE)
            product_tile(a + i * stride, stride, TILE, start + i, panel, quads, to + i * out_stride, out_stride);
        for (; i < rows; i++)
            product_tile(a + i * stride, stride, 1, start + i, panel, quads, to + i * out_stride, out_stride);
    }
}

#endif
