/* Rounding that keeps the adapter, see lora_merge/rounding/adapter.py, which this follows block by block: the same columns are decided
 * together, in the same order. A line of a matrix does not depend on the others, so lines are what a vector holds.
 *
 * Sums are taken in the order of k and j, with fused multiply-adds: the bits do not depend on the processor.
 */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

/* GCC 12 and clang have the first. */
#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#endif
#endif
#ifndef SHUFFLE
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (__typeof__(a)){__VA_ARGS__})
#endif

#define INLINE static inline __attribute__((always_inline))

/* Columns that are loaded together. No block goes from one strip into the next. */
#define STRIP 64

enum { INTEGERS, FLOATS, BFLOAT16 };

/* The numbers that one code can stand for, see lora_merge/codecs/lattice.py. */
struct lattice {
    int32_t kind;
    float first, last;
    float reach;              /* times a step: by how much a number may be moved */
    float smallest, largest;  /* normal numbers */
    float big;                /* times a power of two: a number whose last bit is the spacing there */
    int32_t shift, below;     /* of the bits of a normal float32, which are its code then */
    float spacings;           /* spacings of numbers that are not normal, in 1 */
};

/* Columns that are decided again. */
struct sweep {
    const int32_t *sizes;
    const float *pulls;   /* [columns, rank] */
    const float *shares;  /* [columns] */
};

/* Lines of codes, and where their values go: (table[code] - zero) * scale. */
struct coded {
    int64_t n_lines, n_columns;
    const uint8_t *codes;
    int64_t code_stride; /* in bytes */
    int32_t bits;        /* 4 or 8 */
    const float *table;  /* [16] or [256] */
    const float *scale;  /* [lines, groups] */
    int64_t scale_stride;
    const float *zero;   /* the same; or NULL for 0 */
    int64_t zero_stride;
    int64_t group;       /* columns of a group; an even number, or all */
    int32_t is_e4m3;     /* what the table says, for an instruction that is quicker */
    float *values;
    int64_t stride;
};

/* Rows of bfloat16, or of a job, to which scale · left · right is added. */
struct product {
    int64_t n_rows, n_columns;
    const uint16_t *base;
    uint16_t *out;
    const float *left;   /* [n_rows, rank] */
    int64_t left_stride; /* between rows */
    const float *right;  /* [rank, n_columns] */
    int64_t right_stride;
    int32_t rank;
    float scale;
};

struct job {
    int64_t n_lines, n_columns;
    const float *values;             /* or NULL: they are computed from the next two */
    int64_t stride;                  /* between lines, in float32 */
    const struct coded *coded;       /* what they are before the change */
    const struct product *product;   /* the change */
    const float *scale, *zero, *bias; /* [lines, groups], or NULL for 1, 0, 0 */
    int64_t scale_stride, zero_stride, bias_stride; /* 0 where lines share them */
    const int32_t *group;            /* of each column */
    struct lattice lattice;
    int32_t rank;
    const int32_t *sizes;            /* of the blocks */
    const float *pulls;              /* [columns, rank]; or NULL: each value becomes the nearest level */
    const float *pushes;             /* [columns, rank] */
    int64_t again;                   /* the first column that is decided again, a multiple of STRIP */
    int32_t n_sweeps;
    const struct sweep *sweeps;
    float *levels;                   /* where there are no codes */
    int64_t stride_out;
    uint8_t *codes;                  /* [lines, code_stride] */
    int64_t code_stride;             /* in bytes */
    int32_t bits, offset;
    const uint8_t *stored;           /* codes whose zeros keep their signs; or NULL */
    float *error;                    /* [lines, rank] */
};

/* Rows of float32, wherever they begin in memory, some columns of which are multiplied by weights. */
struct projected {
    int64_t n_rows, n_groups; /* adjacent groups of columns */
    int64_t pitch;            /* float32 from one group to the next */
    int32_t taken;            /* columns of each group that are multiplied, the first ones */
    const char *values;
    const float *x;           /* [taken] */
    float *products;          /* [n_rows, n_groups] */
    float *lengths;           /* [n_rows], of the group in the middle; or NULL */
};

