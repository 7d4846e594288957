/* Muon's step: the momentum, the Newton-Schulz iteration for several matrices in bfloat16, in products of AMX tiles, and the
 * update of the weights.
 *
 * A step of the iteration has three products: square = x x', then polynomial = b square + c square square, then
 * x = a x + polynomial x. All threads share the rows of all matrices, and wait for each other after each product.
 *
 * Parallel regions run on the OpenMP library that torch has loaded, so both share its threads.
 */
#include <math.h>
#include <omp.h>

#include "tile_products.h"

struct iteration {
    long count, rows, columns, steps, threads; /* `count` matrices (rows, columns) */
    float a, b, c, eps;
};

#ifdef HAS_TILES

/* momentum = (1 - share) momentum + share grad, for `count` numbers. `update` gets its direction, rounded: with Nesterov's
 * method, (1 - share) momentum + share grad once more. */
void write_direction(
    const float *grad, float *momentum, uint16_t *update, long count, float share, int nesterov, long threads
) {
    const lanes factor = SAME(share);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long n = 0; n < count; n += LANES) {
        const lanes here = LOAD(grad + n), before = LOAD(momentum + n);
        const lanes after = ADD_PRODUCT(factor, _mm512_sub_ps(here, before), before);
        STORE(momentum + n, after);
        store_bfloat16(update + n, nesterov ? ADD_PRODUCT(factor, _mm512_sub_ps(here, after), after) : after);
    }
}

/* weight = decay weight - rate update. */
void apply_update(float *weight, const uint16_t *update, long count, float decay, float rate, long threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long n = 0; n < count; n += LANES)
        STORE(weight + n, ADD_PRODUCT(SAME(-rate), FROM_BFLOAT16(update + n), MULTIPLY(SAME(decay), LOAD(weight + n))));
}

/* A matrix's tiles in a step. `transposed` are the right tiles of its transpose. */
struct matrix {
    tile *x, *transposed, *x_right[2];        /* the right tiles of this step and of the next one */
    tile *square, *square_right, *polynomial; /* (rows, rows) */
};

long iteration_memory_bytes(const struct iteration *all) {
    return all->count * all->rows * (4 * all->columns + 3 * all->rows) * sizeof(uint16_t);
}

static struct matrix matrix_at(const struct iteration *all, long number, char *memory) {
    const long numbers = all->rows * all->columns, squares = all->rows * all->rows;
    struct matrix matrix;
    memory += number * (iteration_memory_bytes(all) / all->count);
    matrix.x = tiles_of(&memory, numbers);
    matrix.transposed = tiles_of(&memory, numbers);
    matrix.x_right[0] = tiles_of(&memory, numbers);
    matrix.x_right[1] = tiles_of(&memory, numbers);
    matrix.square = tiles_of(&memory, squares);
    matrix.square_right = tiles_of(&memory, squares);
    matrix.polynomial = tiles_of(&memory, squares);
    return matrix;
}

/* Where a product's sums go, for BLOCK rows from `first` on: to = factor sums + other_factor other, rounded. */
struct target {
    const tile *other; /* left tiles, as `to` */
    tile *to, *to_right;
    float factor, other_factor;
    long first, rows, columns;
};

static void store_products(const void *how, long row, long column, const float *sums) {
    const struct target *to = how;
    for (long i = 0; i < BLOCK; i += 2) {
        const long here = to->first + row + i;
        __m512i numbers[2];
        for (long next = 0; next < 2; next++, sums += BLOCK) {
            lanes halves[2];
            for (long part = 0; part < 2; part++) {
                halves[part] = MULTIPLY(LOAD(sums + part * LANES), SAME(to->factor));
                if (!to->other) continue;
                const uint16_t *other = number_at(to->other, to->columns, here + next, column + part * LANES);
                halves[part] = ADD_PRODUCT(FROM_BFLOAT16(other), SAME(to->other_factor), halves[part]);
            }
            numbers[next] = rounded(halves[0], halves[1]);
        }
        store_rows(numbers[0], numbers[1], to->to, to->to_right, to->rows, to->columns, here, column);
    }
}

