/* A block of the network except for attention, forward and backward, in products of AMX tiles: LayerNorm, the four linear
 * layers, GELU and the sums of the residual stream. Products are of bfloat16 numbers; everything else is in float32.
 *
 * A thread takes CHUNK tokens at a time through all layers, so intermediate results stay in its cache. The gradients of the
 * weights are summed for each thread, then for all of them.
 *
 * Parallel regions run on the OpenMP library that torch has loaded, so both share its threads.
 */
#include <math.h>
#include <omp.h>
#include <string.h>

#include "tile_products.h"

#define EPSILON 1e-5f

#define MLP_INDEX (1u << 31) /* of the MLP's first output in dropout; the indices of attention's outputs start at 0 */

struct block {
    long tokens, width, threads;
    struct dropout dropout;
};

enum layer { LN_1, C_ATTN, ATTN_C_PROJ, LN_2, C_FC, MLP_C_PROJ, LAYERS };

/* A layer's weight and bias, or their gradients; `bias` is 0 for a layer without one. */
struct parameters {
    float *weight, *bias;
};

#ifdef HAS_TILES

/* The memory that a thread needs for after_attention_backward, which needs most: sums, tiles, and gradients. */
static long own_bytes(long width) {
    const long sums = 9 * width * width + 9 * width, numbers = CHUNK * width * (3 + 3 * 4), grads = CHUNK * width;
    return sums * sizeof(float) + numbers * sizeof(uint16_t) + grads * sizeof(float);
}

/* The memory that a function needs: packed weights, and that of the threads. */
long block_memory_bytes(const struct block *block) {
    return 9 * block->width * block->width * sizeof(uint16_t) + block->threads * own_bytes(block->width);
}

/* The tokens of the chunk that starts at `first`. */
static inline long rows_in_chunk(long first, const struct block *block) {
    return first + CHUNK < block->tokens ? CHUNK : block->tokens - first;
}

static inline long inputs_of(enum layer layer, long width) { return layer == MLP_C_PROJ ? 4 * width : width; }

static inline long outputs_of(enum layer layer, long width) {
    return layer == C_FC ? 4 * width : layer == C_ATTN ? 3 * width : width;
}

static inline int is_norm(enum layer layer) { return layer == LN_1 || layer == LN_2; }

/* Where a thread's sums for the gradients of the layers from `from` to `to` are in its memory. */
static void lay_out(struct parameters *sums, enum layer from, enum layer to, long width, char **memory) {
    for (enum layer layer = from; layer <= to; layer++) {
        const long outputs = outputs_of(layer, width), inputs = is_norm(layer) ? 1 : inputs_of(layer, width);
        sums[layer].weight = floats_of(memory, outputs * inputs);
        sums[layer].bias = floats_of(memory, outputs);
    }
}

/* The same for a thread that starts to sum: all sums are 0. */
static void start_sums(struct parameters *sums, enum layer from, enum layer to, long width, char **memory) {
    char *const start = *memory;
    lay_out(sums, from, to, width, memory);
    memset(start, 0, *memory - start);
}

/* The gradients of these layers from the sums of all threads, of which `sums` are the first one's, made by all threads. */
static void add_up_layers(
    const struct parameters *sums, enum layer from, enum layer to, long width, long step, const struct parameters *grads
) {
    for (enum layer layer = from; layer <= to; layer++) {
        const int is_transposed = layer == C_ATTN || layer == C_FC; /* the smaller matrix is the one to be transposed */
        const long outputs = outputs_of(layer, width), columns = is_transposed ? outputs : inputs_of(layer, width);
        if (is_norm(layer)) add_up_vectors(sums[layer].weight, step, width, grads[layer].weight);
        else add_up(sums[layer].weight, step, width, columns, is_transposed, grads[layer].weight);
        add_up_vectors(sums[layer].bias, step, outputs, grads[layer].bias);
    }
}

/* The mean of a row, and the inverse of its standard deviation. */
static inline void moments(const float *x, long width, float *mean, float *inverse) {
    lanes sum = ZERO, squares = ZERO;
    for (long n = 0; n < width; n += LANES) sum = ADD(sum, LOAD(x + n));
    *mean = SUM(sum) / width;
    for (long n = 0; n < width; n += LANES) {
        const lanes difference = ADD(LOAD(x + n), SAME(-*mean));
        squares = ADD_PRODUCT(difference, difference, squares);
    }
    *inverse = 1 / sqrtf(SUM(squares) / width + EPSILON);
}

