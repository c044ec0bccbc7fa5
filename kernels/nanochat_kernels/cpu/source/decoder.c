/* A token of each of a few sequences through a whole decoder in one call: embedding, blocks, final norm and head.
 *
 * One parallel region for the call; between barriers every thread has its rows of a matrix, or its heads. Every thread
 * computes small things (norms, the quantisation of the tokens) for itself, which is cheaper than waiting.
 * Weights are read once for all tokens. Sums of floats run over one token in one order, the same in a product of one
 * token and in a tile, and sums over codes are exact: the bits of a token do not depend on the tokens beside it.
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

/* A sequence of which one token is read. keys, values: [n_kv_heads, capacity, head_dim] of the first layer, filled
 * before `position`; those of the next layer are `layer_stride` floats further. Sequences may share them, if their
 * positions follow each other: then they are one text, of which several tokens are read. */
struct sequence {
    float *keys, *values;
    size_t layer_stride, capacity, token, position;
};

/* Rows of the n tokens, shared by the threads; what follows in the workspace is one `private` area per thread. */
struct state {
    float *x, *qkv, *attended, *gated;
};

/* codes: of one token after the other; tiles: the same, interleaved for a tile. */
struct private {
    float *values, *projected, *scores, *scale;
    int8_t *codes, *tiles;
    int32_t *sums;
};

static size_t larger(size_t a, size_t b) { return a > b ? a : b; }
static size_t lines(size_t bytes) { return (bytes + 63) / 64 * 64; }

static size_t widest(const struct decoder *d) {
    return larger(d->dim, larger(d->n_heads * d->head_dim, d->hidden));
}

static size_t heads_width(const struct decoder *d) { return (d->n_heads + 2 * d->n_kv_heads) * d->head_dim; }
static size_t projected_width(const struct decoder *d) { return larger(d->dim, 2 * d->hidden); }

static size_t shared_bytes(const struct decoder *d, size_t n) {
    return lines(n * d->dim * 4) + lines(n * heads_width(d) * 4) + lines(n * d->n_heads * d->head_dim * 4) +
           lines(n * d->hidden * 4);
}

static size_t private_bytes(const struct decoder *d, size_t capacity, size_t n) {
    const size_t w = widest(d);
    return lines(w * 4) + lines(n * projected_width(d) * 4) + lines(capacity * 4) + 64 + lines(n * w) +
           lines(TOKEN_BLOCK * w) + lines(TOKEN_BLOCK * (w / 64) * 4);
}

/* Bytes of the workspace that nk_decode takes, for n sequences of at most `capacity` positions; aligned to 64. */
size_t nk_decoder_workspace(const struct decoder *d, size_t capacity, size_t n) {
    return shared_bytes(d, n) + d->threads * private_bytes(d, capacity, n);
}

static void *take(char **memory, size_t bytes) {
    void *part = *memory;
    *memory += lines(bytes);
    return part;
}

static struct state shared_area(const struct decoder *d, size_t n, char *memory) {
    struct state s;
    s.x = take(&memory, n * d->dim * 4);
    s.qkv = take(&memory, n * heads_width(d) * 4);
    s.attended = take(&memory, n * d->n_heads * d->head_dim * 4);
    s.gated = take(&memory, n * d->hidden * 4);
    return s;
}

