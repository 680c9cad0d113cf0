// Attention over the paged pool, read in place. Shapes and rules are those of reference.py.
//
// Decode cuts every sequence's keys into chunks of fixed absolute bounds, so the work spreads over threads even for
// one sequence, and the bits of a result depend neither on the number of threads nor on the rest of the batch. A chunk
// serves all heads, so the pool is read in its own order; the partial (top, total, sum) triples meet in a second pass.
//
// Prefill is tiled as in FlashAttention: for one KV head, a tile of query rows (queries x heads of the group) walks over
// key tiles, which are widened once into panels for the 6x16 outer-product tile.

#pragma once
#include "pool.h"
#include "simd.h"

typedef struct {
    long sequences, q_heads, kv_heads, head_dim;
    long q_stride;                                      // elements between two queries of one head
    long block_tokens, block_stride, token_stride, head_stride;  // of k and v, in elements
    long table_stride;                                  // entries between two sequences' rows of the table
    const void *q, *k, *v;
    const int32_t *table;
    void *out;                                          // contiguous [query, q_head, head_dim]
    const float *sinks;                                 // [q_heads] or null
    float scale, softcap;                               // softcap 0: none
    long window;                                        // 0: none
    int q_kind, kv_kind, threads;
} Attention;

enum {
    CHUNK = 256,     // keys of a decode task
    RUN = 16,        // keys of a decode step within a chunk
    KEY_TILE = 128,  // keys of a prefill tile
    ROW_TILE = 96,   // query rows of a prefill tile, about
    HEADS_AT_ONCE = 3,
};
#define HIDDEN (-1e30f)  // a masked score: finite, so that a row without a visible key in a tile yields no NaN

INLINE long key_offset(const Attention *a, const int32_t *blocks, long token, long kv_head) {
    return blocks[token / a->block_tokens] * a->block_stride + token % a->block_tokens * a->token_stride +
           kv_head * a->head_stride;
}

INLINE void cap_scores(float *scores, long n, float softcap) {
    for (long t = 0; t < n; t += VL) store(scores + t, tanh_v(load(scores + t) / softcap) * softcap);
}

// scores -> exp(scores - top), their sum returned; n is a multiple of VL.
INLINE float exp_scores(float *scores, long n, float top) {
    vf total = {};
    for (long t = 0; t < n; t += VL) {
        vf e = exp_v(load(scores + t) - top);
        store(scores + t, e);
        total += e;
    }
    return sum_lanes(total);
}

INLINE float top_score(const float *scores, long n, float top) {
    vf tops = splat(top);
    for (long t = 0; t < n; t += VL) tops = max_v(tops, load(scores + t));
    return max_lanes(tops);
}

// ---------------------------------------------------------------- decode

INLINE void score_keys(const int kind, const int heads, const float *q, long padded, long dim, const void *k, long token_stride,
                       long tokens, float *scores) {
    long t = 0;
    for (; t + 4 <= tokens; t += 4)
        dot_tile(kind, heads, 4, dim, q, padded, at(k, kind, t * token_stride), token_stride, scores + t, CHUNK, 0, NULL, 0);
    for (; t < tokens; t++)
        dot_tile(kind, heads, 1, dim, q, padded, at(k, kind, t * token_stride), token_stride, scores + t, CHUNK, 0, NULL, 0);
}

INLINE void score_group(const int kind, long group, const float *q, long padded, long dim, const void *k, long token_stride,
                        long tokens, float *scores) {
    long passes = ceil_div(group, HEADS_AT_ONCE);
    for (long pass = 0; pass < passes; pass++) {
        long first = group * pass / passes;
        const float *rows = q + first * padded;
        float *to = scores + first * CHUNK;
        switch (group * (pass + 1) / passes - first) {
            case 1: score_keys(kind, 1, rows, padded, dim, k, token_stride, tokens, to); break;
            case 2: score_keys(kind, 2, rows, padded, dim, k, token_stride, tokens, to); break;
            case 3: score_keys(kind, 3, rows, padded, dim, k, token_stride, tokens, to); break;
        }
    }
}

// sums[g] += weights[g] . v over `tokens` rows of one block and one KV head.
INLINE void add_values(const int kind, long group, const float *weights, const void *v, long token_stride, long tokens, long dim,
                       long padded, float *sums) {
    long whole = dim / GROUP * GROUP;
    for (long g = 0; g < group; g += 6) {
        long heads = min_l(6, group - g);
        for (long e = 0; e < whole; e += GROUP)
            outer_rows(kind, heads, tokens, weights + g * CHUNK, CHUNK, at(v, kind, e), token_stride, sums + g * padded + e, padded, 1);
        for (long t = 0; whole < dim && t < tokens; t++) {
            float tail[GROUP];
            load_row(kind, at(v, kind, t * token_stride + whole), dim - whole, 1.0f, tail);
            outer_rows(F32, heads, 1, weights + g * CHUNK + t, CHUNK, tail, GROUP, sums + g * padded + whole, padded, 1);
        }
    }
}

