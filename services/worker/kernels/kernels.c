// The exported functions. See ops.py for what is checked before a call.

#include "attention.h"
#include "linear.h"

void penstock_linear(int kind, long m, long n, long k, const void *x, const void *w, const void *bias, void *y, int threads) {
    Linear l = {.m = m, .n = n, .k = k, .x = x, .w = w, .bias = bias, .y = y};
    linear(kind, &l, threads);
}

void penstock_decode(const Attention *a, const int32_t *context_lens) { decode(a, context_lens); }

void penstock_prefill(const Attention *a, const int32_t *cu_seqlens, const int64_t *positions) { prefill(a, cu_seqlens, positions); }
