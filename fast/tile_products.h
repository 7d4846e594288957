/* Products of matrices that are stored in tiles, for training (block_tiles.c, head_tiles.c, muon_tiles.c).
 *
 * For a product a b, a is stored in left tiles and b in right tiles, each of 1 KiB in one piece:
 * - left tile (i, k) of a matrix has its rows from 16 i and its columns from 32 k;
 * - right tile (j, k) has its columns from 16 j and its rows from 32 k, two rows at a time, with their numbers alternating.
 * Tiles with the same i or j lie side by side. Transposing each right tile, in elements of 32 bits, gives the left tiles of
 * the transposed matrix. All sizes are multiples of BLOCK.
 */
#include <omp.h>

#include "lanes.h"
#include "tiles.h"
#include "dropout.h"

#define CHUNK 128 /* tokens, or rows, that a thread takes at a time */

#ifdef HAS_TILES

typedef struct {
    uint16_t numbers[SIDE * DEPTH];
} tile;

/* The tiles of a matrix with `numbers` numbers. */
static inline tile *tiles_of(char **memory, long numbers) { return part_of(memory, numbers, sizeof(uint16_t)); }

static inline float *floats_of(char **memory, long numbers) { return part_of(memory, numbers, sizeof(float)); }

/* 32 columns of a row, rounded. */
static inline __m512i rounded(lanes first, lanes second) { return (__m512i)_mm512_cvtne2ps_pbh(second, first); }

/* The place of a number of a matrix with `columns` columns in its left tiles. */
static inline uint16_t *number_at(const tile *left, unsigned long columns, unsigned long row, unsigned long column) {
    const tile *here = left + row / SIDE * (columns / DEPTH) + column / DEPTH;
    return (uint16_t *)here->numbers + row % SIDE * DEPTH + column % DEPTH;
}

/* Store 32 columns of two rows of a matrix (rows, columns) in its left tiles, its right tiles, or both. `row` is even. */
static inline __attribute__((always_inline)) void store_rows(
    __m512i first, __m512i second, tile *left, tile *right, unsigned long rows, unsigned long columns, unsigned long row,
    unsigned long column
) {
    if (left) {
        uint16_t *here = number_at(left, columns, row, column);
        _mm512_storeu_si512(here, first);
        _mm512_storeu_si512(here + DEPTH, second);
    }
    if (right) {
        const __m512i order = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8,
                                               39, 7, 38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
        tile *here = right + column / SIDE * (rows / DEPTH) + row / DEPTH;
        const unsigned long place = row % DEPTH / 2 * DEPTH;
        _mm512_storeu_si512(here->numbers + place, _mm512_permutex2var_epi16(first, order, second));
        _mm512_storeu_si512(here[rows / DEPTH].numbers + place,
                            _mm512_permutex2var_epi16(first, _mm512_add_epi16(order, _mm512_set1_epi16(SIDE)), second));
    }
}

/* The left tiles of a matrix's transpose from its `count` right tiles, or its right tiles from the left ones. */
static inline void transpose_tiles(const tile *from, long count, tile *to) {
    for (long n = 0; n < count; n++) transpose_tile(from + n, SIDE, to + n, SIDE);
}

/* The right tiles of a weight (outputs, inputs), or of its transpose, made by all threads. */
static inline void pack(const float *weight, long outputs, long inputs, int is_transposed, tile *right) {
    const long depth = is_transposed ? inputs / DEPTH : outputs / DEPTH;
#pragma omp for schedule(static)
    for (long j = 0; j < (is_transposed ? outputs : inputs) / SIDE; j++)
        for (long k = 0; k < depth; k++) {
            tile *to = right + j * depth + k, rows;
            for (long i = 0; i < SIDE; i++) {
                const float *here = is_transposed ? weight + (SIDE * j + i) * inputs + DEPTH * k
                                                  : weight + (DEPTH * k + 2 * i) * inputs + SIDE * j;
                const __m512i both = rounded(LOAD(here), LOAD(here + (is_transposed ? SIDE : inputs)));
                _mm512_storeu_si512((is_transposed ? &rows : to)->numbers + i * DEPTH,
                                    is_transposed ? both : alternating(both));
            }
            if (is_transposed) transpose_tile(&rows, SIDE, to, SIDE);
        }
}

