// Vectors of eight floats, loads from bfloat16 or float32, and the two inner loops everything else is made of.
//
// GCC/Clang vector extensions keep this portable; the few shuffles that they express badly are AVX2 intrinsics
// under #ifdef with a plain-C twin.
//
// PAIR ORDER. Sixteen consecutive elements are handled as two vectors. For float32 they are elements 0-7 and 8-15.
// For bfloat16 they are the even and the odd elements, because a 32-bit lane holding two bfloat16 becomes two
// float32 by one shift and one mask. A sum over the dimension does not care about order as long as both
// operands use the same one, so operands are kept in pair order and only results are put back.

#pragma once
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __AVX2__
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")
enum { F32 = 0, BF16 = 1 };  // element types; ops.py holds the same numbers
enum { VL = 8, GROUP = 16 };

typedef float vf __attribute__((vector_size(32)));
typedef uint32_t vu __attribute__((vector_size(32)));
typedef int32_t vi __attribute__((vector_size(32)));
typedef float vf_mem __attribute__((vector_size(32), aligned(4), may_alias));
typedef uint32_t vu_mem __attribute__((vector_size(32), aligned(2), may_alias));

INLINE vf splat(float a) { return (vf){a, a, a, a, a, a, a, a}; }

// A store at p: `past` the caches where the CPU can, for what is larger than they are and read later (p is then aligned).
// `settle` comes before another thread reads it.
INLINE void put(const int past, void *p, vu v) {
#ifdef __AVX2__
    if (past) {
        _mm256_stream_si256(p, (__m256i)v);
        return;
    }
#endif
    *(vu_mem *)p = v;
}

INLINE void settle(void) {
#ifdef __AVX2__
    _mm_sfence();
#endif
}

INLINE long min_l(long a, long b) { return a < b ? a : b; }
INLINE long max_l(long a, long b) { return a > b ? a : b; }
INLINE long ceil_div(long a, long b) { return (a + b - 1) / b; }
INLINE long pad_group(long n) { return ceil_div(n, GROUP) * GROUP; }
INLINE long bytes_of(int kind) { return kind == BF16 ? 2 : 4; }
INLINE const void *at(const void *base, int kind, long index) { return (const char *)base + index * bytes_of(kind); }
INLINE vf load(const float *p) { return *(const vf_mem *)p; }
INLINE void store(float *p, vf v) { *(vf_mem *)p = v; }

// Keeps the compiler from loading a value again for each of its uses; the load ports are the bottleneck then.
INLINE vf in_register(vf v) {
#ifdef __AVX2__
    __asm__("" : "+x"(v));
#endif
    return v;
}

// One vector of a pair: `half` 0 or 1 of the sixteen elements at p.
INLINE vf load_half(const int kind, const void *p, const int half) {
    if (kind == F32) return load((const float *)p + half * VL);
    vu pairs = *(const vu_mem *)p;
    return half ? (vf)(pairs & 0xffff0000u) : (vf)(pairs << 16);
}

