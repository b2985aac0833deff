/* Q4_K, Q5_K and Q6_K without importance matrix: the bytes of ggml-quants.c, several times faster.
 *
 *   cc -O3 -fPIC -shared -ffp-contract=off export/fast_quants.c -o fast_quants.so   (scripts/setup.sh does it)
 *
 * One SIMD lane works on one sub-block (32 weights, 16 for Q6_K) and does the float operations of the scalar
 * code in their order; a branch there is a selection here. Nothing is reassociated and nothing may be fused
 * (hence -ffp-contract=off, and never -ffast-math), so every rounding is the same. This file includes itself
 * once for each instruction set, and the CPU is asked before one is used.
 *
 * The algorithms, the block layouts and the float16 conversions are those of llama.cpp's
 * ggml-quants.c, ggml-common.h and ggml-impl.h:
 *
 * MIT License. Copyright (c) 2023-2026 The ggml authors.
 * Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated
 * documentation files (the "Software"), to deal in the Software without restriction, including without
 * limitation the rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the
 * Software, and to permit persons to whom the Software is furnished to do so, subject to the following
 * conditions:
 * The above copyright notice and this permission notice shall be included in all copies or substantial portions
 * of the Software.
 * THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED
 * TO THE WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL
 * THE AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF
 * CONTRACT, TORT OR OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER
 * DEALINGS IN THE SOFTWARE.
 */
#ifndef LANES
#ifndef __x86_64__
#error "fast_quants.c is for x86-64; elsewhere the library's own functions are used"
#endif
#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#define BLOCK 256          /* QK_K */
#define MAGIC 12582912.f   /* nearest_int: 1.5 * 2^23, its last bits are the integer */
#define GROUP_MAX_EPS 1e-15f
#define INLINE static inline __attribute__((always_inline))
#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define MAX(a, b) ((a) > (b) ? (a) : (b))
typedef struct { uint16_t d, dmin; uint8_t scales[12], qs[BLOCK / 2]; } block_q4_K;
typedef struct { uint16_t d, dmin; uint8_t scales[12], qh[BLOCK / 8], qs[BLOCK / 2]; } block_q5_K;
typedef struct { uint8_t ql[BLOCK / 2], qh[BLOCK / 4]; int8_t scales[16]; uint16_t d; } block_q6_K;

INLINE uint32_t bits_of(float f) { uint32_t i; memcpy(&i, &f, 4); return i; }
INLINE float float_of(uint32_t i) { float f; memcpy(&f, &i, 4); return f; }

/* Also where |f| is too large or NaN: then the library takes what these bits happen to be. */
INLINE int nearest_int(float f) { return (int)(bits_of(f + MAGIC) & 0x007fffff) - 0x00400000; }

INLINE uint16_t to_half(float f) {
    float base = (fabsf(f) * 0x1.0p+112f) * 0x1.0p-110f;
    const uint32_t w = bits_of(f), shl1_w = w + w, sign = w & 0x80000000u;
    const uint32_t bias = MAX(shl1_w & 0xFF000000u, 0x71000000u);
    base = float_of((bias >> 1) + 0x07800000u) + base;
    const uint32_t bits = bits_of(base), nonsign = ((bits >> 13) & 0x7C00u) + (bits & 0x0FFFu);
    return (uint16_t)((sign >> 16) | (shl1_w > 0xFF000000u ? 0x7E00u : nonsign));
}

INLINE float from_half(uint16_t h) {
    const uint32_t w = (uint32_t)h << 16, sign = w & 0x80000000u, two_w = w + w;
    const float normalized = float_of((two_w >> 4) + (0xE0u << 23)) * 0x1.0p-112f;
    const float denormalized = float_of((two_w >> 17) | (126u << 23)) - 0.5f;
    return float_of(sign | bits_of(two_w < (1u << 27) ? denormalized : normalized));
}

/* What a search leaves for each sub-block. The library keeps the levels of its best step too, but
 * they only count where the rounded scale is zero: there they are made again from its iscale and min. */
