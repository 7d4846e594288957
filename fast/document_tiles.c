/* Attention within a document in bfloat16, in products of AMX tiles. Sums and the softmax are in float32.
 *
 * For a product a b, AMX reads b two rows at a time, with the numbers of the two rows alternating; a pair of them is an
 * element of 32 bits. `x_pairs` holds a matrix x in this layout, `x_columns` its transpose.
 *
 * The forward pass computes the scores of 32 queries at a time as (queries, keys). The backward pass computes those of 32
 * keys as (keys, queries): in this layout they are the left matrix in the products for the gradients of keys and values.
 * All sizes are multiples of 32, and what lies beyond the document's end is 0.
 */
#include <math.h>
#include <string.h>

#include "lanes.h"
#include "tiles.h"
#include "document_attention.h"

#define QUERIES 64 /* whose scores with a block of keys exist at the same time in the backward pass */

#ifdef HAS_TILES

int supports_tiles(long size) { return size % BLOCK == 0 && may_use_tiles(); }

static inline long padded(long number) { return (number + BLOCK - 1) / BLOCK * BLOCK; }

/* What the backward pass needs, which is more than the forward pass: see `struct operands` and `struct block`. */
long tile_memory_bytes(const struct shape *shape) {
    const long number = sizeof(uint16_t), sum = sizeof(float), room = padded(shape->tokens);
    const long for_block = BLOCK * (QUERIES * (3 * number + 2 * sum) + shape->size * 2 * sum);
    return room * (shape->size * (8 * number + sum) + 2 * sum) + for_block;
}

/* c (rows, columns) = a b, or c += a b, for a (rows, inner) and b (inner / 2, columns) in pairs. `_row` is the number of
 * elements from one row to the next. */
static void product(
    const uint16_t *a, long a_row, const uint32_t *b, long b_row, float *c, long c_row, long rows, long columns, long inner,
    int adds
) {
    const long a_bytes = a_row * sizeof *a, b_bytes = b_row * sizeof *b, c_bytes = c_row * sizeof *c;
    for (long i = 0; i < rows; i += BLOCK)
        for (long j = 0; j < columns; j += BLOCK) {
            float *upper = c + i * c_row + j, *lower = upper + SIDE * c_row;
            if (adds) {
                _tile_loadd(0, upper, c_bytes);
                _tile_loadd(1, upper + SIDE, c_bytes);
                _tile_loadd(2, lower, c_bytes);
                _tile_loadd(3, lower + SIDE, c_bytes);
            } else {
                _tile_zero(0);
                _tile_zero(1);
                _tile_zero(2);
                _tile_zero(3);
            }
            for (long k = 0; k < inner; k += DEPTH) {
                const uint16_t *left = a + i * a_row + k;
                const uint32_t *right = b + k / 2 * b_row + j;
                _tile_loadd(4, left, a_bytes);
                _tile_loadd(5, left + SIDE * a_row, a_bytes);
                _tile_loadd(6, right, b_bytes);
                _tile_loadd(7, right + SIDE, b_bytes);
                _tile_dpbf16ps(0, 4, 6);
                _tile_dpbf16ps(1, 4, 7);
                _tile_dpbf16ps(2, 5, 6);
                _tile_dpbf16ps(3, 5, 7);
            }
            _tile_stored(0, upper, c_bytes);
            _tile_stored(1, upper + SIDE, c_bytes);
            _tile_stored(2, lower, c_bytes);
            _tile_stored(3, lower + SIDE, c_bytes);
        }
}

/* Copy `length` rows of `size` numbers, which are `step` apart, to `rows` (room, size). */
static void pack_rows(const uint16_t *from, long step, long length, long room, long size, uint16_t *rows) {
    for (long token = 0; token < length; token++) memcpy(rows + token * size, from + token * step, size * sizeof *rows);
    memset(rows + length * size, 0, (room - length) * size * sizeof *rows);
}

/* The transpose (width, height) of a matrix (height, width) of 32-bit elements. */
static void transpose(const void *from, long height, long width, void *to) {
    for (long i = 0; i < height; i += SIDE)
        for (long j = 0; j < width; j += SIDE)
            transpose_tile((const uint32_t *)from + i * width + j, width, (uint32_t *)to + j * height + i, height);
}

