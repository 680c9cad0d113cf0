// y = x w^T + bias for x [M, K], w [N, K], y [M, N], rows contiguous, one element type, sums in float32.
//
// Two shapes of work:
//   few rows   reads w once from memory, in place: every strip of w rows meets all rows of x while it is in L1;
//   many rows  packs slices of w as float32 panels and runs the classic 6x16 outer-product tile on them.
// A task owns a range of output columns, so the bits of a result do not depend on the number of threads.

#pragma once
#include "pool.h"
#include "simd.h"

enum {
    STRIP = 12,        // w rows walked together: the least multiple of every tile width below
    SLICE = 256,       // inner elements of a packed panel: 16 KiB, half of a 32 KiB L1
    BLOCK_PANELS = 6,  // panels packed at once: 96 KiB, well inside L2
    PASS_ROWS = 6,     // rows of x that meet a strip at once, at most
    PANEL_ROWS = 6,
    MANY_ROWS = 48,    // from here packing w pays (loadtest/bench_kernels.py --crossover)
    WIDEN_ROWS = 16,
    TASK_BYTES = 1 << 17,  // of w in a task: about 8 us of reading, against 0.1 us for taking it
};

typedef struct {
    long m, n, k, ldx, step;  // step: columns or, while widening, rows of a task
    const void *x, *w, *bias;
    void *y;
    float *wide;
} Linear;

// x as float32 in pair order, rows padded to groups; ldx keeps rows off each other's cache sets.
INLINE void widen_rows(const int kind, const void *x, long first, long last, long k, float *out, long ldx) {
    for (long m = first; m < last; m++) load_row(kind, at(x, kind, m * k), k, 1.0f, out + m * ldx);
}

INLINE void put_tile(const int kind, const float *tile, long ldt, long rows, long columns, const void *bias, void *y, long n,
                     long row, long column) {
    for (long i = 0; i < rows; i++)
        for (long j = 0; j < columns; j++) {
            float value = tile[i * ldt + j];
            if (bias) value += load_one(kind, at(bias, kind, column + j));
            store_one(kind, y, (row + i) * n + column + j, value);
        }
}

// Rows [row, row + mr) against w rows [column, column + columns). The first of the `passes` over a strip finds it in the
// cache because the passes over the strip before have fetched it, each its share.
INLINE void strip_rows(const int kind, const int mr, const int nr, const int lines, const Linear *l, long row, long column,
                       long columns, long passes, long pass) {
    float tile[12];
    long n = l->n, k = l->k, ldx = l->ldx, pace = nr * GROUP * bytes_of(kind) / passes, j = 0;
    const float *x = l->wide + row * ldx;
    const char *ahead = at(l->w, kind, (column + STRIP + STRIP * pass / passes) * k);
    for (; j + nr <= columns; j += nr, ahead += k / GROUP * pace) {
        dot_tile(kind, mr, nr, k, x, ldx, at(l->w, kind, (column + j) * k), k, tile, nr, lines, ahead, pace);
        put_tile(kind, tile, nr, mr, nr, l->bias, l->y, n, row, column + j);
    }
    for (; j < columns; j++) {
        dot_tile(kind, mr, 1, k, x, ldx, at(l->w, kind, (column + j) * k), k, tile, 1, 0, ahead, 0);
        put_tile(kind, tile, 1, mr, 1, l->bias, l->y, n, row, column + j);
    }
}

INLINE void few_rows(const int kind, const Linear *l, long first, long last) {
    const int lines = kind == BF16 ? 1 : 2;  // fetched by each row of a tile for a group
    long passes = ceil_div(l->m, PASS_ROWS);
    for (long column = first; column < last; column += STRIP) {
        long columns = min_l(STRIP, last - column);
        for (long pass = 0; pass < passes; pass++) {
            long row = l->m * pass / passes;
            switch (l->m * (pass + 1) / passes - row) {
                case 1: strip_rows(kind, 1, 4, 2 * lines, l, row, column, columns, passes, pass); break;
                case 2: strip_rows(kind, 2, 4, 2 * lines, l, row, column, columns, passes, pass); break;
                case 3: strip_rows(kind, 3, 3, 2 * lines, l, row, column, columns, passes, pass); break;
                case 4: strip_rows(kind, 4, 2, lines, l, row, column, columns, passes, pass); break;
                case 5: strip_rows(kind, 5, 2, lines, l, row, column, columns, passes, pass); break;
                case 6: strip_rows(kind, 6, 2, lines, l, row, column, columns, passes, pass); break;
            }
        }
    }
}