typedef struct { float scale, min, iscale, step_min; } found;

/* The last loops of quantize_row_q4_K_ref and quantize_row_q5_K_ref, over one block. */
INLINE void scales_and_levels(const float *x, const found *f, int nmax, uint16_t *d_out,
                              uint16_t *dmin_out, uint8_t *packed, uint8_t *L) {
    float max_scale = 0, max_min = 0;
    uint8_t ls[8], lm[8];
    for (int j = 0; j < 8; ++j) {
        if (f[j].scale > max_scale) max_scale = f[j].scale;
        if (f[j].min > max_min) max_min = f[j].min;
    }
    const float inv_scale = max_scale > 0 ? 63.f / max_scale : 0.f;
    const float inv_min = max_min > 0 ? 63.f / max_min : 0.f;
    for (int j = 0; j < 8; ++j) {
        const uint8_t s = (uint8_t)nearest_int(inv_scale * f[j].scale);
        const uint8_t m = (uint8_t)nearest_int(inv_min * f[j].min);
        ls[j] = MIN(63, s), lm[j] = MIN(63, m);
    }
    for (int j = 0; j < 4; ++j) {
        packed[j] = (uint8_t)(ls[j] | (ls[j + 4] >> 4) << 6);
        packed[j + 4] = (uint8_t)(lm[j] | (lm[j + 4] >> 4) << 6);
        packed[j + 8] = (uint8_t)((ls[j + 4] & 0xF) | (lm[j + 4] & 0xF) << 4);
    }
    *d_out = to_half(max_scale / 63.f);
    *dmin_out = to_half(max_min / 63.f);
    for (int j = 0; j < 8; ++j, x += 32, L += 32) {
        const float d = from_half(*d_out) * ls[j], dm = from_half(*dmin_out) * lm[j];
        float v[32];
        if (d != 0) for (int i = 0; i < 32; ++i) v[i] = (x[i] + dm) / d;
        else for (int i = 0; i < 32; ++i) v[i] = f[j].iscale * (x[i] - f[j].step_min);
        for (int i = 0; i < 32; ++i) {
            const int l = nearest_int(v[i]);
            L[i] = (uint8_t)MAX(0, MIN(nmax, l));
        }
    }
}

INLINE void finish_q4_K(const float *x, const found *f, block_q4_K *y) {
    uint8_t L[BLOCK];
    scales_and_levels(x, f, 15, &y->d, &y->dmin, y->scales, L);
    for (int j = 0; j < 4; ++j)
        for (int l = 0; l < 32; ++l)
            y->qs[32 * j + l] = (uint8_t)(L[64 * j + l] | L[64 * j + l + 32] << 4);
}

INLINE void finish_q5_K(const float *x, const found *f, block_q5_K *y) {
    uint8_t L[BLOCK];
    scales_and_levels(x, f, 31, &y->d, &y->dmin, y->scales, L);
    memset(y->qh, 0, sizeof y->qh);
    for (int j = 0; j < 4; ++j)
        for (int l = 0; l < 32; ++l) {
            const uint8_t l1 = L[64 * j + l], l2 = L[64 * j + l + 32];
            y->qs[32 * j + l] = (uint8_t)((l1 & 0xF) | (l2 & 0xF) << 4);
            y->qh[l] |= (uint8_t)((l1 >> 4 | (l2 >> 4) << 1) << 2 * j);
        }
}