/* `pairs` (room / 2, size) of `rows` (room, size). */
static void to_pairs(const uint16_t *rows, long room, long size, uint32_t *pairs) {
    for (long row = 0; row < room; row += 2)
        for (long column = 0; column < size; column += LANES) {
            const uint16_t *here = rows + row * size + column;
            const __m256i upper = _mm256_loadu_si256((const __m256i *)here);
            const __m256i lower = _mm256_loadu_si256((const __m256i *)(here + size));
            const __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(upper), lower, 1);
            _mm512_storeu_si512(pairs + row / 2 * size + column, alternating(both));
        }
}

/* The lanes from 0 to `count` - 1. */
static inline __mmask16 first_lanes(long count) { return count >= LANES ? 0xffff : count <= 0 ? 0 : (1u << count) - 1; }

/* weights = exp(scale (scores - their largest)) for `visible` scores, and 0 up to `room`, after dropout, in which the first
 * weight has this index. Returns the logarithm of the sum of the unshifted exponentials, and in `sum` that of the shifted
 * ones, both without dropout. */
static float to_weights(
    const float *scores, long visible, long room, float scale, const struct dropout *dropout, uint32_t index,
    uint16_t *weights, float *sum
) {
    lanes maxima = SAME(-INFINITY), sums = ZERO;
    for (long key = 0; key < visible; key += LANES)
        maxima = LARGER(maxima, _mm512_mask_loadu_ps(SAME(-INFINITY), first_lanes(visible - key), scores + key));
    const float most = _mm512_reduce_max_ps(maxima) * scale;
    for (long key = 0; key < visible; key += LANES) {
        const lanes powers = exponentials(ADD_PRODUCT(LOAD(scores + key), SAME(scale), SAME(-most)));
        const lanes seen = _mm512_maskz_mov_ps(first_lanes(visible - key), powers);
        sums = ADD(sums, seen);
        store_bfloat16(weights + key, dropped(dropout, index + key, 1, seen));
    }
    const long end = (visible + LANES - 1) / LANES * LANES;
    memset(weights + end, 0, (room - end) * sizeof *weights);
    *sum = SUM(sums);
    return most + logf(*sum);
}

void attend_in_tiles(
    const struct shape *shape, long length, uint32_t index, const uint16_t *q, uint16_t *y, float *logsumexp, char *memory
) {
    const long size = shape->size, width = shape->heads * size, step = 3 * width, room = padded(length);
    const float scale = 1 / sqrtf(size);
    uint16_t *queries = part_of(&memory, room * size, 2), *rows = part_of(&memory, room * size, 2);
    uint32_t *key_columns = part_of(&memory, room * size / 2, 4), *value_pairs = part_of(&memory, room * size / 2, 4);
    float *scores = part_of(&memory, BLOCK * room, 4), *outputs = part_of(&memory, BLOCK * size, 4);
    uint16_t *weights = part_of(&memory, BLOCK * room, 2);
    pack_rows(q, step, length, room, size, queries);
    pack_rows(q + width, step, length, room, size, rows);
    transpose(rows, room, size / 2, key_columns);
    pack_rows(q + 2 * width, step, length, room, size, rows);
    to_pairs(rows, room, size, value_pairs);
    use_tiles();
    for (long first = 0; first < length; first += BLOCK) {
        const long count = first + BLOCK < length ? BLOCK : length - first, seen = first + BLOCK;
        float sums[BLOCK];
        product(queries + first * size, size, key_columns, room, scores, room, BLOCK, seen, size, 0);
        for (long i = 0; i < count; i++)
            logsumexp[first + i] =
                to_weights(scores + i * room, first + i + 1, seen, scale, &shape->dropout,
                           index + (first + i) * shape->tokens, weights + i * room, sums + i);
        product(weights, room, value_pairs, size, outputs, size, BLOCK, size, seen, 0);
        for (long i = 0; i < count; i++)
            for (long d = 0; d < size; d += LANES)
                store_bfloat16(y + (first + i) * width + d, MULTIPLY(LOAD(outputs + i * size + d), SAME(1 / sums[i])));
    }
    _tile_release();
}

/* What the backward pass computes for a block of keys and QUERIES queries, and adds up for the keys. */
struct block {
    float *scores, *weight_grads;    /* (BLOCK, QUERIES) */
    uint16_t *weights, *score_grads; /* (BLOCK, QUERIES) */
    uint32_t *score_grad_pairs;      /* (BLOCK / 2, QUERIES) */
    float *key_grads, *value_grads;  /* (BLOCK, size) */
};