/* The tiles of numbers (rows, columns), divided by their norm. */
static void start(const struct iteration *all, const uint16_t *numbers, struct matrix matrix) {
    lanes squares = ZERO;
    for (long n = 0; n < all->rows * all->columns; n += LANES) {
        const lanes here = FROM_BFLOAT16(numbers + n);
        squares = ADD_PRODUCT(here, here, squares);
    }
    const lanes factor = SAME(1 / fmaxf(sqrtf(SUM(squares)), all->eps));
    for (long row = 0; row < all->rows; row += 2)
        for (long column = 0; column < all->columns; column += DEPTH) {
            __m512i both[2];
            for (long next = 0; next < 2; next++) {
                const uint16_t *here = numbers + (row + next) * all->columns + column;
                both[next] = rounded(MULTIPLY(FROM_BFLOAT16(here), factor), MULTIPLY(FROM_BFLOAT16(here + LANES), factor));
            }
            store_rows(both[0], both[1], matrix.x, matrix.x_right[0], all->rows, all->columns, row, column);
        }
    transpose_tiles(matrix.x, all->rows * all->columns / (SIDE * DEPTH), matrix.transposed);
}

/* numbers (count, rows, columns) with all singular values made nearly one, in place. */
void orthogonalise(const struct iteration *all, uint16_t *numbers, char *memory) {
    const long rows = all->rows, columns = all->columns, blocks = rows / BLOCK;
    const long strip = BLOCK * columns / (SIDE * DEPTH), square_strip = BLOCK * rows / (SIDE * DEPTH); /* tiles */
#pragma omp parallel num_threads(all->threads)
    {
        use_tiles();
#pragma omp for schedule(static)
        for (long n = 0; n < all->count; n++) start(all, numbers + n * rows * columns, matrix_at(all, n, memory));
        for (long step = 0; step < all->steps; step++) {
#pragma omp for collapse(2) schedule(static)
            for (long n = 0; n < all->count; n++)
                for (long block = 0; block < blocks; block++) {
                    const struct matrix matrix = matrix_at(all, n, memory);
                    const struct target to = {0, matrix.square, matrix.square_right, 1, 0, block * BLOCK, rows, rows};
                    product(matrix.x + block * strip, BLOCK, matrix.transposed, rows, columns, store_products, &to);
                }
#pragma omp for collapse(2) schedule(static)
            for (long n = 0; n < all->count; n++)
                for (long block = 0; block < blocks; block++) {
                    const struct matrix matrix = matrix_at(all, n, memory);
                    const tile *square = matrix.square + block * square_strip;
                    const struct target to = {
                        matrix.square, matrix.polynomial, 0, all->c, all->b, block * BLOCK, rows, rows};
                    product(square, BLOCK, matrix.square_right, rows, rows, store_products, &to);
                }
#pragma omp for collapse(2) schedule(static)
            for (long n = 0; n < all->count; n++)
                for (long block = 0; block < blocks; block++) {
                    const struct matrix matrix = matrix_at(all, n, memory);
                    const struct target to = {
                        matrix.x, matrix.x, matrix.x_right[(step + 1) % 2], 1, all->a, block * BLOCK, rows, columns};
                    product(matrix.polynomial + block * square_strip, BLOCK, matrix.x_right[step % 2], columns, rows,
                            store_products, &to);
                    transpose_tiles(matrix.x + block * strip, strip, matrix.transposed + block * strip);
                }
        }
        _tile_release();
#pragma omp for collapse(2) schedule(static)
        for (long n = 0; n < all->count; n++)
            for (long row = 0; row < rows; row++) {
                const tile *x = matrix_at(all, n, memory).x + row / SIDE * (columns / DEPTH);
                for (long column = 0; column < columns; column += DEPTH)
                    _mm512_storeu_si512(numbers + (n * rows + row) * columns + column,
                                        _mm512_loadu_si512(x[column / DEPTH].numbers + row % SIDE * DEPTH));
            }
    }
}
#endif
