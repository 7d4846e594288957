/* Causal attention within documents, forward and backward, in float32. Only the scores that a query may see are computed.
 *
 * As in "FlashAttention" (Dao et al. 2022) the weights are not stored: the backward pass computes them again, from the
 * logarithm of each query's sum of exponentials. A row's documents are independent, and so are its heads. A (row, head)
 * pair is the work of one thread, so results do not depend on the number of threads.
 *
 * qkv (rows, tokens, 3, heads, size) is the output of c_attn. Parallel regions run on the OpenMP library that torch has
 * loaded, so both share its threads.
 */
#include <omp.h>
#include <string.h>

#include "lanes.h"

#define QUERIES 24 /* of a document, whose weights exist at the same time; a multiple of TALLEST */
#define TALLEST 6  /* rows of a tile of a product: its 6 x 2 sums fill the registers */
#define WIDTH (2 * LANES)

struct shape {
    long rows, tokens, heads, size, threads;
};

/* `number` rounded up to a multiple of WIDTH. */
static inline long padded(long number) { return (number + WIDTH - 1) / WIDTH * WIDTH; }

/* A matrix whose element (i, k) is numbers[i * row + k * column]. */
struct matrix {
    const float *numbers;
    long row, column;
};

/* `height` rows and WIDTH columns of c = a b, or of c += a b. The columns of b and c are contiguous. */
static inline __attribute__((always_inline)) void tile(
    struct matrix a, const float *b, long b_row, float *c, long c_row, const int height, long inner, int adds
) {
    lanes sums[TALLEST][2];
    for (int i = 0; i < height; i++) {
        sums[i][0] = adds ? LOAD(c + i * c_row) : ZERO;
        sums[i][1] = adds ? LOAD(c + i * c_row + LANES) : ZERO;
    }
    for (long k = 0; k < inner; k++) {
        const lanes left = LOAD(b + k * b_row), right = LOAD(b + k * b_row + LANES);
        for (int i = 0; i < height; i++) {
            const lanes factor = SAME(a.numbers[i * a.row + k * a.column]);
            sums[i][0] = ADD_PRODUCT(factor, left, sums[i][0]);
            sums[i][1] = ADD_PRODUCT(factor, right, sums[i][1]);
        }
    }
    for (int i = 0; i < height; i++) {
        STORE(c + i * c_row, sums[i][0]);
        STORE(c + i * c_row + LANES, sums[i][1]);
    }
}

/* c (height, width) = a b, or c += a b, for a (height, inner) and b (inner, width); width is a multiple of WIDTH. */
static void product(
    struct matrix a, const float *b, long b_row, float *c, long c_row, long height, long width, long inner, int adds
) {
    for (long j = 0; j < width; j += WIDTH)
        for (long i = 0; i < height; i += TALLEST) {
            const struct matrix part = {a.numbers + i * a.row, a.row, a.column};
            float *here = c + i * c_row + j;
            switch (height - i) { /* constants for the compiler, so that sums stay in registers */
                case 1: tile(part, b + j, b_row, here, c_row, 1, inner, adds); break;
                case 2: tile(part, b + j, b_row, here, c_row, 2, inner, adds); break;
                case 3: tile(part, b + j, b_row, here, c_row, 3, inner, adds); break;
                case 4: tile(part, b + j, b_row, here, c_row, 4, inner, adds); break;
                case 5: tile(part, b + j, b_row, here, c_row, 5, inner, adds); break;
                default: tile(part, b + j, b_row, here, c_row, TALLEST, inner, adds);
            }
        }
}

/* Copy `count` rows of `size` numbers, which are `row` apart, to `rows` (count, size), as columns to `columns` (size, room). */
static void pack(const float *from, long row, long count, long size, float *rows, float *columns, long room) {
    for (long token = 0; token < count; token++)
        for (long d = 0; d < size; d++) rows[token * size + d] = columns[d * room + token] = from[token * row + d];
}

/* The end of the document that starts at `start`: the next position whose first key is another. */
static long document_end(const int *first_keys, long start, long tokens) {
    long end = start + 1;
    while (end < tokens && first_keys[end] == first_keys[start]) end++;
    return end;
}

/* Replace the scores of a query by exp(score * scale - shift), and those beyond `visible`, up to `room`, by 0. */
static void to_weights(float *scores, long visible, long room, float scale, float shift) {
    for (long key = 0; key < visible; key += LANES)
        STORE(scores + key, exponentials(ADD_PRODUCT(LOAD(scores + key), SAME(scale), SAME(-shift))));
    memset(scores + visible, 0, (room - visible) * sizeof(float));
}

/* The largest of `count` numbers; the memory behind them, up to a multiple of LANES, is overwritten. */
static float largest(float *numbers, long count) {
    for (long rest = count; rest % LANES; rest++) numbers[rest] = -INFINITY;
    lanes found = SAME(-INFINITY);
    for (long first = 0; first < count; first += LANES) found = LARGER(found, LOAD(numbers + first));
    float each[LANES], most = -INFINITY;
    STORE(each, found);
    for (long lane = 0; lane < LANES; lane++) most = each[lane] > most ? each[lane] : most;
    return most;
}

/* Floats that a thread needs beside its arguments. */
long scratch_size(const struct shape *shape) {
    return padded(shape->tokens) * (6 * shape->size + 2 * QUERIES);
}

/* Whether heads of this size are supported. */
int attends_with(long size) { return size % WIDTH == 0; }

/* y (rows, tokens, heads, size) and logsumexp (rows, heads, tokens): query number t sees first_keys[t] to t, where
 * first_keys (rows, tokens) is the start of its document. */