static struct block block_in(const struct shape *shape, char *memory) {
    struct block block;
    block.scores = part_of(&memory, BLOCK * QUERIES, sizeof(float));
    block.weight_grads = part_of(&memory, BLOCK * QUERIES, sizeof(float));
    block.weights = part_of(&memory, BLOCK * QUERIES, sizeof(uint16_t));
    block.score_grads = part_of(&memory, BLOCK * QUERIES, sizeof(uint16_t));
    block.score_grad_pairs = part_of(&memory, BLOCK / 2 * QUERIES, sizeof(uint32_t));
    block.key_grads = part_of(&memory, BLOCK * shape->size, sizeof(float));
    block.value_grads = part_of(&memory, BLOCK * shape->size, sizeof(float));
    return block;
}

/* From scores and the gradients of the weights after dropout: these weights, and the gradients of the scores, for `count`
 * keys, of which the first one is `ahead` positions after the first query. In dropout, the first query's weight for the
 * first key has this index. */
static void to_score_grads(
    const struct shape *shape, struct block block, long count, long ahead, long queries, uint32_t index,
    const float *logsumexp, const float *means
) {
    const float scale = 1 / sqrtf(shape->size);
    for (long i = 0; i < BLOCK; i += 2)
        for (long query = 0; query < queries; query += LANES) {
            const lanes shift = MULTIPLY(LOAD(logsumexp + query), SAME(-1)), mean = LOAD(means + query);
            lanes weights[2], grads[2];
            for (long next = 0; next < 2; next++) {
                const long here = (i + next) * QUERIES + query;
                const __mmask16 sees = i + next < count ? ~first_lanes(ahead + i + next - query) : 0;
                const lanes powers = exponentials(ADD_PRODUCT(LOAD(block.scores + here), SAME(scale), shift));
                const uint32_t at = index + query * shape->tokens + i + next, step = shape->tokens;
                const lanes weight_grads = dropped(&shape->dropout, at, step, LOAD(block.weight_grads + here));
                const lanes difference = _mm512_sub_ps(weight_grads, mean);
                weights[next] = _mm512_maskz_mov_ps(sees, dropped(&shape->dropout, at, step, powers));
                grads[next] = _mm512_maskz_mul_ps(sees, MULTIPLY(powers, SAME(scale)), difference);
                store_bfloat16(block.weights + here, weights[next]);
                store_bfloat16(block.score_grads + here, grads[next]);
            }
            const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(grads[1], grads[0]);
            _mm512_storeu_si512(block.score_grad_pairs + i / 2 * QUERIES + query, alternating(both));
        }
}

/* The matrices that the backward pass multiplies, for all tokens of a document, and the gradients of its queries. */
struct operands {
    uint16_t *keys, *values, *key_transpose; /* (room, size), (room, size), (size, room) */
    uint32_t *query_pairs, *query_columns, *y_grad_pairs, *y_grad_columns;
    float *logsumexp, *means; /* (room): the mean of a query's weight gradients, weighted with its weights */
    float *query_grads;       /* (size, room) */
};