/* LayerNorm of x (rows, width), in tiles. */
static void normalize(const float *x, long rows, long width, struct parameters ln, tile *left, tile *right) {
    for (long row = 0; row < rows; row += 2) {
        float mean[2], inverse[2];
        for (long next = 0; next < 2; next++) moments(x + (row + next) * width, width, mean + next, inverse + next);
        for (long n = 0; n < width; n += DEPTH) {
            lanes y[2][2];
            for (long part = 0; part < 2; part++) {
                const long here = n + part * LANES;
                const lanes weight = LOAD(ln.weight + here), bias = ln.bias ? LOAD(ln.bias + here) : ZERO;
                for (long next = 0; next < 2; next++) {
                    const lanes difference = ADD(LOAD(x + (row + next) * width + here), SAME(-mean[next]));
                    y[next][part] = ADD_PRODUCT(MULTIPLY(difference, SAME(inverse[next])), weight, bias);
                }
            }
            store_rows(rounded(y[0][0], y[0][1]), rounded(y[1][0], y[1][1]), left, right, rows, width, row, n);
        }
    }
}

/* The gradient of x (rows, width) from that of its LayerNorm, y_grad, plus `other`; adds to the gradients of `ln`. */
static void normalize_backward(
    const float *y_grad, const float *x, const float *other, long rows, long width, struct parameters ln,
    struct parameters ln_grad, float *x_grad
) {
    for (long row = 0; row < rows; row++, y_grad += width, x += width, other += width, x_grad += width) {
        float mean, inverse;
        lanes sum = ZERO, product = ZERO;
        moments(x, width, &mean, &inverse);
        for (long n = 0; n < width; n += LANES) {
            const lanes y = MULTIPLY(ADD(LOAD(x + n), SAME(-mean)), SAME(inverse)), grad = LOAD(y_grad + n);
            const lanes weighted = MULTIPLY(grad, LOAD(ln.weight + n));
            sum = ADD(sum, weighted);
            product = ADD_PRODUCT(weighted, y, product);
            STORE(ln_grad.weight + n, ADD_PRODUCT(grad, y, LOAD(ln_grad.weight + n)));
            STORE(ln_grad.bias + n, ADD(grad, LOAD(ln_grad.bias + n)));
        }
        const float mean_grad = SUM(sum) / width, slope = SUM(product) / width;
        for (long n = 0; n < width; n += LANES) {
            const lanes y = MULTIPLY(ADD(LOAD(x + n), SAME(-mean)), SAME(inverse));
            const lanes weighted = MULTIPLY(LOAD(y_grad + n), LOAD(ln.weight + n));
            const lanes centred = ADD_PRODUCT(y, SAME(-slope), ADD(weighted, SAME(-mean_grad)));
            STORE(x_grad + n, ADD_PRODUCT(centred, SAME(inverse), LOAD(other + n)));
        }
    }
}

/* Where sums go as they are: to = other + dropout(sums + bias) (rows, width); all but `to` can be 0. */
struct float_rows {
    float *to;
    const float *other, *bias;
    long width;
    const struct dropout *dropout;
    uint32_t index; /* of the first number in dropout */
};

static void store_floats(const void *how, long row, long column, const float *sums) {
    const struct float_rows *rows = how;
    for (long i = 0; i < BLOCK; i++)
        for (long j = 0; j < BLOCK; j += LANES) {
            const long here = (row + i) * rows->width + column + j;
            lanes number = LOAD(sums + i * BLOCK + j);
            if (rows->bias) number = ADD(number, LOAD(rows->bias + column + j));
            if (rows->dropout) number = dropped(rows->dropout, rows->index + here, 1, number);
            STORE(rows->to + here, rows->other ? ADD(number, LOAD(rows->other + here)) : number);
        }
}

/* The same, rounded: to = sums + bias. */
struct bfloat16_rows {
    uint16_t *to;
    const float *bias;
    long width;
};

static void store_bfloat16s(const void *how, long row, long column, const float *sums) {
    const struct bfloat16_rows *rows = how;
    const lanes first = rows->bias ? LOAD(rows->bias + column) : ZERO;
    const lanes second = rows->bias ? LOAD(rows->bias + column + LANES) : ZERO;
    for (long i = 0; i < BLOCK; i++, sums += BLOCK)
        _mm512_storeu_si512(rows->to + (row + i) * rows->width + column,
                            rounded(ADD(LOAD(sums), first), ADD(LOAD(sums + LANES), second)));
}