static struct private private_area(const struct decoder *d, size_t capacity, size_t n, size_t thread, char *memory) {
    const size_t w = widest(d);
    struct private p;
    memory += shared_bytes(d, n) + thread * private_bytes(d, capacity, n);
    p.values = take(&memory, w * 4);
    p.projected = take(&memory, n * projected_width(d) * 4);
    p.scores = take(&memory, capacity * 4);
    p.scale = take(&memory, TOKEN_BLOCK * 4);
    p.codes = take(&memory, n * w);
    p.tiles = take(&memory, TOKEN_BLOCK * w);
    p.sums = take(&memory, TOKEN_BLOCK * (w / 64) * 4); /* a tile reads those of eight tokens */
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

/* Norm, if there is one, and quantisation of the n rows of x for the product with w. */
static void norm_and_quantize(struct private *p, const float *x, const float *norm, float eps, const struct matrix *w,
                              size_t n) {
    const size_t k = w->columns;
    for (size_t t = 0; t < n; t++) {
        const float *row = x + t * k;
        if (norm != NULL) {
            kernels->rmsnorm(row, norm, eps, k, p->values);
            row = p->values;
        }
        kernels->quantize(row, k, k / w->groups, p->codes + t * k, p->scale + t, p->sums + t * w->groups);
    }
    if (n > MAX_VECTOR_TOKENS) interleave_block(p->codes, n, k, p->tiles);
}

/* y[t][row], rows of y `stride` apart. */
static void multiply(const struct private *p, const struct matrix *w, size_t n, struct range rows, float *y,
                     size_t stride) {
    const size_t k = w->columns, block = n > 1 ? ROW_BLOCK : rows.last - rows.first;
    for (size_t first = rows.first; first < rows.last; first += block) {
        const size_t last = rows.last - first < block ? rows.last : first + block;
        if (n > MAX_VECTOR_TOKENS)
            multiply_tile(w->packed + first * (k / 4), w->scales + first * w->groups, w->groups, last - first, k,
                          p->tiles, p->scale, p->sums, n, y + first, stride);
        else
            for (size_t t = 0; t < n; t++)
                gemv_rows(w->packed, w->scales, w->groups, first, last, k, p->codes + t * k, p->scale[t],
                          p->sums + t * w->groups, y + t * stride);
    }
}

static void add_to_residual(const struct private *p, size_t n, size_t stride, struct range rows, float *x, size_t dim) {
    for (size_t t = 0; t < n; t++)
        for (size_t i = rows.first; i < rows.last; i++) x[t * dim + i] += p->projected[t * stride + i];
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

/* Rotates the heads of q and k of every token; keys and values go to their place in the cache of layer `i`. */
static void rotate_and_store(const struct decoder *d, size_t i, struct private *p, float *qkv,
                             const struct sequence *sequences, size_t n, size_t thread, size_t threads) {
    const struct layer *l = d->layers + i;
    const size_t size = d->head_dim, bytes = size * sizeof *qkv, heads = d->n_heads + 2 * d->n_kv_heads;
    const struct range tasks = share(n * heads, 1, thread, threads);
    for (size_t task = tasks.first; task < tasks.last; task++) {
        const struct sequence *s = sequences + task / heads;
        const size_t h = task % heads, kv = (h - d->n_heads) % d->n_kv_heads;
        float *head = qkv + task * size;
        const size_t place = i * s->layer_stride + (kv * s->capacity + s->position) * size;
        if (h < d->n_heads) {
            rotate(d, head, l->q_norm, s->position, p->values);
        } else if (h < d->n_heads + d->n_kv_heads) {
            rotate(d, head, l->k_norm, s->position, p->values);
            memcpy(s->keys + place, head, bytes);
        } else {
            memcpy(s->values + place, head, bytes);
        }
    }
}

static void attend(const struct decoder *d, size_t i, const struct private *p, const float *qkv,
                   const struct sequence *sequences, size_t n, float *out, size_t thread, size_t threads) {
    const size_t size = d->head_dim, group = d->n_heads / d->n_kv_heads;
    const float scale = 1.0f / sqrtf((float)size);
    const struct range tasks = share(n * d->n_heads, 1, thread, threads);
    for (size_t task = tasks.first; task < tasks.last; task++) {
        const size_t t = task / d->n_heads, h = task % d->n_heads;
        const struct sequence *s = sequences + t;
        const size_t place = i * s->layer_stride + h / group * s->capacity * size, seen = s->position + 1;
        const float *k = s->keys + place, *v = s->values + place, *q = qkv + t * heads_width(d) + h * size;
        float maximum = -INFINITY, *y = out + task * size;
        for (size_t j = 0; j < seen; j++) {
            p->scores[j] = kernels->dot_f32(q, k + j * size, size) * scale;
            if (p->scores[j] > maximum) maximum = p->scores[j];
        }
        const float inverse = 1.0f / kernels->exp_sum(p->scores, seen, maximum);
        memset(y, 0, size * sizeof *y);
        for (size_t j = 0; j < seen; j++) kernels->axpy(p->scores[j] * inverse, v + j * size, size, y);
    }
}

static void embed(const struct decoder *d, size_t token, float *x) {
    if (d->embedding_is_f16)
        kernels->f16_to_f32((const uint16_t *)d->embedding + token * d->dim, d->dim, x);
    else
        memcpy(x, (const float *)d->embedding + token * d->dim, d->dim * sizeof *x);
}

/* hidden: n rows, `stride` apart; logits: [n, vocab_size]. */
static void unembed(const struct decoder *d, const float *hidden, size_t stride, size_t n, struct range rows,
                    float *logits) {
    const size_t v = d->vocab_size, dim = d->dim;
    for (size_t row = rows.first; row < rows.last; row++) {
        const float *single = (const float *)d->head + row * dim;
        const uint16_t *half = (const uint16_t *)d->head + row * dim;
        size_t t = 0;
        for (; d->head_is_f16 && t + 2 <= n; t += 2) {
            float pair[2];
            kernels->dots_f16(hidden + t * stride, stride, half, dim, pair);
            logits[t * v + row] = pair[0];
            logits[(t + 1) * v + row] = pair[1];
        }
        for (; t < n; t++)
            logits[t * v + row] = d->head_is_f16 ? kernels->dot_f16(hidden + t * stride, half, dim)
                                                 : kernels->dot_f32(hidden + t * stride, single, dim);
    }
}

/* One token of each of n sequences, at most TOKEN_BLOCK; its keys and values are written at its position.
 * hidden: [n, dim], after the final norm; logits: [n, vocab_size]. The caller checks token < vocab_size and
 * position < capacity. */
void nk_decode(const struct decoder *d, char *workspace, const struct sequence *sequences, size_t n, float *hidden,
               float *logits) {
    const struct state s = shared_area(d, n, workspace);
    const size_t stride = projected_width(d);
    size_t capacity = 0;
    for (size_t t = 0; t < n; t++) {
        embed(d, sequences[t].token, s.x + t * d->dim);
        capacity = larger(capacity, sequences[t].capacity);
    }
#pragma omp parallel num_threads((int)d->threads)
    {
        const size_t threads = (size_t)omp_get_num_threads(), thread = (size_t)omp_get_thread_num();
        struct private p = private_area(d, capacity, n, thread, workspace);
        const struct range width = share(d->dim, 1, thread, threads);
        for (size_t i = 0; i < d->n_layers; i++) {
            const struct layer *l = d->layers + i;

            norm_and_quantize(&p, s.x, l->attention_norm, d->eps, &l->qkv, n);
            multiply(&p, &l->qkv, n, share(l->qkv.rows, 1, thread, threads), s.qkv, l->qkv.rows);
#pragma omp barrier
            rotate_and_store(d, i, &p, s.qkv, sequences, n, thread, threads);
#pragma omp barrier
            attend(d, i, &p, s.qkv, sequences, n, s.attended, thread, threads);
#pragma omp barrier
            norm_and_quantize(&p, s.attended, l->attention_sub_norm, d->eps, &l->wo, n);
            multiply(&p, &l->wo, n, width, p.projected, stride);
            add_to_residual(&p, n, stride, width, s.x, d->dim);
#pragma omp barrier
            norm_and_quantize(&p, s.x, l->ffn_norm, d->eps, &l->gate_up, n);
            const struct range gate = share(d->hidden, 8, thread, threads);
            const struct range up = {gate.first + d->hidden, gate.last + d->hidden};
            multiply(&p, &l->gate_up, n, gate, p.projected, stride);
            multiply(&p, &l->gate_up, n, up, p.projected, stride);
            for (size_t t = 0; t < n; t++)
                kernels->swiglu(p.projected + t * stride + gate.first, p.projected + t * stride + up.first,
                                gate.last - gate.first, s.gated + t * d->hidden + gate.first);
#pragma omp barrier
            norm_and_quantize(&p, s.gated, l->ffn_sub_norm, d->eps, &l->down, n);
            multiply(&p, &l->down, n, width, p.projected, stride);
            add_to_residual(&p, n, stride, width, s.x, d->dim);
#pragma omp barrier
        }
        for (size_t t = 0; t < n; t++) {
            kernels->rmsnorm(s.x + t * d->dim, d->norm, d->eps, d->dim, p.projected + t * stride);
            if (thread == 0) memcpy(hidden + t * d->dim, p.projected + t * stride, d->dim * sizeof *hidden);
        }
        unembed(d, p.projected, stride, n, share(d->vocab_size, 1, thread, threads), logits);
    }
}

/* hidden: [dim] to logits: [vocab_size]. */
void nk_unembed(const struct decoder *d, const float *hidden, float *logits) {
#pragma omp parallel num_threads((int)d->threads)
    unembed(d, hidden, d->dim, 1,
            share(d->vocab_size, 1, (size_t)omp_get_thread_num(), (size_t)omp_get_num_threads()), logits);
}