static struct operands pack_operands(
    const struct shape *shape, long length, const uint16_t *q, const uint16_t *y_grad, const uint16_t *y,
    const float *logsumexp, char **memory
) {
    const long size = shape->size, width = shape->heads * size, step = 3 * width, room = padded(length);
    const long numbers = room * size;
    uint16_t *rows = part_of(memory, numbers, sizeof *rows);
    struct operands all = {
        .keys = part_of(memory, numbers, sizeof(uint16_t)), .values = part_of(memory, numbers, sizeof(uint16_t))};
    all.key_transpose = part_of(memory, numbers, sizeof(uint16_t));
    all.query_pairs = part_of(memory, numbers, sizeof(uint16_t));
    all.query_columns = part_of(memory, numbers, sizeof(uint16_t));
    all.y_grad_pairs = part_of(memory, numbers, sizeof(uint16_t));
    all.y_grad_columns = part_of(memory, numbers, sizeof(uint16_t));
    all.query_grads = part_of(memory, numbers, sizeof(float));
    all.logsumexp = part_of(memory, room, sizeof(float)), all.means = part_of(memory, room, sizeof(float));
    pack_rows(q, step, length, room, size, rows);
    to_pairs(rows, room, size, all.query_pairs);
    transpose(rows, room, size / 2, all.query_columns);
    pack_rows(y_grad, width, length, room, size, rows);
    to_pairs(rows, room, size, all.y_grad_pairs);
    transpose(rows, room, size / 2, all.y_grad_columns);
    pack_rows(q + width, step, length, room, size, all.keys);
    to_pairs(all.keys, room, size, (uint32_t *)rows);
    transpose(rows, room / 2, size, all.key_transpose);
    pack_rows(q + 2 * width, step, length, room, size, all.values);
    memset(all.query_grads, 0, numbers * sizeof(float));
    memset(all.logsumexp, 0, room * sizeof(float));
    memcpy(all.logsumexp, logsumexp, length * sizeof(float));
    memset(all.means, 0, room * sizeof(float));
    for (long token = 0; token < length; token++) {
        lanes sum = ZERO;
        for (long d = token * width; d < token * width + size; d += LANES)
            sum = ADD_PRODUCT(FROM_BFLOAT16(y_grad + d), FROM_BFLOAT16(y + d), sum);
        all.means[token] = SUM(sum);
    }
    return all;
}

void attend_in_tiles_backward(
    const struct shape *shape, long length, uint32_t index, const uint16_t *q, const uint16_t *y_grad, const uint16_t *y,
    const float *logsumexp, uint16_t *q_grad, char *memory
) {
    const long size = shape->size, width = shape->heads * size, step = 3 * width, room = padded(length);
    const struct operands all = pack_operands(shape, length, q, y_grad, y, logsumexp, &memory);
    const struct block block = block_in(shape, memory);
    use_tiles();
    for (long first = 0; first < length; first += BLOCK) {
        const long count = first + BLOCK < length ? BLOCK : length - first;
        const uint16_t *keys = all.keys + first * size, *values = all.values + first * size;
        for (long start = first; start < room; start += QUERIES) { /* the queries that see some of these keys */
            const long queries = start + QUERIES < room ? QUERIES : room - start, is_later = start > first;
            const uint32_t *query_pairs = all.query_pairs + start / 2 * size;
            const uint32_t *y_grad_pairs = all.y_grad_pairs + start / 2 * size;
            product(keys, size, all.query_columns + start, room, block.scores, QUERIES, BLOCK, queries, size, 0);
            product(values, size, all.y_grad_columns + start, room, block.weight_grads, QUERIES, BLOCK, queries, size, 0);
            to_score_grads(shape, block, count, first - start, queries, index + start * shape->tokens + first,
                           all.logsumexp + start, all.means + start);
            product(block.weights, QUERIES, y_grad_pairs, size, block.value_grads, size, BLOCK, size, queries, is_later);
            product(block.score_grads, QUERIES, query_pairs, size, block.key_grads, size, BLOCK, size, queries, is_later);
            product(all.key_transpose + first, room, block.score_grad_pairs, QUERIES, all.query_grads + start, room, size,
                    queries, BLOCK, 1);
        }
        for (long i = 0; i < count; i++)
            for (long d = 0; d < size; d += LANES) {
                uint16_t *here = q_grad + (first + i) * step + d;
                store_bfloat16(here + width, LOAD(block.key_grads + i * size + d));
                store_bfloat16(here + 2 * width, LOAD(block.value_grads + i * size + d));
            }
    }
    _tile_release();
    for (long first = 0; first < length; first += SIDE)
        for (long d = 0; d < size; d += SIDE) {
            float grads[SIDE][SIDE];
            transpose_tile(all.query_grads + d * room + first, room, grads, SIDE);
            for (long i = 0; i < SIDE && first + i < length; i++)
                store_bfloat16(q_grad + (first + i) * step + d, LOAD(grads[i]));
        }
}

#else
int supports_tiles(long size) { return 0; }
long tile_memory_bytes(const struct shape *shape) { return 0; }
void attend_in_tiles(
    const struct shape *shape, long length, uint32_t index, const uint16_t *q, uint16_t *y, float *logsumexp, char *memory
) {}
void attend_in_tiles_backward(
    const struct shape *shape, long length, uint32_t index, const uint16_t *q, const uint16_t *y_grad, const uint16_t *y,
    const float *logsumexp, uint16_t *q_grad, char *memory
) {}
#endif