/* Add products of tiles to sums of 32 rows and columns, in tile registers 0 to 3. */
static inline void multiply(const tile *a, const tile *b, long depth) {
    for (long k = 0; k < depth; k++) {
        _tile_loadd(4, a + k, 64);
        _tile_loadd(5, a + depth + k, 64);
        _tile_loadd(6, b + k, 64);
        _tile_loadd(7, b + depth + k, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
}

/* What is done with sums (BLOCK, BLOCK) from `row` and `column` on. */
typedef void (*store_sums)(const void *how, long row, long column, const float *sums);

/* a b for a (rows, inner) and b (inner, columns), which `store` gets block by block. */
static inline void product(
    const tile *a, long rows, const tile *b, long columns, long inner, store_sums store, const void *how
) {
    const long depth = inner / DEPTH;
    float sums[BLOCK * BLOCK] __attribute__((aligned(64)));
    for (long j = 0; j < columns; j += BLOCK)
        for (long i = 0; i < rows; i += BLOCK) {
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            _tile_zero(3);
            multiply(a + i / SIDE * depth, b + j / SIDE * depth, depth);
            _tile_stored(0, sums, 4 * BLOCK);
            _tile_stored(1, sums + SIDE, 4 * BLOCK);
            _tile_stored(2, sums + SIDE * BLOCK, 4 * BLOCK);
            _tile_stored(3, sums + SIDE * BLOCK + SIDE, 4 * BLOCK);
            store(how, i, j, sums);
        }
}

/* sums (rows, columns) += a b. A block of 32 x 32 sums is in one piece, and so is each of its four tiles. */
static inline void accumulate(const tile *a, long rows, const tile *b, long columns, long inner, float *sums) {
    const long depth = inner / DEPTH;
    for (long i = 0; i < rows; i += BLOCK)
        for (long j = 0; j < columns; j += BLOCK, sums += BLOCK * BLOCK) {
            _tile_loadd(0, sums, 64);
            _tile_loadd(1, sums + SIDE * SIDE, 64);
            _tile_loadd(2, sums + 2 * SIDE * SIDE, 64);
            _tile_loadd(3, sums + 3 * SIDE * SIDE, 64);
            multiply(a + i / SIDE * depth, b + j / SIDE * depth, depth);
            _tile_stored(0, sums, 64);
            _tile_stored(1, sums + SIDE * SIDE, 64);
            _tile_stored(2, sums + 2 * SIDE * SIDE, 64);
            _tile_stored(3, sums + 3 * SIDE * SIDE, 64);
        }
}

/* to = the threads' sums (rows, columns) of `accumulate`, or their transpose, made by all threads; those of the next thread
 * are `step` bytes further. */
static inline void add_up(const float *sums, long step, long rows, long columns, int is_transposed, float *to) {
    const long threads = omp_get_num_threads();
#pragma omp for schedule(static)
    for (long n = 0; n < rows / SIDE * (columns / SIDE); n++) {
        const long i = n / (columns / SIDE), j = n % (columns / SIDE);
        const long first = (i / 2 * (columns / BLOCK) + j / 2) * BLOCK * BLOCK + (i % 2 * 2 + j % 2) * SIDE * SIDE;
        float total[SIDE][SIDE];
        for (long row = 0; row < SIDE; row++) {
            lanes sum = ZERO;
            for (long thread = 0; thread < threads; thread++)
                sum = ADD(sum, LOAD((const float *)((const char *)sums + thread * step) + first + row * SIDE));
            STORE(is_transposed ? total[row] : to + (i * SIDE + row) * columns + j * SIDE, sum);
        }
        if (is_transposed) transpose_tile(total, SIDE, to + j * SIDE * rows + i * SIDE, rows);
    }
}

/* The same for vectors. */
static inline void add_up_vectors(const float *sums, long step, long length, float *to) {
    const long threads = omp_get_num_threads();
    if (!to) return;
#pragma omp for schedule(static)
    for (long n = 0; n < length; n += LANES) {
        lanes sum = ZERO;
        for (long thread = 0; thread < threads; thread++)
            sum = ADD(sum, LOAD((const float *)((const char *)sums + thread * step) + n));
        STORE(to + n, sum);
    }
}

/* A matrix (rows, columns) of float32 or bfloat16 numbers. If there is `dropout`, it is applied to them; `index` is that of
 * the first number. */
struct rows_from {
    const float *floats;
    const uint16_t *bfloat16s;
    const struct dropout *dropout;
    uint32_t index;
};

/* 32 numbers of such a matrix, rounded; adds them to `sums`. */
static inline __m512i packed(const struct rows_from *x, long here, lanes *sums) {
    lanes numbers[2];
    for (long part = 0; part < 2; part++) {
        const long at = here + part * LANES;
        numbers[part] = x->floats ? LOAD(x->floats + at) : FROM_BFLOAT16(x->bfloat16s + at);
        if (x->dropout) numbers[part] = dropped(x->dropout, x->index + at, 1, numbers[part]);
        sums[part] = ADD(sums[part], numbers[part]);
    }
    return x->floats ? rounded(numbers[0], numbers[1]) : _mm512_loadu_si512(x->bfloat16s + here);
}

/* Store a matrix (rows, columns) in tiles, and add up its columns if `sums` is given. */
static inline __attribute__((always_inline)) void pack_rows(
    struct rows_from x, long rows, long columns, tile *left, tile *right, float *sums
) {
    for (long column = 0; column < columns; column += DEPTH) {
        lanes own[2] = {ZERO, ZERO};
        for (long row = 0; row < rows; row += 2) {
            const __m512i first = packed(&x, row * columns + column, own);
            const __m512i second = packed(&x, (row + 1) * columns + column, own);
            store_rows(first, second, left, right, rows, columns, row, column);
        }
        if (!sums) continue;
        STORE(sums + column, ADD(LOAD(sums + column), own[0]));
        STORE(sums + column + LANES, ADD(LOAD(sums + column + LANES), own[1]));
    }
}
#endif
