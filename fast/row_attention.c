/* Attention of one new token per row, for each layer of a decode step: keys and values are read once, in memory order.
 *
 * Parallel regions run on the OpenMP library that torch has loaded, so both share its threads.
 */
#include <omp.h>
#include <string.h>

#include "lanes.h"

#define MAX_HEAD_SIZE 256

static inline __attribute__((always_inline)) void fetch(const char *numbers, const long bytes) {
    for (long line = 0; line < bytes; line += 64) __builtin_prefetch(numbers + line, 0, 2);
}

static inline __attribute__((always_inline)) lanes lanes_at(const char *numbers, long index, const int is_bfloat16) {
    return is_bfloat16 ? FROM_BFLOAT16(numbers + 2 * index) : LOAD((const float *)numbers + index);
}

/* y (size) of one head: q (size) attends to `length` keys and values (length, size). While the keys are used the values are
 * prefetched, and then `next`, the next head's keys. `weights` has room for length + LANES numbers. */
static inline __attribute__((always_inline)) void attend(
    const char *q, const char *keys, const char *values, const char *next, char *y, long length, const long size,
    const int is_bfloat16, float *weights
) {
    const long bytes = (is_bfloat16 ? 2 : 4) * size;
    float query[MAX_HEAD_SIZE], largest = -INFINITY, scale = 1 / sqrtf(size);
    for (long position = 0; position < size; position++) query[position] = element(q, position, is_bfloat16) * scale;
    for (long token = 0; token < length; token++) {
        lanes sum = ZERO;
        fetch(values + token * bytes, bytes);
        for (long position = 0; position < size; position += LANES)
            sum = ADD_PRODUCT(lanes_at(keys, token * size + position, is_bfloat16), LOAD(query + position), sum);
        weights[token] = SUM(sum);
        largest = weights[token] > largest ? weights[token] : largest;
    }
    for (long token = 0; token < length; token += LANES)
        STORE(weights + token, exponentials(ADD(LOAD(weights + token), SAME(-largest))));
    memset(weights + length, 0, LANES * sizeof(float));
    lanes total = ZERO, sums[MAX_HEAD_SIZE / LANES];
    for (long token = 0; token < length; token += LANES) total = ADD(total, LOAD(weights + token));
    for (long part = 0; part < size / LANES; part++) sums[part] = ZERO;
    for (long token = 0; token < length; token++) {
        fetch(next + token * bytes, bytes);
        for (long part = 0; part < size / LANES; part++)
            sums[part] = ADD_PRODUCT(
                SAME(weights[token]), lanes_at(values, token * size + part * LANES, is_bfloat16), sums[part]);
    }
    const float all = SUM(total);
    for (long position = 0; position < size; position++) {
        const float value = ((const float *)sums)[position] / all;
        if (is_bfloat16) ((uint16_t *)y)[position] = bfloat16_of(value);
        else ((float *)y)[position] = value;
    }
}

/* Whether heads of this size are supported. */
int supports_head_size(long size) { return size % LANES == 0 && size <= MAX_HEAD_SIZE; }

/* The tokens of one step, each in its own row of a cache of `cache_rows` rows. Token number n is in row rows[n] at
 * positions[n]; where these are NULL, in row first_row + n at `longest`, which is the largest position in any case. */
struct step {
    const long *rows, *positions;
    long tokens, first_row, longest, cache_rows, heads, size, room;
    int is_bfloat16;
};

/* Store the keys and values of qkv (tokens, 3, heads, size) in a layer's (2, cache_rows, heads, room, size) and let each
 * query attend to those up to its own position: y (tokens, heads, size). All are bfloat16, or all float32. */
void row_attention(const struct step *step, const char *qkv, char *keys_values, char *y) {
    const long heads = step->heads, size = step->size, room = step->room, width = heads * size;
    const long bytes = step->is_bfloat16 ? 2 : 4; /* of a number */
    const long threads = omp_get_max_threads(), chunk = (heads + threads - 1) / threads;
#pragma omp parallel
    {
        float weights[step->longest + 1 + LANES];
/* Each thread takes a part of every row's heads, because rows differ in length. */
#pragma omp for schedule(static, chunk)
        for (long head = 0; head < step->tokens * heads; head++) {
            const long token = head / heads, row = step->rows ? step->rows[token] : step->first_row + token;
            const long position = step->positions ? step->positions[token] : step->longest;
            const char *query = qkv + bytes * (token * 3 * width + head % heads * size);
            char *keys = keys_values + bytes * (row * heads + head % heads) * room * size;
            char *values = keys + bytes * step->cache_rows * heads * room * size;
            const char *next = keys + bytes * room * size;
            memcpy(keys + bytes * position * size, query + bytes * width, bytes * size);
            memcpy(values + bytes * position * size, query + 2 * bytes * width, bytes * size);
            char *here = y + bytes * head * size;
            switch (size + step->is_bfloat16) { /* constants for the compiler, so that sums stay in registers */
                case 32: attend(query, keys, values, next, here, position + 1, 32, 0, weights); break;
                case 33: attend(query, keys, values, next, here, position + 1, 32, 1, weights); break;
                case 64: attend(query, keys, values, next, here, position + 1, 64, 0, weights); break;
                case 65: attend(query, keys, values, next, here, position + 1, 64, 1, weights); break;
                default: attend(query, keys, values, next, here, position + 1, size, step->is_bfloat16, weights);
            }
        }
    }
}