// Columns [first, last), both multiples of GROUP except a last that is n.
INLINE void many_rows(const int kind, long m, long k, const float *x, long ldx, const void *w, const void *bias, void *y,
                      long n, long first, long last) {
    enum { WIDTH = BLOCK_PANELS * GROUP };
    float *panels = scratch(1, SLICE * WIDTH), *sums = scratch(2, m * WIDTH);
    for (long column = first; column < last; column += WIDTH) {
        long columns = min_l(WIDTH, last - column), count = ceil_div(columns, GROUP);
        for (long slice = 0; slice < k; slice += SLICE) {
            long depth = min_l(SLICE, k - slice), padded = pad_group(depth);
            for (long p = 0; p < count; p++) {
                const void *rows[GROUP];
                for (long i = 0; i < GROUP; i++) {
                    long row = column + p * GROUP + i;
                    rows[i] = row < last ? at(w, kind, row * k + slice) : zeros;
                }
                pack_panel(kind, rows, depth, panels + p * SLICE * GROUP);
            }
            for (long row = 0; row < m; row += PANEL_ROWS)
                for (long p = 0; p < count; p++) {
                    const float *panel = panels + p * SLICE * GROUP;
                    float *sum = sums + row * WIDTH + p * GROUP;
                    if (slice)
                        outer_rows(F32, min_l(PANEL_ROWS, m - row), padded, x + row * ldx + slice, ldx, panel, GROUP, sum, WIDTH, 1);
                    else
                        outer_rows(F32, min_l(PANEL_ROWS, m - row), padded, x + row * ldx, ldx, panel, GROUP, sum, WIDTH, 0);
                }
        }
        put_tile(kind, sums, WIDTH, m, columns, bias, y, n, 0, column);
    }
}

INLINE void widen_task(const int kind, const Linear *l, long task) {
    widen_rows(kind, l->x, task * WIDEN_ROWS, min_l(l->m, (task + 1) * WIDEN_ROWS), l->k, l->wide, l->ldx);
}
INLINE void few_task(const int kind, const Linear *l, long task) {
    few_rows(kind, l, task * l->step, min_l(l->n, (task + 1) * l->step));
}
INLINE void many_task(const int kind, const Linear *l, long task) {
    many_rows(kind, l->m, l->k, l->wide, l->ldx, l->w, l->bias, l->y, l->n, task * l->step, min_l(l->n, (task + 1) * l->step));
}
static void widen_task_f32(void *l, long task) { widen_task(F32, l, task); }
static void widen_task_bf16(void *l, long task) { widen_task(BF16, l, task); }
static void few_task_f32(void *l, long task) { few_task(F32, l, task); }
static void few_task_bf16(void *l, long task) { few_task(BF16, l, task); }
static void many_task_f32(void *l, long task) { many_task(F32, l, task); }
static void many_task_bf16(void *l, long task) { many_task(BF16, l, task); }

static void linear(int kind, Linear *l, int threads) {
    l->ldx = pad_group(l->k) + GROUP;
    l->wide = scratch(0, l->m * l->ldx);
    parallel_for(l->m * l->k < TASK_BYTES ? 1 : threads, ceil_div(l->m, WIDEN_ROWS), kind == BF16 ? widen_task_bf16 : widen_task_f32, l);
    if (l->m >= MANY_ROWS) {
        l->step = BLOCK_PANELS * GROUP;
        parallel_for(threads, ceil_div(l->n, l->step), kind == BF16 ? many_task_bf16 : many_task_f32, l);
    } else {
        l->step = max_l(1, TASK_BYTES / max_l(1, STRIP * l->k * bytes_of(kind))) * STRIP;
        parallel_for(threads, ceil_div(l->n, l->step), kind == BF16 ? few_task_bf16 : few_task_f32, l);
    }
}
