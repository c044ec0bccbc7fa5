/* One token through a whole decoder in one call: embedding, blocks, final norm and head, for one sequence on the CPU.
 *
 * One parallel region for the token; between barriers every thread has its rows of a matrix, or its heads. Every thread
 * computes small things (a norm, the quantisation of one token) for itself, which is cheaper than waiting.
 * The model is nanochat_cli/model's: pre-norm blocks on a plain residual stream, grouped-query attention with
 * half-split RoPE, SwiGLU, optional norms of q and k per head and before the two output projections.
 */
#include <math.h>
#include <omp.h>
#include <string.h>

#include "kernels.h"

struct matrix {
    const uint8_t *packed; /* [rows, columns / 4] */
    const float *scales;   /* [rows, groups] */
    size_t rows, columns, groups;
};

struct layer {
    const float *attention_norm, *ffn_norm;                   /* [dim] */
    const float *q_norm, *k_norm;                             /* [head_dim], or NULL */
    const float *attention_sub_norm, *ffn_sub_norm;           /* [n_heads · head_dim], [hidden], or NULL */
    struct matrix qkv, wo, gate_up, down;                     /* q, k, v and gate, up: stacked rows */
};

struct decoder {
    const struct layer *layers;
    size_t n_layers, dim, n_heads, n_kv_heads, head_dim, hidden, vocab_size, threads;
    float eps;
    int embedding_is_f16, head_is_f16;
    const void *embedding, *head;                             /* [vocab_size, dim], float32 or float16 */
    const float *norm, *cos, *sin;                            /* [dim], [positions, head_dim / 2] */
};

/* Shared by the threads; what follows it in the workspace is one `private` area per thread. */
struct state {
    float *x, *qkv, *attended, *gated;
};

struct private {
    float *values, *projected, *scores, *scale;
    int8_t *codes;
    int32_t *sums;
};

static size_t larger(size_t a, size_t b) { return a > b ? a : b; }
static size_t lines(size_t bytes) { return (bytes + 63) / 64 * 64; }

static size_t widest(const struct decoder *d) {
    return larger(d->dim, larger(d->n_heads * d->head_dim, d->hidden));
}

static size_t shared_bytes(const struct decoder *d) {
    const size_t heads = (d->n_heads + 2 * d->n_kv_heads) * d->head_dim;
    return lines(d->dim * 4) + lines(heads * 4) + lines(d->n_heads * d->head_dim * 4) + lines(d->hidden * 4);
}

static size_t private_bytes(const struct decoder *d, size_t capacity) {
    const size_t w = widest(d), rows = larger(d->dim, 2 * d->hidden);
    return lines(w * 4) + lines(rows * 4) + lines(capacity * 4) + 64 + lines(w) + lines(w / 64 * 4);
}

/* Bytes of the workspace that nk_decode takes, for a cache of `capacity` positions; aligned to 64. */
size_t nk_decoder_workspace(const struct decoder *d, size_t capacity) {
    return shared_bytes(d) + d->threads * private_bytes(d, capacity);
}

static void *take(char **memory, size_t bytes) {
    void *part = *memory;
    *memory += lines(bytes);
    return part;
}

static struct state shared_area(const struct decoder *d, char *memory) {
    struct state s;
    s.x = take(&memory, d->dim * 4);
    s.qkv = take(&memory, (d->n_heads + 2 * d->n_kv_heads) * d->head_dim * 4);
    s.attended = take(&memory, d->n_heads * d->head_dim * 4);
    s.gated = take(&memory, d->hidden * 4);
    return s;
}

static struct private private_area(const struct decoder *d, size_t capacity, size_t thread, char *memory) {
    const size_t w = widest(d);
    struct private p;
    memory += shared_bytes(d) + thread * private_bytes(d, capacity);
    p.values = take(&memory, w * 4);
    p.projected = take(&memory, larger(d->dim, 2 * d->hidden) * 4);
    p.scores = take(&memory, capacity * 4);
    p.scale = take(&memory, 4);
    p.codes = take(&memory, w);
    p.sums = take(&memory, w / 64 * 4);
    return p;
}