// Keys handled together from t on: they lie in one block, and are few enough for all heads' rows to stay in L1.
INLINE long run_length(const Attention *a, long t, long last) {
    return min_l(RUN, min_l(a->block_tokens - t % a->block_tokens, last - t));
}

// Asks for one KV head's rows of the next run: rows of several heads lie interleaved, which hardware does not foresee.
INLINE void fetch_rows(const int kind, const Attention *a, const void *pages, const int32_t *blocks, long t, long last, long kv_head) {
    if (t >= last) return;
    const char *row = at(pages, kind, key_offset(a, blocks, t, kv_head));
    long stride = a->token_stride * bytes_of(kind), size = a->head_dim * bytes_of(kind);
    for (long n = run_length(a, t, last); n > 0; n--, row += stride)
        for (long byte = 0; byte < size; byte += 64) __builtin_prefetch(row + byte, 0, 2);
}

// Keys [first, last) of one sequence, at most CHUNK, for all heads. tops, totals [q_heads]; sums [q_heads, padded].
INLINE void decode_chunk(const int kind, const Attention *a, const int32_t *blocks, const float *q, long first, long last,
                         float *tops, float *totals, float *sums) {
    long padded = pad_group(a->head_dim), group = a->q_heads / a->kv_heads, tokens = last - first;
    float *scores = scratch(1, a->q_heads * CHUNK);
    for (long t = first, count; t < last; t += count) {
        count = run_length(a, t, last);
        for (long h = 0; h < a->kv_heads; h++) {
            fetch_rows(kind, a, a->k, blocks, t + count, last, h);
            score_group(kind, group, q + h * group * padded, padded, a->head_dim, at(a->k, kind, key_offset(a, blocks, t, h)),
                        a->token_stride, count, scores + h * group * CHUNK + (t - first));
        }
    }
    for (long h = 0; h < a->q_heads; h++) {
        float *row = scores + h * CHUNK;
        long width = ceil_div(tokens, VL) * VL;
        if (a->softcap > 0) cap_scores(row, width, a->softcap);
        for (long t = tokens; t < width; t++) row[t] = HIDDEN;
        tops[h] = top_score(row, width, HIDDEN);
        totals[h] = exp_scores(row, width, tops[h]);
    }
    memset(sums, 0, (size_t)(a->q_heads * padded) * sizeof(float));
    for (long t = first, count; t < last; t += count) {
        count = run_length(a, t, last);
        for (long h = 0; h < a->kv_heads; h++) {
            fetch_rows(kind, a, a->v, blocks, t + count, last, h);
            add_values(kind, group, scores + h * group * CHUNK + (t - first), at(a->v, kind, key_offset(a, blocks, t, h)),
                       a->token_stride, count, a->head_dim, padded, sums + h * group * padded);
        }
    }
}

// One query's partial triples, chunk by chunk in order, into its output.
INLINE void merge_chunks(const Attention *a, long sequence, long chunks, const float *tops, const float *totals, float *sums) {
    long padded = pad_group(a->head_dim), heads = a->q_heads;
    for (long h = 0; h < heads; h++) {
        float top = a->sinks ? a->sinks[h] : HIDDEN, total = 0;
        for (long c = 0; c < chunks; c++) top = tops[c * heads + h] > top ? tops[c * heads + h] : top;
        if (a->sinks) total = expf(a->sinks[h] - top);
        float *sum = sums + h * padded;
        for (long c = 0; c < chunks; c++) {
            float factor = expf(tops[c * heads + h] - top);
            const float *part = sums + (c * heads + h) * padded;
            total += totals[c * heads + h] * factor;
            for (long e = 0; e < padded; e += VL)
                store(sum + e, c ? load(sum + e) + load(part + e) * factor : load(part + e) * factor);
        }
        long row = (sequence * heads + h) * a->head_dim;
        store_row(a->kv_kind, a->q_kind, sum, a->head_dim, chunks ? 1.0f / total : 0.0f, (void *)at(a->out, a->q_kind, row));
    }
}

INLINE long first_visible(const Attention *a, long position) { return a->window ? max_l(0, position + 1 - a->window) : 0; }

