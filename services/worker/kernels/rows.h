// Row-wise operations that eager torch needs several passes and calls for. Roundings are those of the eager code they
// replace (a value that eager code holds in bfloat16 is rounded here too), so results agree to the order of sums.

#pragma once
#include "pool.h"
#include "simd.h"

enum {
    ROWS_OF_TASK = 16,
    SMALL_ELEMENTS = 1 << 15,  // below this the caller does all: about 10 us
    NORM_PLAIN = 0,            // w * (x / rms) with the quotient rounded first: Llama and most
    NORM_UNIT_OFFSET = 1,      // (x / rms) * (1 + w) rounded once: Gemma
};

typedef struct {
    long rows, n;
    const void *a, *b;
    void *y;
    float epsilon;
    int kind, style;
} Rows;

INLINE vf as_stored(const int kind, vf v) {  // v as it is after a store and a load
    if (kind == F32) return v;
    vu bits = (vu)v, rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) & 0xffff0000u;
    vu nan = (vu)(v != v);
    return (vf)((rounded & ~nan) | ((bits | 0x400000u) & 0xffff0000u & nan));
}

INLINE void store_pair(const int kind, void *p, vf first, vf second) {
    if (kind == F32) {
        store(p, first);
        store((float *)p + VL, second);
    } else {
        *(vu_mem *)p = (vu)as_stored(BF16, first) >> 16 | (vu)as_stored(BF16, second);
    }
}

INLINE vf normed(const int kind, const int style, vf x, vf w, float scale) {
    return style == NORM_PLAIN ? as_stored(kind, x * scale) * w : x * scale * (w + 1.0f);
}

INLINE void norm_row(const int kind, const int style, const Rows *r, long row) {
    const void *x = at(r->a, kind, row * r->n);
    void *y = (void *)at(r->y, kind, row * r->n);
    vf low = {}, high = {};
    long n = r->n;
    for (long e = 0; e < n; e += GROUP) {
        vf first = load_half(kind, at(x, kind, e), 0), second = load_half(kind, at(x, kind, e), 1);
        low += first * first;
        high += second * second;
    }
    float scale = 1.0f / sqrtf(sum_lanes(low + high) / (float)n + r->epsilon);
    for (long e = 0; e < n; e += GROUP)
        store_pair(kind, (void *)at(y, kind, e),
                   normed(kind, style, load_half(kind, at(x, kind, e), 0), load_half(kind, at(r->b, kind, e), 0), scale),
                   normed(kind, style, load_half(kind, at(x, kind, e), 1), load_half(kind, at(r->b, kind, e), 1), scale));
}

INLINE vf silu_times(const int kind, vf gate, vf up) {
    vf down = max_v(-max_v(-gate, splat(-87.0f)), splat(-87.0f));  // e^-gate stays finite
    return as_stored(kind, gate / (exp_v(-down) + 1.0f)) * up;
}

INLINE void silu_row(const int kind, const Rows *r, long row) {
    for (long e = row * r->n; e < (row + 1) * r->n; e += GROUP) {
        const void *gate = at(r->a, kind, e), *up = at(r->b, kind, e);
        store_pair(kind, (void *)at(r->y, kind, e), silu_times(kind, load_half(kind, gate, 0), load_half(kind, up, 0)),
                   silu_times(kind, load_half(kind, gate, 1), load_half(kind, up, 1)));
    }
}

static void norm_rows(void *context, long task) {
    const Rows *r = context;
    for (long row = task * ROWS_OF_TASK; row < min_l(r->rows, (task + 1) * ROWS_OF_TASK); row++) {
        if (r->style == NORM_PLAIN)
            r->kind == BF16 ? norm_row(BF16, NORM_PLAIN, r, row) : norm_row(F32, NORM_PLAIN, r, row);
        else
            r->kind == BF16 ? norm_row(BF16, NORM_UNIT_OFFSET, r, row) : norm_row(F32, NORM_UNIT_OFFSET, r, row);
    }
}

static void silu_rows(void *context, long task) {
    const Rows *r = context;
    for (long row = task * ROWS_OF_TASK; row < min_l(r->rows, (task + 1) * ROWS_OF_TASK); row++)
        r->kind == BF16 ? silu_row(BF16, r, row) : silu_row(F32, r, row);
}

static void all_rows(Rows *r, void (*run)(void *, long), int threads) {
    parallel_for(r->rows * r->n < SMALL_ELEMENTS ? 1 : threads, ceil_div(r->rows, ROWS_OF_TASK), run, r);
}