INLINE float load_one(const int kind, const void *p) {
    if (kind == F32) return *(const float *)p;
    uint32_t bits = (uint32_t) * (const uint16_t *)p << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

INLINE uint16_t round_bf16(float value) {  // to nearest, ties to even; NaN stays NaN
    uint32_t bits;
    memcpy(&bits, &value, 4);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return (uint16_t)(bits >> 16) | 0x40;
    return (uint16_t)((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

INLINE void store_one(const int kind, void *base, long index, float value) {
    if (kind == F32)
        ((float *)base)[index] = value;
    else
        ((uint16_t *)base)[index] = round_bf16(value);
}

// Where element e of a row lies in pair order, e in [0, GROUP).
INLINE int pair_place(const int kind, int e) { return kind == F32 ? e : (e & 1) * VL + e / 2; }

// A row of n elements of `kind` as float32 in the pair order of `order`, zero-padded to a whole group, times `scale`.
INLINE void load_row_as(const int kind, const int order, const void *row, long n, float scale, float *out) {
    long whole = kind == order ? n / GROUP * GROUP : 0;
    for (long e = 0; e < whole; e += GROUP) {
        store(out + e, load_half(kind, at(row, kind, e), 0) * scale);
        store(out + e + VL, load_half(kind, at(row, kind, e), 1) * scale);
    }
    if (whole == n) return;
    memset(out + whole, 0, (size_t)(pad_group(n) - whole) * sizeof(float));
    for (long e = whole; e < n; e++)
        out[e / GROUP * GROUP + pair_place(order, (int)(e % GROUP))] = load_one(kind, at(row, kind, e)) * scale;
}

INLINE void load_row(const int kind, const void *row, long n, float scale, float *out) {
    load_row_as(kind, kind, row, n, scale, out);
}

// A row of n results in the pair order of `order`, stored as `kind` in natural order, times `scale`.
INLINE void store_row(const int order, const int kind, const float *row, long n, float scale, void *out) {
    for (long e = 0; e < n; e++)
        store_one(kind, out, e, row[e / GROUP * GROUP + pair_place(order, (int)(e % GROUP))] * scale);
}

INLINE float sum_lanes(vf v) {
#ifdef __AVX2__
    __m128 s = _mm_add_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
#else
    return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
#endif
}

// Four sums at once, each added up in the order of sum_lanes.
INLINE void sum_lanes4(const vf *v, float *out) {
#ifdef __AVX2__
    __m128 s[4];
    UNROLL for (int i = 0; i < 4; i++)
        s[i] = _mm_add_ps(_mm256_castps256_ps128((__m256)v[i]), _mm256_extractf128_ps((__m256)v[i], 1));
    __m128 a = _mm_add_ps(_mm_movelh_ps(s[0], s[1]), _mm_movehl_ps(s[1], s[0]));  // 0+2, 1+3 of the first two
    __m128 b = _mm_add_ps(_mm_movelh_ps(s[2], s[3]), _mm_movehl_ps(s[3], s[2]));
    _mm_storeu_ps(out, _mm_add_ps(_mm_shuffle_ps(a, b, 0x88), _mm_shuffle_ps(a, b, 0xdd)));
#else
    UNROLL for (int i = 0; i < 4; i++) out[i] = sum_lanes(v[i]);
#endif
}

INLINE float max_lanes(vf v) {
    float top = v[0];
    UNROLL for (int i = 1; i < VL; i++) top = v[i] > top ? v[i] : top;
    return top;
}

INLINE vf max_v(vf a, vf b) {
#ifdef __AVX2__
    return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#else
    return (vf)(((vi)(a > b) & (vi)a) | (~(vi)(a > b) & (vi)b));
#endif
}

// e^x to about 1 ulp for x in [-87, 88], by 2^n * poly(r) as in Cephes; smaller x give 0.
INLINE vf exp_v(vf x) {
    const vf magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer in the low bits
    vf n = x * 1.44269504088896341f + magic;
    vi exponent = (vi)n - (vi)magic;
    n -= magic;
    vf r = x - n * 0.693359375f;
    r -= n * -2.12194440e-4f;
    vf p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    vf e = p * (r * r) + r + 1.0f;
    vf result = (vf)((vi)e + (exponent << 23));
    return (vf)((vi)result & (vi)(x > -87.0f));
}

INLINE vf tanh_v(vf x) {  // absolute error about 1e-7, which is what a soft-capped score needs
    vf bounded = max_v(-max_v(-x, splat(-20.0f)), splat(-20.0f));
    return 1.0f - 2.0f / (exp_v(bounded * 2.0f) + 1.0f);
}

// out[i * ldo + j] = x_i . w_j for mr rows of float32 x in pair order, zero-padded to whole groups, and nr rows of w
// of `kind`, all of n elements. Each product is summed in one fixed order, whatever mr and nr are.
// Meanwhile memory from `ahead` on is fetched: `pace` bytes a group of elements, of which `lines` cache lines are asked for.
INLINE void dot_tile(const int kind, const int mr, const int nr, long n, const float *x, long ldx, const void *w,
                     long ldw, float *out, long ldo, const int lines, const char *ahead, long pace) {
    vf sum[12];
    UNROLL for (int a = 0; a < mr * nr; a++) sum[a] = (vf){};
    long whole = n / GROUP * GROUP;
    for (long e = 0; e < whole; e += GROUP) {
        UNROLL for (int line = 0; line < lines; line++) __builtin_prefetch(ahead + line * 64, 0, 2);
        ahead += pace;
        UNROLL for (int half = 0; half < 2; half++) {
            vf wv[12];
            UNROLL for (int j = 0; j < nr; j++) wv[j] = load_half(kind, at(w, kind, j * ldw + e), half);
            UNROLL for (int i = 0; i < mr; i++) {
                vf xv = load(x + i * ldx + e + half * VL);
                if (mr * nr + nr + 2 <= 16) xv = in_register(xv);  // x, w, sums and the mask fit 16 registers
                UNROLL for (int j = 0; j < nr; j++) sum[i * nr + j] += xv * wv[j];
            }
        }
    }
    if (whole < n) {
        for (int j = 0; j < nr; j++) {
            uint32_t tail[GROUP] = {0};
            memcpy(tail, at(w, kind, j * ldw + whole), (size_t)((n - whole) * bytes_of(kind)));
            for (int half = 0; half < 2; half++) {
                vf wv = load_half(kind, tail, half);
                UNROLL for (int i = 0; i < mr; i++) sum[i * nr + j] += load(x + i * ldx + whole + half * VL) * wv;
            }
        }
    }
    UNROLL for (int i = 0; i < mr; i++) {
        int j = 0;
        UNROLL for (; j + 4 <= nr; j += 4) sum_lanes4(sum + i * nr + j, out + i * ldo + j);
        UNROLL for (; j < nr; j++) out[i * ldo + j] = sum_lanes(sum[i * nr + j]);
    }
}

// c[i][0:16] (+)= sum over t of a[i][t] * b[t][0:16], for mr rows; b is float32 or pages of `kind`, row stride ldb.
INLINE void outer_tile(const int kind, const int mr, long n, const float *a, long lda, const void *b, long ldb, float *c,
                       long ldc, const int add) {
    vf low[6], high[6];
    UNROLL for (int i = 0; i < mr; i++) {
        low[i] = add ? load(c + i * ldc) : (vf){};
        high[i] = add ? load(c + i * ldc + VL) : (vf){};
    }
    for (long t = 0; t < n; t++) {
        const void *row = at(b, kind, t * ldb);
        vf b_low = load_half(kind, row, 0), b_high = load_half(kind, row, 1);
        UNROLL for (int i = 0; i < mr; i++) {
            vf scalar = splat(a[i * lda + t]);
            low[i] += scalar * b_low;
            high[i] += scalar * b_high;
        }
    }
    UNROLL for (int i = 0; i < mr; i++) {
        store(c + i * ldc, low[i]);
        store(c + i * ldc + VL, high[i]);
    }
}

// outer_tile for a row count in [1, 6] known only at run time.
INLINE void outer_rows(const int kind, long rows, long n, const float *a, long lda, const void *b, long ldb, float *c,
                       long ldc, const int add) {
    switch (rows) {
        case 1: outer_tile(kind, 1, n, a, lda, b, ldb, c, ldc, add); break;
        case 2: outer_tile(kind, 2, n, a, lda, b, ldb, c, ldc, add); break;
        case 3: outer_tile(kind, 3, n, a, lda, b, ldb, c, ldc, add); break;
        case 4: outer_tile(kind, 4, n, a, lda, b, ldb, c, ldc, add); break;
        case 5: outer_tile(kind, 5, n, a, lda, b, ldb, c, ldc, add); break;
        default: outer_tile(kind, 6, n, a, lda, b, ldb, c, ldc, add);
    }
}

#ifdef __AVX2__
INLINE void transpose8(vf r[8]) {
    __m256 t[8], u[8];
    UNROLL for (int i = 0; i < 4; i++) {
        t[2 * i] = _mm256_unpacklo_ps((__m256)r[2 * i], (__m256)r[2 * i + 1]);
        t[2 * i + 1] = _mm256_unpackhi_ps((__m256)r[2 * i], (__m256)r[2 * i + 1]);
    }
    UNROLL for (int i = 0; i < 2; i++) UNROLL for (int j = 0; j < 2; j++) {
        u[4 * i + 2 * j] = _mm256_shuffle_ps(t[4 * i + j], t[4 * i + 2 + j], 0x44);
        u[4 * i + 2 * j + 1] = _mm256_shuffle_ps(t[4 * i + j], t[4 * i + 2 + j], 0xee);
    }
    UNROLL for (int i = 0; i < 4; i++) {
        r[i] = (vf)_mm256_permute2f128_ps(u[i], u[4 + i], 0x20);
        r[4 + i] = (vf)_mm256_permute2f128_ps(u[i], u[4 + i], 0x31);
    }
}
#else
INLINE void transpose8(vf r[8]) {
    vf t[8];
    for (int i = 0; i < 8; i++)
        for (int j = 0; j < 8; j++) t[j][i] = r[i][j];
    memcpy(r, t, sizeof t);
}
#endif

// Sixteen rows of n elements as a panel [pad_group(n)][16] float32, elements in pair order.
// Callers point missing rows at `zeros`.
INLINE void pack_panel(const int kind, const void *const rows[GROUP], long n, float *panel) {
    long whole = n / GROUP * GROUP;
    for (long e = 0; e < whole; e += GROUP)
        UNROLL for (int half = 0; half < 2; half++) for (int side = 0; side < GROUP; side += VL) {
            vf square[8];
            UNROLL for (int i = 0; i < VL; i++) square[i] = load_half(kind, at(rows[side + i], kind, e), half);
            transpose8(square);
            UNROLL for (int i = 0; i < VL; i++) store(panel + (e + half * VL + i) * GROUP + side, square[i]);
        }
    if (whole == n) return;
    memset(panel + whole * GROUP, 0, GROUP * GROUP * sizeof(float));
    for (int i = 0; i < GROUP; i++)
        for (long e = whole; e < n; e++)
            panel[(whole + pair_place(kind, (int)(e - whole))) * GROUP + i] = load_one(kind, at(rows[i], kind, e));
}

enum { ZEROS = 1024 };  // longest row that may be missing: a head, or a slice of the inner dimension
static const float zeros[ZEROS];

// Memory of this thread, grown on demand and kept, 64-byte aligned. `slot` tells a thread's buffers apart.
enum { SLOTS = 8 };
static float *scratch(int slot, long floats) {
    static _Thread_local float *buffers[SLOTS];
    static _Thread_local long sizes[SLOTS];
    if (sizes[slot] < floats) {
        free(buffers[slot]);
        sizes[slot] = pad_group(floats + floats / 4);
        buffers[slot] = aligned_alloc(64, (size_t)sizes[slot] * sizeof(float));
        if (!buffers[slot]) abort();
    }
    return buffers[slot];
}