typedef struct {
    const Attention *a;
    const int32_t *context_lens;
    long *starts;  // [sequences + 1]: tasks before each sequence's first
    float *q, *tops, *totals, *sums;
} Decode;

INLINE void decode_task(const int kind, const Decode *d, long task) {
    const Attention *a = d->a;
    long b = 0, padded = pad_group(a->head_dim), heads = a->q_heads;
    while (d->starts[b + 1] <= task) b++;
    long length = d->context_lens[b], visible = first_visible(a, length - 1);
    long first = (visible / CHUNK + task - d->starts[b]) * CHUNK;
    decode_chunk(kind, a, a->table + b * a->table_stride, d->q + b * heads * padded, max_l(first, visible),
                 min_l(first + CHUNK, length), d->tops + task * heads, d->totals + task * heads, d->sums + task * heads * padded);
}
static void decode_task_f32(void *d, long task) { decode_task(F32, d, task); }
static void decode_task_bf16(void *d, long task) { decode_task(BF16, d, task); }

static void decode(const Attention *a, const int32_t *context_lens) {
    long padded = pad_group(a->head_dim), heads = a->q_heads, batch = a->sequences;
    Decode d = {.a = a, .context_lens = context_lens, .starts = (long *)scratch(2, 2 * (batch + 1))};
    d.starts[0] = 0;
    for (long b = 0; b < batch; b++) {
        long length = context_lens[b], first = first_visible(a, length - 1) / CHUNK;
        d.starts[b + 1] = d.starts[b] + (length > 0 ? ceil_div(length, CHUNK) - first : 0);
    }
    long tasks = d.starts[batch];
    d.q = scratch(0, batch * heads * padded);
    d.tops = scratch(3, 2 * tasks * heads), d.totals = d.tops + tasks * heads;
    d.sums = scratch(4, tasks * heads * padded);
    for (long row = 0; row < batch * heads; row++)
        load_row_as(a->q_kind, a->kv_kind, at(a->q, a->q_kind, row / heads * a->q_stride + row % heads * a->head_dim),
                    a->head_dim, a->scale, d.q + row * padded);
    parallel_for(a->threads, tasks, a->kv_kind == BF16 ? decode_task_bf16 : decode_task_f32, &d);
    for (long b = 0; b < batch; b++) {
        long at_task = d.starts[b] * heads;
        merge_chunks(a, b, d.starts[b + 1] - d.starts[b], d.tops + at_task, d.totals + at_task, d.sums + at_task * padded);
    }
}

// ---------------------------------------------------------------- prefill

typedef struct {
    long sequence, first, last;  // rows [first, last) of q
} QueryTile;

// Keys [start, start + count) of one KV head: k as panels [panel][padded][16], v as [padded / 16][KEY_TILE][16].
INLINE void widen_keys(const int kind, const Attention *a, const int32_t *blocks, long kv_head, long start, long count, float *k,
                       float *v) {
    long dim = a->head_dim, padded = pad_group(dim), panels = ceil_div(count, GROUP);
    float row[ZEROS];
    for (long p = 0; p < panels; p++) {
        const void *rows[GROUP];
        for (long i = 0; i < GROUP; i++) {
            long t = p * GROUP + i;
            rows[i] = t < count ? at(a->k, kind, key_offset(a, blocks, start + t, kv_head)) : zeros;
        }
        pack_panel(kind, rows, dim, k + p * padded * GROUP);
    }
    for (long t = 0; t < count; t++) {
        load_row(kind, at(a->v, kind, key_offset(a, blocks, start + t, kv_head)), dim, 1.0f, row);
        for (long e = 0; e < padded; e += GROUP) {
            store(v + (e * KEY_TILE + t * GROUP), load(row + e));
            store(v + (e * KEY_TILE + t * GROUP) + VL, load(row + e + VL));
        }
    }
}

// Hides what `position` may not see among keys [start, start + width).
INLINE void mask_row(const Attention *a, float *scores, long position, long start, long count, long width) {
    long from = max_l(0, first_visible(a, position) - start), to = max_l(0, min_l(count, position + 1 - start));
    for (long t = 0; t < min_l(from, width); t++) scores[t] = HIDDEN;
    for (long t = to; t < width; t++) scores[t] = HIDDEN;
}

// Online softmax of one tile: scores become weights, running top and total move, the old sums shrink.
INLINE void soften_row(float *scores, long width, float *top, float *total, float *sum, long padded) {
    float next = top_score(scores, width, *top), factor = expf(*top - next);
    *total = *total * factor + exp_scores(scores, width, next);
    *top = next;
    if (factor != 1.0f)
        for (long e = 0; e < padded; e += VL) store(sum + e, load(sum + e) * factor);
}