/* The last loops of quantize_row_q6_K_ref, over one block. */
INLINE void finish_q6_K(const float *x, const found *f, block_q6_K *y) {
    float max_scale = 0, max_abs_scale = 0;
    uint8_t L[BLOCK];
    for (int j = 0; j < 16; ++j) {
        const float abs_scale = fabsf(f[j].scale);
        if (abs_scale > max_abs_scale) { max_abs_scale = abs_scale; max_scale = f[j].scale; }
    }
    memset(y, 0, sizeof *y);
    if (max_abs_scale < GROUP_MAX_EPS) return;
    const float iscale = -128.f / max_scale;
    y->d = to_half(1 / iscale);
    for (int j = 0; j < 16; ++j) {
        y->scales[j] = (int8_t)MIN(127, nearest_int(iscale * f[j].scale));
        const float d = from_half(y->d) * y->scales[j];
        /* A sub-block of zeros (its iscale is 0) keeps level 0, which is not the level of a zero. */
        const int offset = d != 0 || f[j].iscale != 0 ? 32 : 0;
        float v[16];
        if (d != 0) for (int i = 0; i < 16; ++i) v[i] = x[16 * j + i] / d;
        else for (int i = 0; i < 16; ++i) v[i] = x[16 * j + i] * f[j].iscale;
        for (int i = 0; i < 16; ++i) {
            const int l = nearest_int(v[i]);
            L[16 * j + i] = (uint8_t)(MAX(-32, MIN(31, l)) + offset);
        }
    }
    for (int j = 0; j < 2; ++j)
        for (int l = 0; l < 32; ++l) {
            const uint8_t *q = L + 128 * j + l;
            y->ql[64 * j + l] = (uint8_t)((q[0] & 0xF) | (q[64] & 0xF) << 4);
            y->ql[64 * j + l + 32] = (uint8_t)((q[32] & 0xF) | (q[96] & 0xF) << 4);
            y->qh[32 * j + l] =
                (uint8_t)(q[0] >> 4 | (q[32] >> 4) << 2 | (q[64] >> 4) << 4 | (q[96] >> 4) << 6);
        }
}

#define GLUE_(name, lanes) name##_##lanes
#define GLUE(name, lanes) GLUE_(name, lanes)
#define NAME(name) GLUE(name, LANES)
#define VF NAME(floats)
#define VI NAME(ints)
#define SAME(value) ((value) - (VF){0}) /* in every lane */
#define CHOOSE(mask, a, b) ((VF)(((mask) & (VI)(a)) | (~(mask) & (VI)(b))))
#define ABS(a) ((VF)((VI)(a) & 0x7fffffff))
#define ROUND(a) (((VI)((a) + MAGIC) & 0x007fffff) - 0x00400000) /* nearest_int */
#define CLAMP(a, lo, hi) MAXI(MINI(a, (VI){0} + (hi)), (VI){0} + (lo))

#define LANES 8
#define TARGET __attribute__((target("avx2")))
#define MAXI(a, b) ((VI)_mm256_max_epi32((__m256i)(a), (__m256i)(b)))
#define MINI(a, b) ((VI)_mm256_min_epi32((__m256i)(a), (__m256i)(b)))
#define TO_FLOAT(a) ((VF)_mm256_cvtepi32_ps((__m256i)(a)))
#define SQRT(a) ((VF)_mm256_sqrt_ps((__m256)(a)))
#include "fast_quants.c"

#define LANES 16
#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl")))
#define MAXI(a, b) ((VI)_mm512_max_epi32((__m512i)(a), (__m512i)(b)))
#define MINI(a, b) ((VI)_mm512_min_epi32((__m512i)(a), (__m512i)(b)))
#define TO_FLOAT(a) ((VF)_mm512_cvtepi32_ps((__m512i)(a)))
#define SQRT(a) ((VF)_mm512_sqrt_ps((__m512)(a)))
#include "fast_quants.c"

/* The lanes of this CPU's instructions; 0 if it has none of the two sets. */
static int lanes(void) {
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) return 16;
    return __builtin_cpu_supports("avx2") ? 8 : 0;
}

/* Give the bytes written; 0: nothing was done, for want of a CPU. */
#define EXPORTED(type, block)                                                                     \
    size_t tf_quantize_##type(const float *rows, void *out, int64_t nrows, int64_t width) {       \
        const int n = lanes();                                                                    \
        const int64_t nblocks = nrows * width / BLOCK;                                            \
        if (n == 16) quantize_##type##_16(rows, out, nblocks);                                    \
        else if (n == 8) quantize_##type##_8(rows, out, nblocks);                                 \
        return n ? nblocks * sizeof(block) : 0;                                                   \
    }
