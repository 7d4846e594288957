/* Causal attention within documents, forward and backward. Only the scores that a query may see are computed. In float32
 * the kernel is in this file, in bfloat16 in document_tiles.c.
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

#include "document_attention.h"
#include "lanes.h"

#define QUERIES 24 /* of a document, whose weights exist at the same time; a multiple of TALLEST */
#define TALLEST 6  /* rows of a tile of a product: its 6 x 2 sums fill the registers */
#define WIDTH (2 * LANES)

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
static __attribute__((noinline, noclone)) void product(
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

/* Copy `count` rows of `size` numbers, which are `step` apart, to `rows` (count, size). */
static void pack(const float *from, long step, long count, long size, float *rows) {
    for (long token = 0; token < count; token++) memcpy(rows + token * size, from + token * step, size * sizeof(float));
}

/* The transpose (size, room) of `rows` (count, size). */
static void transpose(const float *rows, long count, long size, float *columns, long room) {
    for (long token = 0; token < count; token++)
        for (long d = 0; d < size; d++) columns[d * room + token] = rows[token * size + d];
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
    lanes maxima = SAME(-INFINITY);
    for (long first = 0; first < count; first += LANES) maxima = LARGER(maxima, LOAD(numbers + first));
    float each[LANES], most = -INFINITY;
    STORE(each, maxima);
    for (long lane = 0; lane < LANES; lane++) most = each[lane] > most ? each[lane] : most;
    return most;
}

/* Memory of one thread: keys and values as rows (tokens, size) and columns (size, tokens), their gradients, and for a block
 * of queries the weights (QUERIES, tokens) and the gradients of the scores. */
struct scratch {
    float *keys, *key_columns, *values, *value_columns, *key_grads, *value_grads, *weights, *score_grads;
};

static struct scratch scratch_in(const struct shape *shape, char *memory) {
    float *start = (float *)memory;
    const long part = padded(shape->tokens) * shape->size;
    float *weights = start + 6 * part, *score_grads = weights + padded(shape->tokens) * QUERIES;
    return (struct scratch){start, start + part, start + 2 * part, start + 3 * part, start + 4 * part, start + 5 * part,
                            weights, score_grads};
}

/* One head's output y and logsumexp for a document of `length` tokens. `q` and `y` are those of its first token. */
static void attend(
    const struct shape *shape, long length, const float *q, float *y, float *logsumexp, struct scratch scratch
) {
    const long size = shape->size, width = shape->heads * size, step = 3 * width, room = padded(length);
    const float *k = q + width, *v = k + width, scale = 1 / sqrtf(size);
    pack(k, step, length, size, scratch.keys);
    pack(v, step, length, size, scratch.values);
    transpose(scratch.keys, length, size, scratch.key_columns, room);
    for (long first = 0; first < length; first += QUERIES) {
        const long count = first + QUERIES < length ? QUERIES : length - first, seen = first + count;
        const struct matrix queries = {q + first * step, step, 1}, weights = {scratch.weights, room, 1};
        float sums[QUERIES];
        product(queries, scratch.key_columns, room, scratch.weights, room, count, padded(seen), size, 0);
        for (long i = 0; i < count; i++) {
            float *row = scratch.weights + i * room;
            const float most = largest(row, first + i + 1) * scale;
            lanes sum = ZERO;
            to_weights(row, first + i + 1, padded(seen), scale, most);
            for (long key = 0; key < padded(seen); key += LANES) sum = ADD(sum, LOAD(row + key));
            sums[i] = SUM(sum);
            logsumexp[first + i] = most + logf(sums[i]);
        }
        product(weights, scratch.values, size, y + first * width, width, count, size, seen, 0);
        for (long i = 0; i < count; i++)
            for (long d = 0; d < size; d++) y[(first + i) * width + d] /= sums[i];
    }
}

/* The gradients of one head's queries, keys and values for a document. `q_grad` is where the first query's belongs. */
static void attend_backward(
    const struct shape *shape, long length, const float *q, const float *y_grad, const float *y, const float *logsumexp,
    float *q_grad, struct scratch scratch
) {
    const long size = shape->size, width = shape->heads * size, step = 3 * width, room = padded(length);
    const float *k = q + width, *v = k + width, scale = 1 / sqrtf(size);
    pack(k, step, length, size, scratch.keys);
    pack(v, step, length, size, scratch.values);
    transpose(scratch.keys, length, size, scratch.key_columns, room);
    transpose(scratch.values, length, size, scratch.value_columns, room);
    memset(scratch.key_grads, 0, length * size * sizeof(float));
    memset(scratch.value_grads, 0, length * size * sizeof(float));
    for (long first = 0; first < length; first += QUERIES) {
        const long count = first + QUERIES < length ? QUERIES : length - first, seen = first + count;
        const float *first_q = q + first * step, *first_y_grad = y_grad + first * width;
        const struct matrix queries = {first_q, step, 1}, y_grads = {first_y_grad, width, 1};
        product(queries, scratch.key_columns, room, scratch.weights, room, count, padded(seen), size, 0);
        product(y_grads, scratch.value_columns, room, scratch.score_grads, room, count, padded(seen), size, 0);
        for (long i = 0; i < count; i++) {
            float *row = scratch.weights + i * room, *grads = scratch.score_grads + i * room, mean = 0;
            const long visible = first + i + 1;
            to_weights(row, visible, padded(seen), scale, logsumexp[first + i]);
            for (long d = 0; d < size; d++) mean += first_y_grad[i * width + d] * y[(first + i) * width + d];
            for (long key = 0; key < visible; key += LANES) {
                const lanes difference = ADD(LOAD(grads + key), SAME(-mean));
                STORE(grads + key, MULTIPLY(MULTIPLY(LOAD(row + key), SAME(scale)), difference));
            }
            memset(grads + visible, 0, (padded(seen) - visible) * sizeof(float));
        }
        const struct matrix score_grads = {scratch.score_grads, room, 1}; /* (count, seen) */
        const struct matrix of_keys = {scratch.score_grads, 1, room}, of_values = {scratch.weights, 1, room};
        product(score_grads, scratch.keys, size, q_grad + first * step, step, count, size, seen, 0);
        product(of_keys, first_q, step, scratch.key_grads, size, seen, size, count, 1);
        product(of_values, first_y_grad, width, scratch.value_grads, size, seen, size, count, 1);
    }
    for (long token = 0; token < length; token++) {
        memcpy(q_grad + token * step + width, scratch.key_grads + token * size, size * sizeof(float));
        memcpy(q_grad + token * step + 2 * width, scratch.value_grads + token * size, size * sizeof(float));
    }
}

/* Whether heads of this size are supported. */
int supports_head_size(long size, int is_bfloat16) { return is_bfloat16 ? supports_tiles(size) : size % WIDTH == 0; }

/* How much memory each thread needs. */
long memory_bytes(const struct shape *shape) {
    if (shape->is_bfloat16) return tile_memory_bytes(shape);
    return padded(shape->tokens) * (6 * shape->size + 2 * QUERIES) * sizeof(float);
}

/* y (rows, tokens, heads, size) and logsumexp (rows, heads, tokens) in float32, the logarithm of each softmax's sum. The
 * query at position t of a row sees first_keys[t] to t; first_keys (rows, tokens) is the start of t's document. */
void document_attention(
    const struct shape *shape, const char *qkv, const int *first_keys, char *y, float *logsumexp, char *memory
) {
    const long tokens = shape->tokens, heads = shape->heads, size = shape->size, width = heads * size;
    const long bytes = shape->is_bfloat16 ? sizeof(uint16_t) : sizeof(float);
#pragma omp parallel for schedule(dynamic) num_threads(shape->threads)
    for (long pair = 0; pair < shape->rows * heads; pair++) {
        char *own_memory = memory + omp_get_thread_num() * memory_bytes(shape);
        for (long start = 0, end; start < tokens; start = end) {
            const long row = pair / heads, token = row * tokens + start, head = pair % heads * size;
            const uint32_t index = (pair * tokens + start) * tokens + start; /* of a query's weight for itself */
            const void *q = qkv + bytes * (token * 3 * width + head);
            void *own_y = y + bytes * (token * width + head);
            float *sums = logsumexp + pair * tokens + start;
            end = document_end(first_keys + row * tokens, start, tokens);
            if (shape->is_bfloat16) attend_in_tiles(shape, end - start, index, q, own_y, sums, own_memory);
            else attend(shape, end - start, q, own_y, sums, scratch_in(shape, own_memory));
        }
    }
}

/* qkv_grad, from the gradient of y and what `document_attention` was given and has returned. */
void document_attention_backward(
    const struct shape *shape, const char *qkv, const char *y_grad, const int *first_keys, const char *y,
    const float *logsumexp, char *qkv_grad, char *memory
) {
    const long tokens = shape->tokens, heads = shape->heads, size = shape->size, width = heads * size;
    const long bytes = shape->is_bfloat16 ? sizeof(uint16_t) : sizeof(float);
#pragma omp parallel for schedule(dynamic) num_threads(shape->threads)
    for (long pair = 0; pair < shape->rows * heads; pair++) {
        char *own_memory = memory + omp_get_thread_num() * memory_bytes(shape);
        for (long start = 0, end; start < tokens; start = end) {
            const long row = pair / heads, token = row * tokens + start, head = pair % heads * size;
            const uint32_t index = (pair * tokens + start) * tokens + start; /* of a query's weight for itself */
            const long in_qkv = bytes * (token * 3 * width + head), in_y = bytes * (token * width + head);
            const void *q = qkv + in_qkv, *own_y_grad = y_grad + in_y, *own_y = y + in_y;
            const float *sums = logsumexp + pair * tokens + start;
            void *q_grad = qkv_grad + in_qkv;
            end = document_end(first_keys + row * tokens, start, tokens);
            if (shape->is_bfloat16)
                attend_in_tiles_backward(shape, end - start, index, q, own_y_grad, own_y, sums, q_grad, own_memory);
            else
                attend_backward(shape, end - start, q, own_y_grad, own_y, sums, q_grad, scratch_in(shape, own_memory));
        }
    }
}