INLINE void prefill_tile(const int kind, const Attention *a, QueryTile tile, long kv_head, const int64_t *positions) {
    long dim = a->head_dim, padded = pad_group(dim), group = a->q_heads / a->kv_heads;
    long queries = tile.last - tile.first, rows = queries * group, ldq = padded + GROUP;
    float *q = scratch(1, rows * ldq), *scores = scratch(2, rows * KEY_TILE), *sums = scratch(3, rows * padded);
    float *k = scratch(4, KEY_TILE * padded), *v = scratch(5, KEY_TILE * padded), *tops = scratch(6, 2 * rows), *totals = tops + rows;
    const int32_t *blocks = a->table + tile.sequence * a->table_stride;
    long low = INT64_MAX, high = -1;
    for (long r = 0; r < rows; r++) {
        long query = tile.first + r / group, head = kv_head * group + r % group;
        load_row_as(a->q_kind, kind, at(a->q, a->q_kind, query * a->q_stride + head * dim), dim, a->scale, q + r * ldq);
        tops[r] = a->sinks ? a->sinks[head] : HIDDEN;
        totals[r] = a->sinks ? 1.0f : 0.0f;
        low = min_l(low, positions[query]), high = max_l(high, positions[query]);
    }
    memset(sums, 0, (size_t)(rows * padded) * sizeof(float));
    for (long start = first_visible(a, low) / KEY_TILE * KEY_TILE; start <= high; start += KEY_TILE) {
        long count = min_l(KEY_TILE, high + 1 - start), width = pad_group(count);
        int all_visible = start + width <= low + 1 && start >= first_visible(a, high);
        widen_keys(kind, a, blocks, kv_head, start, count, k, v);
        for (long r = 0; r < rows; r += 6)
            for (long t = 0; t < width; t += GROUP)
                outer_rows(F32, min_l(6, rows - r), padded, q + r * ldq, ldq, k + t * padded, GROUP, scores + r * KEY_TILE + t, KEY_TILE, 0);
        for (long r = 0; r < rows; r++) {
            float *row = scores + r * KEY_TILE;
            if (a->softcap > 0) cap_scores(row, width, a->softcap);
            if (!all_visible) mask_row(a, row, positions[tile.first + r / group], start, count, width);
            soften_row(row, width, tops + r, totals + r, sums + r * padded, padded);
        }
        for (long r = 0; r < rows; r += 6)
            for (long e = 0; e < padded; e += GROUP)
                outer_rows(F32, min_l(6, rows - r), count, scores + r * KEY_TILE, KEY_TILE, v + e * KEY_TILE, GROUP, sums + r * padded + e, padded, 1);
    }
    for (long r = 0; r < rows; r++) {
        long to = ((tile.first + r / group) * a->q_heads + kv_head * group + r % group) * dim;
        store_row(kind, a->q_kind, sums + r * padded, dim, 1.0f / totals[r], (void *)at(a->out, a->q_kind, to));
    }
}

typedef struct {
    const Attention *a;
    const QueryTile *tiles;
    const int64_t *positions;
} Prefill;

INLINE void prefill_task(const int kind, const Prefill *p, long task) {
    prefill_tile(kind, p->a, p->tiles[task / p->a->kv_heads], task % p->a->kv_heads, p->positions);
}
static void prefill_task_f32(void *p, long task) { prefill_task(F32, p, task); }
static void prefill_task_bf16(void *p, long task) { prefill_task(BF16, p, task); }

static void prefill(const Attention *a, const int32_t *cu_seqlens, const int64_t *positions) {
    long step = max_l(1, ROW_TILE / (a->q_heads / a->kv_heads)), count = 0;
    for (long s = 0; s < a->sequences; s++) count += ceil_div(cu_seqlens[s + 1] - cu_seqlens[s], step);
    QueryTile *tiles = (QueryTile *)scratch(0, count * (long)(sizeof(QueryTile) / sizeof(float)));
    long i = count;  // backwards: a sequence's last tile sees most keys, and long tasks go first
    for (long s = 0; s < a->sequences; s++)
        for (long row = cu_seqlens[s]; row < cu_seqlens[s + 1]; row += step)
            tiles[--i] = (QueryTile){s, row, min_l(row + step, cu_seqlens[s + 1])};
    Prefill p = {a, tiles, positions};
    parallel_for(a->threads, count * a->kv_heads, a->kv_kind == BF16 ? prefill_task_bf16 : prefill_task_f32, &p);
}