/* GELU by its tanh, and its slope, at 16 numbers, accurate to 14 bits: x times the sigmoid of
 * 2 sqrt(2 / pi) (x + 0.044715 x^3). */
static inline lanes gelus_and_slopes(lanes x, lanes *slopes) {
    const lanes square = MULTIPLY(x, x), one = SAME(1), inner = MULTIPLY(x, SAME(-1.59576912f * LOG2_E));
    const lanes exponents = MULTIPLY(inner, ADD_PRODUCT(square, SAME(0.044715f), one));
    const lanes powers = powers_of_2(LARGER(_mm512_min_ps(SAME(-LEAST), exponents), SAME(LEAST)));
    const lanes sigmoids = _mm512_rcp14_ps(ADD(powers, one));
    const lanes growth = MULTIPLY(x, ADD_PRODUCT(square, SAME(1.59576912f * 3 * 0.044715f), SAME(1.59576912f)));
    *slopes = MULTIPLY(sigmoids, ADD_PRODUCT(MULTIPLY(powers, sigmoids), growth, one));
    return MULTIPLY(x, sigmoids);
}

/* Where c_fc's outputs go: the rounded sums are kept for the backward pass, their GELU is multiplied next. */
struct activation {
    tile *hidden, *activated; /* left tiles (rows, width) */
    const float *bias;
    long rows, width;
};

static void store_gelu(const void *how, long row, long column, const float *sums) {
    const struct activation *to = how;
    const lanes first = to->bias ? LOAD(to->bias + column) : ZERO;
    const lanes second = to->bias ? LOAD(to->bias + column + LANES) : ZERO;
    for (long i = 0; i < BLOCK; i += 2) {
        __m512i hidden[2], activated[2];
        for (long next = 0; next < 2; next++, sums += BLOCK) {
            const lanes z[] = {ADD(LOAD(sums), first), ADD(LOAD(sums + LANES), second)};
            lanes slopes;
            hidden[next] = rounded(z[0], z[1]);
            activated[next] = rounded(gelus_and_slopes(z[0], &slopes), gelus_and_slopes(z[1], &slopes));
        }
        store_rows(hidden[0], hidden[1], to->hidden, 0, to->rows, to->width, row + i, column);
        store_rows(activated[0], activated[1], to->activated, 0, to->rows, to->width, row + i, column);
    }
}

/* Where the gradients of GELU's outputs go: with GELU's inputs, they give its outputs and its inputs' gradients. */
struct activation_backward {
    const tile *hidden;                       /* left tiles (rows, width) */
    tile *activated, *grads, *grads_as_right; /* right, left and right tiles */
    float *bias_grads;
    long rows, width;
};

static void store_gelu_grads(const void *how, long row, long column, const float *sums) {
    const struct activation_backward *to = how;
    lanes total[2] = {ZERO, ZERO};
    for (long i = 0; i < BLOCK; i += 2) {
        const uint16_t *hidden = number_at(to->hidden, to->width, row + i, column);
        __m512i activated[2], grads[2];
        for (long next = 0; next < 2; next++, sums += BLOCK, hidden += DEPTH) {
            lanes y[2], grad[2], slopes;
            for (long part = 0; part < 2; part++) {
                y[part] = gelus_and_slopes(FROM_BFLOAT16(hidden + part * LANES), &slopes);
                grad[part] = MULTIPLY(LOAD(sums + part * LANES), slopes);
                total[part] = ADD(total[part], grad[part]);
            }
            activated[next] = rounded(y[0], y[1]);
            grads[next] = rounded(grad[0], grad[1]);
        }
        store_rows(activated[0], activated[1], 0, to->activated, to->rows, to->width, row + i, column);
        store_rows(grads[0], grads[1], to->grads, to->grads_as_right, to->rows, to->width, row + i, column);
    }
    STORE(to->bias_grads + column, ADD(LOAD(to->bias_grads + column), total[0]));
    STORE(to->bias_grads + column + LANES, ADD(LOAD(to->bias_grads + column + LANES), total[1]));
}

/* qkv = c_attn(ln_1(x)), for x (tokens, width). */
void before_attention(
    const struct block *block, const struct parameters *layers, const float *x, uint16_t *qkv, char *memory
) {
    const long width = block->width;
    tile *c_attn = tiles_of(&memory, 3 * width * width);
#pragma omp parallel num_threads(block->threads)
    {
        char *own = memory + omp_get_thread_num() * own_bytes(width);
        tile *normalized = tiles_of(&own, CHUNK * width);
        pack(layers[C_ATTN].weight, 3 * width, width, 1, c_attn);
        use_tiles();
#pragma omp for schedule(static)
        for (long first = 0; first < block->tokens; first += CHUNK) {
            const long rows = rows_in_chunk(first, block);
            const struct bfloat16_rows to = {qkv + first * 3 * width, layers[C_ATTN].bias, 3 * width};
            normalize(x + first * width, rows, width, layers[LN_1], normalized, 0);
            product(normalized, rows, c_attn, 3 * width, width, store_bfloat16s, &to);
        }
        _tile_release();
    }
}