void document_attention(
    const struct shape *shape, const float *qkv, const int *first_keys, float *y, float *logsumexp, float *scratch
) {
    const long tokens = shape->tokens, heads = shape->heads, size = shape->size, width = heads * size, step = 3 * width;
    const float scale = 1 / sqrtf(size);
#pragma omp parallel for schedule(dynamic) num_threads(shape->threads)
    for (long pair = 0; pair < shape->rows * heads; pair++) {
        const long row = pair / heads, head = pair % heads;
        const float *q = qkv + row * tokens * step + head * size, *k = q + width, *v = k + width;
        float *keys = scratch + omp_get_thread_num() * scratch_size(shape), *columns = keys + padded(tokens) * size;
        float *values = columns + padded(tokens) * size, *weights = values + padded(tokens) * size;
        for (long start = 0, end; start < tokens; start = end) {
            end = document_end(first_keys + row * tokens, start, tokens);
            const long room = padded(end - start);
            pack(k + start * step, step, end - start, size, keys, columns, room);
            for (long i = 0; i < end - start; i++) memcpy(values + i * size, v + (start + i) * step, size * 4);
            for (long first = start; first < end; first += QUERIES) {
                const long count = first + QUERIES < end ? QUERIES : end - first, seen = first + count - start;
                const struct matrix queries = {q + first * step, step, 1}, of_keys = {weights, room, 1};
                product(queries, columns, room, weights, room, count, padded(seen), size, 0);
                float sums[QUERIES];
                for (long i = 0; i < count; i++) {
                    float *scores = weights + i * room;
                    const float most = largest(scores, first + i - start + 1) * scale;
                    to_weights(scores, first + i - start + 1, padded(seen), scale, most);
                    lanes sum = ZERO;
                    for (long key = 0; key < padded(seen); key += LANES) sum = ADD(sum, LOAD(scores + key));
                    sums[i] = SUM(sum);
                    logsumexp[pair * tokens + first + i] = most + logf(sums[i]);
                }
                float *found = y + (row * tokens + first) * width + head * size;
                product(of_keys, values, size, found, width, count, size, seen, 0);
                for (long i = 0; i < count; i++)
                    for (long d = 0; d < size; d++) found[i * width + d] /= sums[i];
            }
        }
    }
}

/* qkv_grad, from the gradient of y and what `document_attention` was given and has returned. */
void document_attention_backward(
    const struct shape *shape, const float *qkv, const float *y_grad, const int *first_keys, const float *y,
    const float *logsumexp, float *qkv_grad, float *scratch
) {
    const long tokens = shape->tokens, heads = shape->heads, size = shape->size, width = heads * size, step = 3 * width;
    const float scale = 1 / sqrtf(size);
#pragma omp parallel for schedule(dynamic) num_threads(shape->threads)
    for (long pair = 0; pair < shape->rows * heads; pair++) {
        const long row = pair / heads, head = pair % heads;
        const float *q = qkv + row * tokens * step + head * size, *k = q + width, *v = k + width;
        float *q_grad = qkv_grad + (q - qkv), *k_grad = q_grad + width, *v_grad = k_grad + width;
        const long part = padded(tokens) * size;
        float *keys = scratch + omp_get_thread_num() * scratch_size(shape), *key_columns = keys + part;
        float *values = key_columns + part, *value_columns = values + part;
        float *key_grads = value_columns + part, *value_grads = key_grads + part;
        float *weights = value_grads + part, *scores_grad = weights + padded(tokens) * QUERIES;
        for (long start = 0, end; start < tokens; start = end) {
            end = document_end(first_keys + row * tokens, start, tokens);
            const long room = padded(end - start);
            pack(k + start * step, step, end - start, size, keys, key_columns, room);
            pack(v + start * step, step, end - start, size, values, value_columns, room);
            memset(key_grads, 0, (end - start) * size * 4);
            memset(value_grads, 0, (end - start) * size * 4);
            for (long first = start; first < end; first += QUERIES) {
                const long count = first + QUERIES < end ? QUERIES : end - first, seen = first + count - start;
                const long here = (row * tokens + first) * width + head * size;
                const struct matrix queries = {q + first * step, step, 1}, grads = {y_grad + here, width, 1};
                product(queries, key_columns, room, weights, room, count, padded(seen), size, 0);
                product(grads, value_columns, room, scores_grad, room, count, padded(seen), size, 0);
                for (long i = 0; i < count; i++) {
                    const long visible = first + i - start + 1;
                    float *p = weights + i * room, *grad = scores_grad + i * room, mean = 0;
                    to_weights(p, visible, padded(seen), scale, logsumexp[pair * tokens + first + i]);
                    for (long d = 0; d < size; d++) mean += y_grad[here + i * width + d] * y[here + i * width + d];
                    for (long key = 0; key < visible; key += LANES) {
                        const lanes weight = MULTIPLY(LOAD(p + key), SAME(scale));
                        STORE(grad + key, MULTIPLY(weight, ADD(LOAD(grad + key), SAME(-mean))));
                    }
                    memset(grad + visible, 0, (padded(seen) - visible) * sizeof(float));
                }
                const struct matrix of_keys = {scores_grad, room, 1}, of_queries = {scores_grad, 1, room};
                const struct matrix weights_of_queries = {weights, 1, room};
                product(of_keys, keys, size, q_grad + first * step, step, count, size, seen, 0);
                product(of_queries, q + first * step, step, key_grads, size, seen, size, count, 1);
                product(weights_of_queries, y_grad + here, width, value_grads, size, seen, size, count, 1);
            }
            for (long i = 0; i < end - start; i++) {
                memcpy(k_grad + (start + i) * step, key_grads + i * size, size * 4);
                memcpy(v_grad + (start + i) * step, value_grads + i * size, size * 4);
            }
        }
    }
}
