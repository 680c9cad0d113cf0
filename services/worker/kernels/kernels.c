// The exported functions. See ops.py for what is checked before a call.

#include "attention.h"
#include "codec.h"
#include "linear.h"
#include "rows.h"

void penstock_linear(int kind, long m, long n, long k, const void *x, const void *w, const void *bias, void *y, int threads) {
    Linear l = {.m = m, .n = n, .k = k, .x = x, .w = w, .bias = bias, .y = y};
    linear(kind, &l, threads);
}

void penstock_decode(const Attention *a, const int32_t *context_lens) { decode(a, context_lens); }

void penstock_prefill(const Attention *a, const int32_t *cu_seqlens, const int64_t *positions) { prefill(a, cu_seqlens, positions); }

void penstock_rms_norm(int kind, int style, long rows, long n, const void *x, const void *w, float epsilon, void *y, int threads) {
    Rows r = {.rows = rows, .n = n, .a = x, .b = w, .y = y, .epsilon = epsilon, .kind = kind, .style = style};
    all_rows(&r, norm_rows, threads);
}

void penstock_silu_mul(int kind, long rows, long n, const void *gate, const void *up, void *y, int threads) {
    Rows r = {.rows = rows, .n = n, .a = gate, .b = up, .y = y, .kind = kind};
    all_rows(&r, silu_rows, threads);
}

// A plane that can't be stored, or -1. `layers` of two planes each.
long penstock_encode_block(int kind, int code, long layers, long tokens, long heads, long dim, const void *raw, void *encoded, int threads) {
    Blocks b = {2 * layers, tokens, heads, dim, (char *)raw, encoded, kind, code, -1};
    parallel_for(threads, b.planes, encode_one, &b);
    return atomic_load(&b.unfit);
}

void penstock_decode_block(int kind, int code, long layers, long tokens, long heads, long dim, const void *encoded, void *raw, int threads) {
    Blocks b = {2 * layers, tokens, heads, dim, raw, (uint8_t *)encoded, kind, code, -1};
    parallel_for(threads, b.planes, decode_one, &b);
}
