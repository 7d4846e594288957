/* AMX: products of matrices in tiles of 16 rows of 64 bytes, here of bfloat16 with sums in float32. */
#define SIDE 16  /* rows of a tile, and numbers in a row of sums */
#define DEPTH 32 /* bfloat16 numbers in a row of a tile */
#define BLOCK (2 * SIDE) /* rows and columns of a product that are computed at a time, in four tiles */

#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__linux__)
#define HAS_TILES
#include <immintrin.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <unistd.h>

/* Whether the system lets this process use the tiles; Linux has to be asked for them. */
static inline int may_use_tiles(void) {
    const long arch_req_xcomp_perm = 0x1023, xfeature_xtiledata = 18;
    return syscall(SYS_arch_prctl, arch_req_xcomp_perm, xfeature_xtiledata) == 0;
}

/* Give each of this thread's 8 tiles 16 rows of 64 bytes, until _tile_release(). */
static inline void use_tiles(void) {
    const struct { uint8_t palette, start_row, reserved[14]; uint16_t row_bytes[16]; uint8_t rows[16]; } shape = {
        .palette = 1,
        .row_bytes = {64, 64, 64, 64, 64, 64, 64, 64},
        .rows = {SIDE, SIDE, SIDE, SIDE, SIDE, SIDE, SIDE, SIDE}};
    _tile_loadconfig(&shape);
}

/* Memory for `count` elements of `bytes` each, from what is left at `next`. */
static inline void *part_of(char **next, long count, long bytes) {
    char *start = *next;
    *next += count * bytes;
    return start;
}

/* The transpose of 16 rows of 16 elements of 32 bits. */
static inline void transpose_tile(const void *from, long from_row, void *to, long to_row) {
    __m512i rows[SIDE], mixed[SIDE];
    for (int i = 0; i < SIDE; i++) rows[i] = _mm512_loadu_si512((const uint32_t *)from + i * from_row);
    for (int i = 0; i < SIDE; i += 2) { /* pairs of elements of neighbouring rows */
        mixed[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
        mixed[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
    }
    for (int i = 0; i < SIDE; i += 4) /* four elements of a column, in each quarter of a vector */
        for (int half = 0; half < 2; half++) {
            rows[i + 2 * half] = _mm512_unpacklo_epi64(mixed[i + half], mixed[i + half + 2]);
            rows[i + 2 * half + 1] = _mm512_unpackhi_epi64(mixed[i + half], mixed[i + half + 2]);
        }
    for (int i = 0; i < 4; i++) /* quarters 0 and 2, or 1 and 3, of eight rows */
        for (int half = 0; half < 2; half++) {
            const __m512i upper = rows[8 * half + i], lower = rows[8 * half + i + 4];
            mixed[8 * half + i] = _mm512_shuffle_i32x4(upper, lower, 0x88);
            mixed[8 * half + i + 4] = _mm512_shuffle_i32x4(upper, lower, 0xdd);
        }
    for (int i = 0; i < 8; i++) {
        _mm512_storeu_si512((uint32_t *)to + i * to_row, _mm512_shuffle_i32x4(mixed[i], mixed[i + 8], 0x88));
        _mm512_storeu_si512((uint32_t *)to + (i + 8) * to_row, _mm512_shuffle_i32x4(mixed[i], mixed[i + 8], 0xdd));
    }
}

/* The rows of two matrices, 16 numbers each, with their numbers alternating. */
static inline __m512i alternating(__m512i first_then_second) {
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,
                                           23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_permutexvar_epi16(order, first_then_second);
}

#define LOG2_E 1.44269504f
#define LEAST -125.0f /* of an exponent: smaller powers are subnormal, which takes many times as long */

/* 2^x, accurate to 18 bits: a polynomial of x - floor(x), fitted to the smallest relative error. bfloat16 keeps 8 bits. */
static inline __m512 powers_of_2(__m512 x) {
    const __m512 rest = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    __m512 series = _mm512_set1_ps(0.0135341676f);
    series = _mm512_fmadd_ps(series, rest, _mm512_set1_ps(0.0520114612f));
    series = _mm512_fmadd_ps(series, rest, _mm512_set1_ps(0.241442757f));
    series = _mm512_fmadd_ps(series, rest, _mm512_set1_ps(0.693003835f));
    series = _mm512_fmadd_ps(series, rest, _mm512_set1_ps(1.00000259f));
    return _mm512_scalef_ps(series, x); /* times 2^floor(x) */
}

/* 16 numbers, rounded. */
static inline void store_bfloat16(uint16_t *to, lanes numbers) {
    _mm256_storeu_si256((__m256i *)to, (__m256i)_mm512_cvtneps_pbh(numbers));
}
#else
static inline int may_use_tiles(void) { return 0; }
#endif