/* middle = x + attn.c_proj(y) and out = middle + mlp(ln_2(middle)), for y, the output of attention. `hidden`, the output of
 * c_fc in tiles, is for the backward pass. */
void after_attention(
    const struct block *block, const struct parameters *layers, const float *x, const uint16_t *y, float *middle,
    uint16_t *hidden, float *out, char *memory
) {
    const long width = block->width, square = width * width;
    tile *attn_c_proj = tiles_of(&memory, square);
    tile *c_fc = tiles_of(&memory, 4 * square), *mlp_c_proj = tiles_of(&memory, 4 * square);
#pragma omp parallel num_threads(block->threads)
    {
        char *own = memory + omp_get_thread_num() * own_bytes(width);
        tile *narrow = tiles_of(&own, CHUNK * width), *activated = tiles_of(&own, CHUNK * 4 * width);
        pack(layers[ATTN_C_PROJ].weight, width, width, 1, attn_c_proj);
        pack(layers[C_FC].weight, 4 * width, width, 1, c_fc);
        pack(layers[MLP_C_PROJ].weight, width, 4 * width, 1, mlp_c_proj);
        use_tiles();
#pragma omp for schedule(static)
        for (long first = 0; first < block->tokens; first += CHUNK) {
            const long rows = rows_in_chunk(first, block), start = first * width;
            const struct float_rows to_middle = {
                middle + start, x + start, layers[ATTN_C_PROJ].bias, width, &block->dropout, start};
            const struct float_rows to_out = {
                out + start, middle + start, layers[MLP_C_PROJ].bias, width, &block->dropout, MLP_INDEX + start};
            const struct activation to_hidden = {
                (tile *)(hidden + 4 * start), activated, layers[C_FC].bias, rows, 4 * width};
            pack_rows((struct rows_from){.bfloat16s = y + start}, rows, width, narrow, 0, 0);
            product(narrow, rows, attn_c_proj, width, width, store_floats, &to_middle);
            normalize(middle + start, rows, width, layers[LN_2], narrow, 0);
            product(narrow, rows, c_fc, 4 * width, width, store_gelu, &to_hidden);
            product(activated, rows, mlp_c_proj, width, 4 * width, store_floats, &to_out);
        }
        _tile_release();
    }
}