/* Changes with every change of a struct or a function: `library.py` knows the same number, and leaves a library with another one alone. */
int lines_version(void) { return 5; }

#define PASTE_(a, b) a##b
#define PASTE(a, b) PASTE_(a, b)

#if defined(__x86_64__)

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif
#define LANES 16
#define N(name) PASTE(name, _512)
#include "decoding.inc"
#include "computing.inc"
#include "rounding.inc"
#include "adding.inc"
#include "summing.inc"
#include "projecting.inc"
#undef N
#undef LANES
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
#define LANES 8
#define N(name) PASTE(name, _256)
#include "decoding.inc"
#include "computing.inc"
#include "rounding.inc"
#include "adding.inc"
#include "summing.inc"
#include "projecting.inc"
#undef N
#undef LANES
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

/* Returns the lanes of the widest vectors that this processor has, 0 where it has none that is supported. */
int lines_lanes(void) {
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
        return 16;
    /* Every processor with AVX2 has F16C. */
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? 8 : 0;
}

/* Returns 0, or the number of an error. */
int lines_round(const struct job *job, int lanes) { return lanes == 16 ? round_512(job) : round_256(job); }

int lines_add(const struct product *of, int lanes) { return lanes == 16 ? add_512(of) : add_256(of); }

double lines_squares(const uint16_t *values, int64_t n, int lanes) {
    return lanes == 16 ? squares_512(values, n) : squares_256(values, n);
}

/* Subnormal numbers are zero here: they are slow, and a zero beside another value looks like one. */
void lines_project(const struct projected *of, int lanes) {
    const unsigned before = _mm_getcsr();
    _mm_setcsr(before | 0x8040);
    if (lanes == 16)
        project_512(of);
    else
        project_256(of);
    _mm_setcsr(before);
}

void lines_decode(const struct coded *of, int lanes) {
    if (lanes == 16)
        decode_512(of);
    else
        decode_256(of);
}

#elif defined(__aarch64__)

#define LANES 4
#define N(name) PASTE(name, _128)
#include "decoding.inc"
#include "computing.inc"
#include "rounding.inc"
#include "adding.inc"
#include "summing.inc"
#include "projecting.inc"
#undef N
#undef LANES

int lines_lanes(void) { return 4; }
int lines_round(const struct job *job, int lanes) {
    (void)lanes;
    return round_128(job);
}
int lines_add(const struct product *of, int lanes) {
    (void)lanes;
    return add_128(of);
}
double lines_squares(const uint16_t *values, int64_t n, int lanes) {
    (void)lanes;
    return squares_128(values, n);
}
void lines_project(const struct projected *of, int lanes) {
    (void)lanes;
    uint64_t before;
    __asm__ __volatile__("mrs %0, fpcr" : "=r"(before));
    __asm__ __volatile__("msr fpcr, %0" : : "r"(before | (1 << 24)) : "memory");
    project_128(of);
    __asm__ __volatile__("msr fpcr, %0" : : "r"(before) : "memory");
}
void lines_decode(const struct coded *of, int lanes) {
    (void)lanes;
    decode_128(of);
}

#else

int lines_lanes(void) { return 0; }
int lines_round(const struct job *job, int lanes) {
    (void)job;
    (void)lanes;
    return 1;
}
int lines_add(const struct product *of, int lanes) {
    (void)of;
    (void)lanes;
    return 1;
}
double lines_squares(const uint16_t *values, int64_t n, int lanes) {
    (void)values;
    (void)n;
    (void)lanes;
    return 0;
}
void lines_project(const struct projected *of, int lanes) {
    (void)of;
    (void)lanes;
}
void lines_decode(const struct coded *of, int lanes) {
    (void)of;
    (void)lanes;
}

#endif
