// The exported functions: each picks the element type once and hands over. See ops.py for what is checked before.

#include "attention.h"
#include "linear.h"

void penstock_linear(int kind, long m, long n, long k, const void *x, const void *w, const void *bias, void *y, int threads) {
    if (kind == BF16)
        linear_of(BF16, m, n, k, x, w, bias, y, threads);
    else
        linear_of(F32, m, n, k, x, w, bias, y, threads);
}

void penstock_decode(const Attention *a, const int32_t *context_lens) {
    if (a->kv_kind == BF16)
        decode_of(BF16, a, context_lens);
    else
        decode_of(F32, a, context_lens);
}

void penstock_prefill(const Attention *a, const int32_t *cu_seqlens, const int64_t *positions) {
    if (a->kv_kind == BF16)
        prefill_of(BF16, a, cu_seqlens, positions);
    else
        prefill_of(F32, a, cu_seqlens, positions);
}