/* The gradients of `middle` (the whole one, also through the residual stream), of y and of the layers. */
void after_attention_backward(
    const struct block *block, const struct parameters *layers, const struct parameters *grads, const float *out_grad,
    const float *middle, const uint16_t *hidden, const uint16_t *y, float *middle_grad, uint16_t *y_grad, char *memory
) {
    const long width = block->width, wide = 4 * width, square = width * width, step = own_bytes(width);
    tile *attn_c_proj = tiles_of(&memory, square);
    tile *c_fc = tiles_of(&memory, 4 * square), *mlp_c_proj = tiles_of(&memory, 4 * square);
#pragma omp parallel num_threads(block->threads)
    {
        char *own = memory + omp_get_thread_num() * step;
        struct parameters sums[LAYERS], first_sums[LAYERS];
        lay_out(first_sums, ATTN_C_PROJ, MLP_C_PROJ, width, &(char *){memory});
        start_sums(sums, ATTN_C_PROJ, MLP_C_PROJ, width, &own);
        tile *left = tiles_of(&own, CHUNK * width), *right = tiles_of(&own, CHUNK * width);
        tile *columns = tiles_of(&own, CHUNK * width); /* left tiles of a transpose */
        tile *activated = tiles_of(&own, CHUNK * wide);
        tile *hidden_grad = tiles_of(&own, CHUNK * wide), *hidden_grad_right = tiles_of(&own, CHUNK * wide);
        float *normalized_grad = floats_of(&own, CHUNK * width);
        pack(layers[ATTN_C_PROJ].weight, width, width, 0, attn_c_proj);
        pack(layers[C_FC].weight, wide, width, 0, c_fc);
        pack(layers[MLP_C_PROJ].weight, width, wide, 0, mlp_c_proj);
        use_tiles();
#pragma omp for schedule(static)
        for (long first = 0; first < block->tokens; first += CHUNK) {
            const long rows = rows_in_chunk(first, block), start = first * width, n_tiles = rows * width / (SIDE * DEPTH);
            const struct activation_backward to_hidden = {(const tile *)(hidden + 4 * start), activated, hidden_grad,
                                                          hidden_grad_right, sums[C_FC].bias, rows, wide};
            const struct float_rows to_normalized = {.to = normalized_grad, .width = width};
            const struct bfloat16_rows to_y = {y_grad + start, 0, width};
            const struct rows_from mlp_grad = {out_grad + start, 0, &block->dropout, MLP_INDEX + start};
            const struct rows_from attn_grad = {middle_grad + start, 0, &block->dropout, start};
            pack_rows(mlp_grad, rows, width, left, right, sums[MLP_C_PROJ].bias);
            transpose_tiles(right, n_tiles, columns);
            product(left, rows, mlp_c_proj, wide, width, store_gelu_grads, &to_hidden);
            accumulate(columns, width, activated, wide, rows, sums[MLP_C_PROJ].weight);
            normalize(middle + start, rows, width, layers[LN_2], 0, right);
            transpose_tiles(right, n_tiles, columns);
            accumulate(columns, width, hidden_grad_right, wide, rows, sums[C_FC].weight);
            product(hidden_grad, rows, c_fc, width, wide, store_floats, &to_normalized);
            normalize_backward(normalized_grad, middle + start, out_grad + start, rows, width, layers[LN_2],
                               sums[LN_2], middle_grad + start);
            pack_rows(attn_grad, rows, width, left, right, sums[ATTN_C_PROJ].bias);
            transpose_tiles(right, n_tiles, columns);
            product(left, rows, attn_c_proj, width, width, store_bfloat16s, &to_y);
            pack_rows((struct rows_from){.bfloat16s = y + start}, rows, width, 0, right, 0);
            accumulate(columns, width, right, width, rows, sums[ATTN_C_PROJ].weight);
        }
        _tile_release();
        add_up_layers(first_sums, ATTN_C_PROJ, MLP_C_PROJ, width, step, grads);
    }
}

/* The gradients of x and of the layers, from those of qkv and of `middle`. */
void before_attention_backward(
    const struct block *block, const struct parameters *layers, const struct parameters *grads, const uint16_t *qkv_grad,
    const float *middle_grad, const float *x, float *x_grad, char *memory
) {
    const long width = block->width, wide = 3 * width, step = own_bytes(width);
    tile *c_attn = tiles_of(&memory, wide * width);
#pragma omp parallel num_threads(block->threads)
    {
        char *own = memory + omp_get_thread_num() * step;
        struct parameters sums[LAYERS], first_sums[LAYERS];
        lay_out(first_sums, LN_1, C_ATTN, width, &(char *){memory});
        start_sums(sums, LN_1, C_ATTN, width, &own);
        tile *normalized = tiles_of(&own, CHUNK * width), *columns = tiles_of(&own, CHUNK * width);
        tile *grad = tiles_of(&own, CHUNK * wide), *grad_right = tiles_of(&own, CHUNK * wide);
        float *normalized_grad = floats_of(&own, CHUNK * width);
        pack(layers[C_ATTN].weight, wide, width, 0, c_attn);
        use_tiles();
#pragma omp for schedule(static)
        for (long first = 0; first < block->tokens; first += CHUNK) {
            const long rows = rows_in_chunk(first, block), start = first * width;
            const struct float_rows to_normalized = {.to = normalized_grad, .width = width};
            pack_rows((struct rows_from){.bfloat16s = qkv_grad + 3 * start}, rows, wide, grad, grad_right,
                      sums[C_ATTN].bias);
            normalize(x + start, rows, width, layers[LN_1], 0, normalized);
            transpose_tiles(normalized, rows * width / (SIDE * DEPTH), columns);
            accumulate(columns, width, grad_right, wide, rows, sums[C_ATTN].weight);
            product(grad, rows, c_attn, width, wide, store_floats, &to_normalized);
            normalize_backward(normalized_grad, x + start, middle_grad + start, rows, width, layers[LN_1],
                               sums[LN_1], x_grad + start);
        }
        _tile_release();
        add_up_layers(first_sums, LN_1, C_ATTN, width, step, grads);
    }
}
#endif

/* Whether there are kernels in this library's files. */
int has_tiles(void) { return may_use_tiles(); }
