// KV blocks to and from their stored form (docs/formats.md). A plane is the keys or the values of one layer:
// [token][head][dim] in the KV dtype, or one float32 scale for each head and a code for each element.
//
// Every step is one correctly rounded float32 operation, so that the bytes are those of codec_reference.py. No sum follows
// a product, which the compiler could fuse and round once.

#pragma once
#include "pool.h"
#include "simd.h"
#include "rows.h"

enum { FP8 = 0, INT8 = 1, INT4 = 2 };  // codec_ops.py holds the same numbers
#define PEAK_MIN 0x1p-100f             // a head below it is zeros: its scale would not have an inverse
#define PEAK_END 0x1p127f              // a head at it, or not finite, can't be stored: decoding could overflow

typedef struct {
    long planes, tokens, heads, dim;
    char *raw;         // plane after plane
    uint8_t *encoded;  // layer after layer: scales of two planes, codes of two planes
    int kind, code;
    atomic_long unfit;  // a plane that can't be stored, or -1
} Blocks;

INLINE long code_bytes(const int code, long elements) { return code == INT4 ? elements / 2 : elements; }

INLINE float levels(const int code) { return code == FP8 ? 448.0f : code == INT8 ? 127.0f : 7.0f; }

typedef int16_t vh __attribute__((vector_size(32)));
typedef int16_t vh_mem __attribute__((vector_size(32), aligned(2), may_alias));
typedef uint8_t vb8 __attribute__((vector_size(8)));
typedef uint8_t vb8_mem __attribute__((vector_size(8), aligned(1), may_alias));
typedef uint16_t vw8 __attribute__((vector_size(16)));
typedef uint16_t vw8_mem __attribute__((vector_size(16), aligned(1), may_alias));
typedef uint8_t vb4 __attribute__((vector_size(4)));
typedef uint8_t vb4_mem __attribute__((vector_size(4), aligned(1), may_alias));
typedef uint64_t vq __attribute__((vector_size(32)));

// The largest magnitude of each head: of the bits, so that a NaN is larger than everything. Rows are walked as they lie in
// memory; `top` holds a vector for each head.
INLINE void peaks_of(const int kind, const char *plane, long tokens, long heads, long dim, vi *top) {
    for (long h = 0; h < heads; h++) top[h] = (vi){};
    for (long t = 0; t < tokens; t++)
        for (long h = 0; h < heads; h++) {
            const void *row = at(plane, kind, (t * heads + h) * dim);
            vi best = top[h];
            for (long e = 0; e < dim; e += kind == BF16 ? GROUP : VL)
                if (kind == BF16) {
                    vh x = *(const vh_mem *)at(row, kind, e) & 0x7fff, above = x > (vh)best;
                    best = (vi)((x & above) | ((vh)best & ~above));
                } else {
                    vi x = (vi)load((const float *)at(row, kind, e)) & 0x7fffffff, above = x > best;
                    best = (x & above) | (best & ~above);
                }
            top[h] = best;
        }
}