/* The range of a thread among n items in units of `unit`. */
struct range {
    size_t first, last;
};

static struct range share(size_t n, size_t unit, size_t thread, size_t threads) {
    const size_t units = (n + unit - 1) / unit;
    const struct range r = {units * thread / threads * unit, units * (thread + 1) / threads * unit};
    return (struct range){r.first < n ? r.first : n, r.last < n ? r.last : n};
}

static void quantize(struct private *p, const float *x, const struct matrix *w) {
    kernels->quantize(x, w->columns, w->columns / w->groups, p->codes, p->scale, p->sums);
}

/* Norm, if there is one, and quantisation for the product with w. */
static void norm_and_quantize(struct private *p, const float *x, const float *norm, float eps, const struct matrix *w) {
    if (norm != NULL) {
        kernels->rmsnorm(x, norm, eps, w->columns, p->values);
        x = p->values;
    }
    quantize(p, x, w);
}

static void multiply(const struct private *p, const struct matrix *w, struct range rows, float *y) {
    gemv_rows(w->packed, w->scales, w->groups, rows.first, rows.last, w->columns, p->codes, *p->scale, p->sums, y);
}

static void add_to_residual(const struct private *p, struct range rows, float *x) {
    for (size_t i = rows.first; i < rows.last; i++) x[i] += p->projected[i];
}

/* Norm and rotation of one head in place: dimension i rotates with i + head_dim / 2. */
static void rotate(const struct decoder *d, float *head, const float *norm, size_t position, float *values) {
    const size_t half = d->head_dim / 2;
    const float *cos = d->cos + position * half, *sin = d->sin + position * half;
    if (norm != NULL) {
        double sum = 0;
        for (size_t i = 0; i < d->head_dim; i++) sum += (double)head[i] * head[i];
        const float factor = 1.0f / sqrtf((float)(sum / (double)d->head_dim) + d->eps);
        for (size_t i = 0; i < d->head_dim; i++) head[i] = (head[i] * factor) * norm[i];
    }
    memcpy(values, head, d->head_dim * sizeof *head);
    for (size_t i = 0; i < half; i++) {
        head[i] = values[i] * cos[i] - values[i + half] * sin[i];
        head[i + half] = values[i + half] * cos[i] + values[i] * sin[i];
    }
}

/* Rotates the heads of q and k of this token; keys and values go to their place in the cache. */
static void rotate_and_store(const struct decoder *d, const struct layer *l, struct private *p, float *qkv, float *keys,
                             float *values, size_t capacity, size_t position, size_t thread, size_t threads) {
    const size_t size = d->head_dim, bytes = size * sizeof *qkv;
    const struct range heads = share(d->n_heads + 2 * d->n_kv_heads, 1, thread, threads);
    for (size_t h = heads.first; h < heads.last; h++) {
        float *head = qkv + h * size;
        if (h < d->n_heads) {
            rotate(d, head, l->q_norm, position, p->values);
        } else if (h < d->n_heads + d->n_kv_heads) {
            rotate(d, head, l->k_norm, position, p->values);
            memcpy(keys + ((h - d->n_heads) * capacity + position) * size, head, bytes);
        } else {
            memcpy(values + ((h - d->n_heads - d->n_kv_heads) * capacity + position) * size, head, bytes);
        }
    }
}

static void attend(const struct decoder *d, const struct private *p, const float *q, const float *keys,
                   const float *values, size_t capacity, size_t position, float *out, size_t thread, size_t threads) {
    const size_t size = d->head_dim, group = d->n_heads / d->n_kv_heads;
    const float scale = 1.0f / sqrtf((float)size);
    const struct range heads = share(d->n_heads, 1, thread, threads);
    for (size_t h = heads.first; h < heads.last; h++) {
        const float *k = keys + h / group * capacity * size, *v = values + h / group * capacity * size;
        float maximum = -INFINITY, *y = out + h * size;
        for (size_t i = 0; i <= position; i++) {
            p->scores[i] = kernels->dot_f32(q + h * size, k + i * size, size) * scale;
            if (p->scores[i] > maximum) maximum = p->scores[i];
        }
        const float inverse = 1.0f / kernels->exp_sum(p->scores, position + 1, maximum);
        memset(y, 0, size * sizeof *y);
        for (size_t i = 0; i <= position; i++) kernels->axpy(p->scores[i] * inverse, v + i * size, size, y);
    }
}