EXPORTED(q4_K, block_q4_K)
EXPORTED(q5_K, block_q5_K)
EXPORTED(q6_K, block_q6_K)

#else /* LANES is set: the part that is compiled once for each instruction set */

typedef float VF __attribute__((vector_size(4 * LANES)));
typedef int32_t VI __attribute__((vector_size(4 * LANES)));

/* Weight i of LANES sub-blocks of n, side by side. */
TARGET INLINE void NAME(side_by_side)(const float *x, int n, VF *out) {
    for (int i = 0; i < n; ++i)
        for (int k = 0; k < LANES; ++k) ((float *)out)[LANES * i + k] = x[n * k + i];
}

TARGET INLINE void NAME(give)(VF scale, VF min, VF iscale, VF step_min, found *out) {
    for (int k = 0; k < LANES; ++k) out[k] = (found){scale[k], min[k], iscale[k], step_min[k]};
}

/* make_qkx2_quants with its weights: LANES sub-blocks of 32. */
TARGET INLINE void NAME(search_qkx2)(const float *rows, int nmax, float rmin, int nstep, found *out) {
    VF x[32], w[32], sum_x2 = {0};
    NAME(side_by_side)(rows, 32, x);
    for (int i = 0; i < 32; ++i) sum_x2 += x[i] * x[i];
    const VF av_x = SQRT(sum_x2 / 32);
    VF min = x[0], max = x[0], sum_w = {0}, sum_x = {0};
    for (int i = 0; i < 32; ++i) {
        min = CHOOSE(x[i] < min, x[i], min);
        max = CHOOSE(x[i] > max, x[i], max);
        w[i] = av_x + ABS(x[i]);
        sum_w = i ? sum_w + w[i] : w[i];
        sum_x = i ? sum_x + w[i] * x[i] : w[i] * x[i];
    }
    min = CHOOSE(min > 0, (VF){0}, min);
    const VF first_min = min;
    const VI constant = max == min;
    VF iscale = SAME((float)nmax) / (max - min), scale = 1 / iscale, best_error = {0};
    for (int i = 0; i < 32; ++i) {
        const VF l = TO_FLOAT(CLAMP(ROUND(iscale * (x[i] - min)), 0, nmax));
        const VF diff = scale * l + min - x[i];
        best_error += w[i] * (diff * diff);
    }
    VF best_iscale = iscale, step_min = min, L[32];
    for (int is = 0; is <= nstep; ++is) {
        iscale = SAME(rmin + 0.1f * is + nmax) / (max - min);
        VF sum_l = {0}, sum_l2 = {0}, sum_xl = {0}, cur_error = {0};
        for (int i = 0; i < 32; ++i) {
            const VF l = TO_FLOAT(CLAMP(ROUND(iscale * (x[i] - min)), 0, nmax)), wl = w[i] * l;
            L[i] = l;
            sum_l += wl;
            sum_l2 += wl * l;
            sum_xl += wl * x[i];
        }
        const VF D = sum_w * sum_l2 - sum_l * sum_l;
        VF this_scale = (sum_w * sum_xl - sum_x * sum_l) / D;
        VF this_min = (sum_l2 * sum_x - sum_l * sum_xl) / D;
        const VI above = this_min > 0;
        this_scale = CHOOSE(above, sum_xl / sum_l2, this_scale);
        this_min = CHOOSE(above, (VF){0}, this_min);
        for (int i = 0; i < 32; ++i) {
            const VF diff = this_scale * L[i] + this_min - x[i];
            cur_error += w[i] * (diff * diff);
        }
        const VI better = (D > 0) & (cur_error < best_error);
        best_iscale = CHOOSE(better, iscale, best_iscale);
        step_min = CHOOSE(better, min, step_min);
        best_error = CHOOSE(better, cur_error, best_error);
        scale = CHOOSE(better, this_scale, scale);
        min = CHOOSE(better, this_min, min); /* the next steps start from it, as the library's do */
    }
    scale = CHOOSE(constant, (VF){0}, scale);
    best_iscale = CHOOSE(constant, (VF){0}, best_iscale);
    min = CHOOSE(constant, first_min, min);
    NAME(give)(scale, -min, best_iscale, step_min, out);
}