INLINE float largest(const int kind, vi lanes) {
    uint32_t bits = 0;
    if (kind == BF16) {
        for (int i = 0; i < GROUP; i++) bits = max_l(bits, ((vh)lanes)[i]);
        bits <<= 16;
    } else {
        for (int i = 0; i < VL; i++) bits = max_l(bits, lanes[i]);
    }
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

INLINE vu nearest(vf v) {  // ties to even
#ifdef __AVX2__
    return (vu)_mm256_cvtps_epi32((__m256)v);
#else
    vi n;
    for (int i = 0; i < VL; i++) n[i] = (int32_t)lrintf(v[i]);
    return (vu)n;
#endif
}

INLINE vu code_of(const int code, vf scaled) {
    if (code == INT8) return nearest(scaled) & 0xff;
    if (code == INT4) return nearest(scaled) + 8;
    vu bits = (vu)scaled, sign = bits >> 24 & 0x80, size = bits & 0x7fffffff;
    vu normal = ((size + 0x7ffff + (size >> 20 & 1)) >> 20) - (120 << 3);  // bias 127 to 7, ties to even
    vu small = (vu)((vi)size < 0x3c800000);                                // below 2^-6: multiples of 2^-9
    return sign | (small & nearest((vf)size * 512.0f)) | (~small & normal);
}

INLINE vf value_of(const int code, vu codes) {  // of codes that were zero-extended
    if (code == INT8) return __builtin_convertvector((vi)(codes << 24) >> 24, vf);
    if (code == INT4) return __builtin_convertvector((vi)codes - 8, vf);
    vu size = codes & 0x7f;
    vu small = (vu)((vi)size < 8);
    vu bits = (size << 20) + (120u << 23) + (small & 1u << 23);  // a small one as 2^-6 and its fraction,
    vu magnitude = (vu)((vf)bits - (vf)(small & 0x3c800000u));   // less the 2^-6
    return (vf)(magnitude | (codes & 0x80) << 24);
}

// Sixteen elements at p as codes.
INLINE void encode_group(const int kind, const int code, const void *p, vf inverse, uint8_t *out) {
    vu first = code_of(code, load_half(kind, p, 0) * inverse), second = code_of(code, load_half(kind, p, 1) * inverse);
    if (kind == BF16 && code == INT4)
        *(vb8_mem *)out = __builtin_convertvector(first | second << 4, vb8);
    else if (kind == BF16)
        *(vw8_mem *)out = __builtin_convertvector(first | second << 8, vw8);
    else if (code == INT4) {
        *(vb4_mem *)out = __builtin_convertvector(((vq)first & 0xf) | ((vq)first >> 28 & 0xf0), vb4);
        *(vb4_mem *)(out + 4) = __builtin_convertvector(((vq)second & 0xf) | ((vq)second >> 28 & 0xf0), vb4);
    } else {
        *(vb8_mem *)out = __builtin_convertvector(first, vb8);
        *(vb8_mem *)(out + 8) = __builtin_convertvector(second, vb8);
    }
}

INLINE void store_finite_pair(const int kind, const int past, void *p, vf first, vf second) {  // of bfloat16: no NaN but the plain one
    if (kind == F32) {
        put(past, p, (vu)first);
        put(past, (float *)p + VL, (vu)second);
    } else {
        vu low = (vu)first, high = (vu)second;
        low = (low + 0x7fffu + (low >> 16 & 1u)) >> 16;
        high = (high + 0x7fffu + (high >> 16 & 1u)) & 0xffff0000u;
        put(past, p, low | high);
    }
}

#ifdef __AVX512BF16__
// decode_group of bfloat16 in a few instructions. The conversion takes subnormals for zeros; a scale that isn't zero
// is above 2^-109 and makes none.
INLINE void decode_group_wide(const int code, const int past, const uint8_t *codes, float scale, void *p) {
    __m512 values;
    if (code == FP8) {  // as float16, whose exponent is 8 smaller: subnormals and signs stay in place
        __m256i wide = _mm256_cvtepu8_epi16(_mm_loadu_si128((const void *)codes)), sign = _mm256_and_si256(wide, _mm256_set1_epi16(0x80));
        values = _mm512_cvtph_ps(_mm256_add_epi16(_mm256_slli_epi16(wide, 7), _mm256_slli_epi16(sign, 7)));
        scale *= 256.0f;
    } else if (code == INT8) {
        values = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const void *)codes)));
    } else {
        __m128i pairs = _mm_cvtepu8_epi16(_mm_loadl_epi64((const void *)codes)), low = _mm_and_si128(pairs, _mm_set1_epi16(0xf));
        __m128i each = _mm_or_si128(low, _mm_slli_epi16(_mm_srli_epi16(pairs, 4), 8));
        values = _mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_cvtepu8_epi32(each), _mm512_set1_epi32(8)));
    }
    put(past, p, (vu)_mm512_cvtneps_pbh(_mm512_mul_ps(values, _mm512_set1_ps(scale))));
}
#endif

