/* Attention of one new token per row, for each layer of a decode step: keys and values are read once, in memory order.
 *
 * Parallel regions run on the OpenMP library that torch has loaded, so both share its threads.
 */
#include <omp.h>
#include <string.h>

#include "lanes.h"

#define LARGEST_HEAD 256

static inline __attribute__((always_inline)) void fetch(const uint16_t *numbers, const long size) {
    for (long position = 0; position < size; position += 32) __builtin_prefetch(numbers + position, 0, 2);
}

/* y (size) of one head: q (size) attends to `length` keys and values (length, size). While the keys are used the values are
 * prefetched, and then `next`, the next head's keys. `weights` has room for length + LANES numbers. */
static inline __attribute__((always_inline)) void attend(
    const uint16_t *q, const uint16_t *keys, const uint16_t *values, const uint16_t *next, uint16_t *y, long length,
    const long size, float *weights
) {
    float query[LARGEST_HEAD], largest = -INFINITY, scale = 1 / sqrtf(size);
    for (long position = 0; position < size; position++) query[position] = float_of(q[position]) * scale;
    for (long token = 0; token < length; token++) {
        lanes sum = ZERO;
        fetch(values + token * size, size);
        for (long position = 0; position < size; position += LANES)
            sum = ADD_PRODUCT(FROM_BFLOAT16(keys + token * size + position), LOAD(query + position), sum);
        weights[token] = SUM(sum);
        largest = weights[token] > largest ? weights[token] : largest;
    }
    for (long token = 0; token < length; token++) weights[token] = exponential(weights[token] - largest);
    memset(weights + length, 0, LANES * sizeof(float));
    lanes total = ZERO, sums[LARGEST_HEAD / LANES];
    for (long token = 0; token < length; token += LANES) total = ADD(total, LOAD(weights + token));
    for (long part = 0; part < size / LANES; part++) sums[part] = ZERO;
    for (long token = 0; token < length; token++) {
        fetch(next + token * size, size);
        for (long part = 0; part < size / LANES; part++)
            sums[part] = ADD_PRODUCT(SAME(weights[token]), FROM_BFLOAT16(values + token * size + part * LANES), sums[part]);
    }
    const float all = SUM(total);
    for (long position = 0; position < size; position++) y[position] = bfloat16_of(((const float *)sums)[position] / all);
}

/* Whether heads of this size are supported. */
int serves_heads(long size) { return size % LANES == 0 && size <= LARGEST_HEAD; }

/* The tokens of one step, each in its own row of a cache of `cache_rows` rows. Token number n is in row rows[n] at
 * positions[n]; where these are NULL, in row first_row + n at `longest`, which is the largest position in any case. */
struct step {
    const long *rows, *positions;
    long tokens, first_row, longest, cache_rows, heads, size, room;
};

/* Store the keys and values of qkv (tokens, 3, heads, size) in a layer's (2, cache_rows, heads, room, size) and let each
 * query attend to those up to its own position: y (tokens, heads, size). All are bfloat16. */
void row_attention(const struct step *step, const uint16_t *qkv, uint16_t *keys_values, uint16_t *y) {
    const long heads = step->heads, size = step->size, room = step->room, width = heads * size;
    const long threads = omp_get_max_threads(), chunk = (heads + threads - 1) / threads;
#pragma omp parallel
    {
        float weights[step->longest + 1 + LANES];
/* Each thread takes a part of every row's heads, because rows differ in length. */
#pragma omp for schedule(static, chunk)
        for (long head = 0; head < step->tokens * heads; head++) {
            const long token = head / heads, row = step->rows ? step->rows[token] : step->first_row + token;
            const long position = step->positions ? step->positions[token] : step->longest;
            const uint16_t *query = qkv + token * 3 * width + head % heads * size;
            uint16_t *keys = keys_values + (row * heads + head % heads) * room * size;
            uint16_t *values = keys + step->cache_rows * heads * room * size;
            const uint16_t *next = keys + room * size;
            memcpy(keys + position * size, query + width, size * sizeof(uint16_t));
            memcpy(values + position * size, query + 2 * width, size * sizeof(uint16_t));
            uint16_t *here = y + head * size;
            switch (size) { /* constants for the compiler, so that sums stay in registers */
                case 32: attend(query, keys, values, next, here, position + 1, 32, weights); break;
                case 64: attend(query, keys, values, next, here, position + 1, 64, weights); break;
                default: attend(query, keys, values, next, here, position + 1, size, weights);
            }
        }
    }
}