/* make_qx_quants(16, 32, x, L, 1, NULL): LANES sub-blocks of 16. */
TARGET INLINE void NAME(search_qx)(const float *rows, found *out) {
    VF x[16], w[16], wx[16];
    NAME(side_by_side)(rows, 16, x);
    VF max = {0}, amax = {0}, scale = {0}, best = {0}, best_iscale = {0};
    for (int i = 0; i < 16; ++i) {
        const VI larger = ABS(x[i]) > amax;
        amax = CHOOSE(larger, ABS(x[i]), amax);
        max = CHOOSE(larger, x[i], max);
        w[i] = x[i] * x[i];
        wx[i] = w[i] * x[i];
    }
    for (int step = 0; step < 19; ++step) {
        const int is = step == 0 ? 0 : step <= 9 ? step - 10 : step - 9; /* 0 first, then -9 to 9 */
        const VF iscale = SAME(-(32 + 0.1f * is)) / max;
        VF sumlx = {0}, suml2 = {0};
        for (int i = 0; i < 16; ++i) {
            const VF l = TO_FLOAT(CLAMP(ROUND(iscale * x[i]), -32, 31));
            sumlx += wx[i] * l;
            suml2 += w[i] * l * l;
        }
        const VF this_scale = sumlx / suml2;
        if (step == 0) {
            scale = CHOOSE(suml2 != 0, this_scale, (VF){0});
            best = scale * sumlx;
            best_iscale = iscale;
        } else {
            const VI better = (suml2 > 0) & (sumlx * sumlx > best * suml2);
            scale = CHOOSE(better, this_scale, scale);
            best = CHOOSE(better, this_scale * sumlx, best);
            best_iscale = CHOOSE(better, iscale, best_iscale);
        }
    }
    const VI zeros = amax < GROUP_MAX_EPS;
    scale = CHOOSE(zeros, (VF){0}, scale);
    best_iscale = CHOOSE(zeros, (VF){0}, best_iscale);
    NAME(give)(scale, (VF){0}, best_iscale, (VF){0}, out);
}

/* LANES / 8 blocks at a time; where fewer are left, zeros fill the lanes. */
#define QUANTIZE_QKX2(type, nmax, rmin, nstep)                                                    \
    TARGET static void NAME(quantize_##type)(const float *x, block_##type *y, int64_t nblocks) {  \
        float padded[32 * LANES] = {0};                                                           \
        found f[LANES];                                                                           \
        for (int64_t n; nblocks > 0; nblocks -= n, x += n * BLOCK, y += n) {                      \
            n = MIN(nblocks, LANES / 8);                                                          \
            if (n < LANES / 8) memcpy(padded, x, n * BLOCK * sizeof *x);                          \
            NAME(search_qkx2)(n < LANES / 8 ? padded : x, nmax, rmin, nstep, f);                  \
            for (int j = 0; j < n; ++j) finish_##type(x + BLOCK * j, f + 8 * j, y + j);           \
        }                                                                                         \
    }
QUANTIZE_QKX2(q4_K, 15, -1.f, 20)
QUANTIZE_QKX2(q5_K, 31, -0.5f, 15)

TARGET static void NAME(quantize_q6_K)(const float *x, block_q6_K *y, int64_t nblocks) {
    found f[16];
    for (; nblocks > 0; --nblocks, x += BLOCK, ++y) {
        for (int j = 0; j < 16; j += LANES) NAME(search_qx)(x + 16 * j, f + j);
        finish_q6_K(x, f, y);
    }
}

#undef LANES
#undef TARGET
#undef MAXI
#undef MINI
#undef TO_FLOAT
#undef SQRT
#endif