static void embed(const struct decoder *d, size_t token, float *x) {
    if (d->embedding_is_f16)
        kernels->f16_to_f32((const uint16_t *)d->embedding + token * d->dim, d->dim, x);
    else
        memcpy(x, (const float *)d->embedding + token * d->dim, d->dim * sizeof *x);
}

static void unembed(const struct decoder *d, const float *hidden, struct range rows, float *logits) {
    for (size_t n = rows.first; n < rows.last; n++)
        logits[n] = d->head_is_f16
                        ? kernels->dot_f16(hidden, (const uint16_t *)d->head + n * d->dim, d->dim)
                        : kernels->dot_f32(hidden, (const float *)d->head + n * d->dim, d->dim);
}

/* keys, values: [n_layers, n_kv_heads, capacity, head_dim], filled before `position`; this token is written there.
 * hidden: [dim], after the final norm; logits: [vocab_size]. The caller checks token < vocab_size, position < capacity. */
void nk_decode(const struct decoder *d, char *workspace, float *keys, float *values, size_t capacity, size_t token,
               size_t position, float *hidden, float *logits) {
    const struct state s = shared_area(d, workspace);
    const size_t layer_cache = d->n_kv_heads * capacity * d->head_dim;
    embed(d, token, s.x);
#pragma omp parallel num_threads((int)d->threads)
    {
        const size_t threads = (size_t)omp_get_num_threads(), thread = (size_t)omp_get_thread_num();
        struct private p = private_area(d, capacity, thread, workspace);
        const struct range width = share(d->dim, 1, thread, threads);
        for (size_t i = 0; i < d->n_layers; i++) {
            const struct layer *l = d->layers + i;
            float *k = keys + i * layer_cache, *v = values + i * layer_cache;

            norm_and_quantize(&p, s.x, l->attention_norm, d->eps, &l->qkv);
            multiply(&p, &l->qkv, share(l->qkv.rows, 1, thread, threads), s.qkv);
#pragma omp barrier
            rotate_and_store(d, l, &p, s.qkv, k, v, capacity, position, thread, threads);
#pragma omp barrier
            attend(d, &p, s.qkv, k, v, capacity, position, s.attended, thread, threads);
#pragma omp barrier
            norm_and_quantize(&p, s.attended, l->attention_sub_norm, d->eps, &l->wo);
            multiply(&p, &l->wo, width, p.projected);
            add_to_residual(&p, width, s.x);
#pragma omp barrier
            norm_and_quantize(&p, s.x, l->ffn_norm, d->eps, &l->gate_up);
            const struct range gate = share(d->hidden, 8, thread, threads);
            const struct range up = {gate.first + d->hidden, gate.last + d->hidden};
            multiply(&p, &l->gate_up, gate, p.projected);
            multiply(&p, &l->gate_up, up, p.projected);
            kernels->swiglu(p.projected + gate.first, p.projected + up.first, gate.last - gate.first,
                            s.gated + gate.first);
#pragma omp barrier
            norm_and_quantize(&p, s.gated, l->ffn_sub_norm, d->eps, &l->down);
            multiply(&p, &l->down, width, p.projected);
            add_to_residual(&p, width, s.x);
#pragma omp barrier
        }
        kernels->rmsnorm(s.x, d->norm, d->eps, d->dim, p.values);
        if (thread == 0) memcpy(hidden, p.values, d->dim * sizeof *hidden);
        unembed(d, p.values, share(d->vocab_size, 1, thread, threads), logits);
    }
}

/* hidden: [dim] to logits: [vocab_size]. */
void nk_unembed(const struct decoder *d, const float *hidden, float *logits) {
#pragma omp parallel num_threads((int)d->threads)
    unembed(d, hidden,
            share(d->vocab_size, 1, (size_t)omp_get_thread_num(), (size_t)omp_get_num_threads()), logits);
}