INLINE void decode_group(const int kind, const int code, const int past, const uint8_t *codes, float factor, void *p) {
#ifdef __AVX512BF16__
    if (kind == BF16) {
        decode_group_wide(code, past, codes, factor, p);
        return;
    }
#endif
    vf scale = splat(factor);
    vu first, second;
    if (kind == BF16 && code == INT4) {
        vu pairs = __builtin_convertvector(*(const vb8_mem *)codes, vu);
        first = pairs & 0xf, second = pairs >> 4;
    } else if (kind == BF16) {
        vu pairs = __builtin_convertvector(*(const vw8_mem *)codes, vu);
        first = pairs & 0xff, second = pairs >> 8;
    } else if (code == INT4) {
        vq low = __builtin_convertvector(*(const vb4_mem *)codes, vq), high = __builtin_convertvector(*(const vb4_mem *)(codes + 4), vq);
        first = (vu)((low & 0xf) | low >> 4 << 32), second = (vu)((high & 0xf) | high >> 4 << 32);
    } else {
        first = __builtin_convertvector(*(const vb8_mem *)codes, vu);
        second = __builtin_convertvector(*(const vb8_mem *)(codes + 8), vu);
    }
    store_finite_pair(kind, past, p, value_of(code, first) * scale, value_of(code, second) * scale);
}

// Where plane `number` keeps its scales, and its codes.
INLINE uint8_t *codes_of(const int code, const Blocks *b, long number, float **scales) {
    long plane = code_bytes(code, b->tokens * b->heads * b->dim), all_scales = 2 * b->heads * (long)sizeof(float);
    uint8_t *layer = b->encoded + number / 2 * (all_scales + 2 * plane);
    *scales = (float *)layer + number % 2 * b->heads;
    return layer + all_scales + number % 2 * plane;
}

INLINE void encode_plane(const int kind, const int code, Blocks *b, long number) {
    long rows = b->tokens * b->heads;
    const char *plane = b->raw + number * rows * b->dim * bytes_of(kind);
    float *scales, *inverses = scratch(0, b->heads);
    vi *top = (vi *)scratch(1, b->heads * VL);
    uint8_t *codes = codes_of(code, b, number, &scales);
    peaks_of(kind, plane, b->tokens, b->heads, b->dim, top);
    for (long h = 0; h < b->heads; h++) {
        float peak = largest(kind, top[h]);
        if (!(peak < PEAK_END)) atomic_store(&b->unfit, number);
        float scale = peak < PEAK_MIN ? 0.0f : peak / levels(code);
        memcpy(scales + h, &scale, sizeof scale);
        inverses[h] = peak < PEAK_MIN ? 0.0f : levels(code) / peak;
    }
    for (long row = 0, h = 0; row < rows; row++, h = h + 1 < b->heads ? h + 1 : 0)
        for (long e = row * b->dim; e < (row + 1) * b->dim; e += GROUP)
            encode_group(kind, code, at(plane, kind, e), splat(inverses[h]), codes + code_bytes(code, e));
}

INLINE void decode_rows(const int kind, const int code, const int past, const Blocks *b, const uint8_t *codes, const float *scales, char *plane) {
    for (long row = 0, h = 0; row < b->tokens * b->heads; row++, h = h + 1 < b->heads ? h + 1 : 0)
        for (long e = row * b->dim; e < (row + 1) * b->dim; e += GROUP)
            decode_group(kind, code, past, codes + code_bytes(code, e), scales[h], (void *)at(plane, kind, e));
}

INLINE void decode_plane(const int kind, const int code, Blocks *b, long number) {
    char *plane = b->raw + number * b->tokens * b->heads * b->dim * bytes_of(kind);
    float *scales, *checked = scratch(0, b->heads);
    const uint8_t *codes = codes_of(code, b, number, &scales);
    for (long h = 0; h < b->heads; h++) {
        memcpy(checked + h, scales + h, sizeof *checked);
        if (!(checked[h] >= 0.0f && checked[h] < INFINITY)) checked[h] = NAN;  // damage stays visible
    }
    if ((uintptr_t)plane % sizeof(vu)) {
        decode_rows(kind, code, 0, b, codes, checked, plane);
    } else {
        decode_rows(kind, code, 1, b, codes, checked, plane);
        settle();
    }
}

#define FOR_EACH_CODE(run, kind) \
    (b->code == FP8 ? run(kind, FP8, b, number) : b->code == INT8 ? run(kind, INT8, b, number) : run(kind, INT4, b, number))

static void encode_one(void *context, long number) {
    Blocks *b = context;
    b->kind == BF16 ? FOR_EACH_CODE(encode_plane, BF16) : FOR_EACH_CODE(encode_plane, F32);
}

static void decode_one(void *context, long number) {
    Blocks *b = context;
    b->kind == BF16 ? FOR_EACH_CODE(decode_plane, BF16) : FOR_EACH_CODE(decode_plane, F32);
}
