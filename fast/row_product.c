/* y = gelu(x weight' * scale + bias) + residual for a few rows x, as in each decode step.
 *
 * Every weight is read once, in memory order, and prefetched before its use: memory bandwidth sets the time. Rows are
 * multiplied by vector instructions, four at a time, or by AMX's matrix instructions on processors that have them. Parallel
 * regions run on the OpenMP library that torch has loaded, so both share its threads.
 */
#include <stdlib.h>

#include "lanes.h"
#include "tiles.h"

#define AHEAD 8192       /* bytes between what is used and what is prefetched into the L2 cache */
#define STEP (4 * LANES) /* weights per iteration: four sums hide the latency of each addition */
#define FEW 4            /* rows multiplied at a time, whose sums fit into the registers */
#define MANY 16          /* rows for which the weights are read once */
#define GROUP (LANES == 16 ? 6 : 3) /* outputs multiplied with FEW rows at a time: their sums fit, too */

#define COLUMNS(vectors) ((vectors) == 1 ? 8 : 6) /* float32 outputs multiplied with 1 or 2 vectors of rows at a time */

enum kind { BFLOAT16, INT8, FLOAT32 }; /* of weights, as in row_kernels.py */

static inline __attribute__((always_inline)) long bytes_of(const enum kind kind) {
    return kind == INT8 ? 1 : kind == BFLOAT16 ? 2 : 4;
}

static inline __attribute__((always_inline)) lanes weights_at(const char *weight, const enum kind kind, long index) {
    const char *here = weight + bytes_of(kind) * index;
    return kind == INT8 ? FROM_INT8(here) : kind == BFLOAT16 ? FROM_BFLOAT16(here) : LOAD((const float *)here);
}

static inline __attribute__((always_inline)) float weight_at(const char *weight, const enum kind kind, long index) {
    return kind == INT8 ? ((const int8_t *)weight)[index] : element(weight, index, kind == BFLOAT16);
}

/* The products of one output's weights with each of `rows` inputs, which are float32 with `inputs` per row. */
static inline __attribute__((always_inline)) void products(
    const char *weight, const enum kind kind, const float *x, const int rows, long inputs, float *out
) {
    const long bytes = bytes_of(kind);
    lanes sums[FEW][4]; /* the compiler keeps no array of variable size in registers */
    for (int row = 0; row < rows; row++)
        for (int part = 0; part < 4; part++) sums[row][part] = ZERO;
    long index = 0;
    for (; index + STEP <= inputs; index += STEP) {
        for (int line = 0; line < bytes * STEP; line += 64)
            __builtin_prefetch(weight + bytes * index + line + AHEAD, 0, 2);
        for (int part = 0; part < 4; part++) {
            lanes weights = weights_at(weight, kind, index + part * LANES);
            for (int row = 0; row < rows; row++)
                sums[row][part] = ADD_PRODUCT(weights, LOAD(x + row * inputs + index + part * LANES), sums[row][part]);
        }
    }
    for (int row = 0; row < rows; row++) {
        float total = SUM(ADD(ADD(sums[row][0], sums[row][1]), ADD(sums[row][2], sums[row][3])));
        for (long rest = index; rest < inputs; rest++) total += weight_at(weight, kind, rest) * x[row * inputs + rest];
        out[row] = total;
    }
}

/* The products of GROUP outputs' weights with each of `rows` inputs: out (GROUP, MANY). Each loaded input is multiplied
 * with all of these weights; with those of a single output, loading the inputs would take longer than multiplying. */
static inline __attribute__((always_inline)) void group_products(
    const char *weight, const enum kind kind, const float *x, const int rows, long inputs, float *out
) {
    lanes sums[GROUP][FEW];
    for (int output = 0; output < GROUP; output++)
        for (int row = 0; row < rows; row++) sums[output][row] = ZERO;
    long index = 0;
    for (; index + LANES <= inputs; index += LANES) {
        lanes weights[GROUP];
        for (int output = 0; output < GROUP; output++)
            weights[output] = weights_at(weight, kind, output * inputs + index);
        for (int row = 0; row < rows; row++) {
            const lanes numbers = LOAD(x + row * inputs + index);
            for (int output = 0; output < GROUP; output++)
                sums[output][row] = ADD_PRODUCT(weights[output], numbers, sums[output][row]);
        }
    }
    for (int output = 0; output < GROUP; output++)
        for (int row = 0; row < rows; row++) {
            float total = SUM(sums[output][row]);
            for (long rest = index; rest < inputs; rest++)
                total += weight_at(weight, kind, output * inputs + rest) * x[row * inputs + rest];
            out[output * MANY + row] = total;
        }
}

/* The same for float32 and all rows at once: out (outputs, MANY) are the products of `outputs` outputs' weights with
 * columns (inputs, MANY), which has a column for each row of x. No sum has to be added up over lanes. */
static inline __attribute__((always_inline)) void column_products(
    const float *weights, const float *columns, const int outputs, const int vectors, long inputs, float *out
) {
    lanes sums[COLUMNS(1)][MANY / LANES];
    for (int output = 0; output < outputs; output++)
        for (int part = 0; part < vectors; part++) sums[output][part] = ZERO;
    for (long index = 0; index < inputs; index++) {
        if (index % 16 == 0) /* once per line of the cache, the weights of the next outputs */
            for (int output = 0; output < outputs; output++)
                __builtin_prefetch(weights + (output + outputs) * inputs + index, 0, 2);
        for (int output = 0; output < outputs; output++)
            for (int part = 0; part < vectors; part++)
                sums[output][part] = ADD_PRODUCT(
                    SAME(weights[output * inputs + index]), LOAD(columns + index * MANY + part * LANES), sums[output][part]);
    }
    for (int output = 0; output < outputs; output++)
        for (int part = 0; part < vectors; part++) STORE(out + output * MANY + part * LANES, sums[output][part]);
}

/* A layer: weight (outputs, inputs); scale and bias (outputs) or NULL. These, the inputs and the outputs are all bfloat16
 * or all float32. */
struct layer {
    const char *weight;
    const void *scale, *bias;
    long outputs, inputs;
    int kind, is_bfloat16;
};

#ifdef HAS_TILES
#define ADD_TILE(sums, weights, x) { _tile_loadd(4, weights, 64); _tile_loadd(5, x, 64); _tile_dpbf16ps(sums, 4, 5); }

/* Sums (16 outputs, 16 rows) of the outputs' weights with x in AMX's layout (inputs / 2, 16 rows, 2).
 *
 * The weights are first copied into tiles, 128 of each row at a time, so that memory is read along its rows; int8 becomes
 * bfloat16, which represents it exactly. Four tiles accumulate in turn, to hide the latency of each addition. */
static inline __attribute__((always_inline)) void tile_products(
    const char *weight, const int is_int8, const uint32_t *x, long inputs, float sums[4][SIDE][SIDE]
) {
    const long bytes = is_int8 ? 1 : 2, row_bytes = bytes * inputs;
    uint16_t tiles[4][SIDE][DEPTH] __attribute__((aligned(64)));
    const char *next = weight + SIDE * row_bytes; /* the weights of the next 16 outputs */
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (long index = 0; index < inputs; index += 4 * DEPTH) {
        const int n_tiles = inputs - index < 4 * DEPTH ? (inputs - index) / DEPTH : 4;
        for (int row = 0; row < SIDE; row++) {
            const char *here = weight + row * row_bytes + bytes * index;
            for (int line = 0; line < bytes * n_tiles * DEPTH; line += 64, next += 64) __builtin_prefetch(next, 0, 2);
            for (int tile = 0; tile < n_tiles; tile++, here += bytes * DEPTH)
                _mm512_store_si512(tiles[tile][row], is_int8
                    ? (__m512i)_mm512_cvtne2ps_pbh(FROM_INT8(here + 16), FROM_INT8(here)) : _mm512_loadu_si512(here));
        }
        const uint32_t *part = x + index / 2 * SIDE;
        ADD_TILE(0, tiles[0], part)
        if (n_tiles > 1) ADD_TILE(1, tiles[1], part + DEPTH / 2 * SIDE)
        if (n_tiles > 2) ADD_TILE(2, tiles[2], part + DEPTH * SIDE)
        if (n_tiles > 3) ADD_TILE(3, tiles[3], part + 3 * DEPTH / 2 * SIDE)
    }
    _tile_stored(0, sums[0], 64);
    _tile_stored(1, sums[1], 64);
    _tile_stored(2, sums[2], 64);
    _tile_stored(3, sums[3], 64);
}

/* row_product for up to 16 rows; everything but int8 weights is bfloat16. */
static void tile_product(
    const struct layer *layer, const uint16_t *x, const uint16_t *residual, uint16_t *y, long rows, int has_gelu
) {
    const long outputs = layer->outputs, inputs = layer->inputs, pairs = inputs / 2;
    const uint16_t *scale = layer->scale, *bias = layer->bias;
    const __m512i column = _mm512_mullo_epi32(
        _mm512_set1_epi32(SIDE), _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0));
    uint32_t tiles[pairs * SIDE] __attribute__((aligned(64)));
#pragma omp parallel
    {
#pragma omp for schedule(static)
        for (long pair = 0; pair < pairs; pair++)
            for (long row = 0; row < SIDE; row++)
                tiles[pair * SIDE + row] = row < rows ? ((const uint32_t *)x)[row * pairs + pair] : 0;
        float sums[4][SIDE][SIDE] __attribute__((aligned(64)));
        use_tiles();
#pragma omp for schedule(static)
        for (long group = 0; group < (outputs + SIDE - 1) / SIDE; group++) {
            /* The last group starts early enough to be whole; outputs that two groups compute are the same. */
            const long first = (group + 1) * SIDE <= outputs ? group * SIDE : outputs - SIDE;
            if (layer->kind == INT8) tile_products(layer->weight + first * inputs, 1, tiles, inputs, sums);
            else tile_products(layer->weight + 2 * first * inputs, 0, tiles, inputs, sums);
            for (int output = 0; output < SIDE; output++)
                _mm512_store_ps(sums[0][output], ADD(
                    ADD(LOAD(sums[0][output]), LOAD(sums[1][output])), ADD(LOAD(sums[2][output]), LOAD(sums[3][output]))));
            for (long row = 0; row < rows; row++) {
                lanes values = _mm512_i32gather_ps(column, &sums[0][0][row], 4);
                if (scale) values = _mm512_mul_ps(values, FROM_BFLOAT16(scale + first));
                if (bias) values = ADD(values, FROM_BFLOAT16(bias + first));
                if (has_gelu) {
                    float numbers[SIDE];
                    _mm512_storeu_ps(numbers, values);
                    for (int index = 0; index < SIDE; index++) numbers[index] = gelu(numbers[index]);
                    values = LOAD(numbers);
                }
                if (residual) values = ADD(values, FROM_BFLOAT16(residual + row * outputs + first));
                _mm256_storeu_si256((__m256i *)(y + row * outputs + first), (__m256i)_mm512_cvtneps_pbh(values));
            }
        }
        _tile_release();
    }
}
#else
#define tile_product(layer, x, residual, y, rows, has_gelu) (void)0
#endif

static int is_tiled(const struct layer *layer) {
    return layer->is_bfloat16 && layer->outputs >= SIDE && layer->inputs % DEPTH == 0 && may_use_tiles();
}

/* The largest number of rows that `row_product` accepts for a layer; with more, other products are faster. Those for
 * 8-bit weights widen every weight first, and those for bfloat16 need AVX512; without it, this one is faster for more
 * rows. */
long max_rows(const struct layer *layer) {
#ifdef __AVX512F__
    return is_tiled(layer) ? 16 : layer->kind == BFLOAT16 ? FEW : MANY;
#else
    return MANY;
#endif
}

/* The kind and the number of rows as constants for the compiler, so that sums stay in registers. */
#define OF_KIND(function, rows) \
    switch (kind) { \
        case BFLOAT16: function(weight, BFLOAT16, x, rows, inputs, out); break; \
        case INT8: function(weight, INT8, x, rows, inputs, out); break; \
        default: function(weight, FLOAT32, x, rows, inputs, out); \
    }
#define OF_ROWS(function) \
    switch (rows) { \
        case 1: OF_KIND(function, 1) break; \
        case 2: OF_KIND(function, 2) break; \
        case 3: OF_KIND(function, 3) break; \
        default: OF_KIND(function, 4) \
    }

/* `products` for up to FEW rows. */
static void few_products(const char *weight, enum kind kind, const float *x, long rows, long inputs, float *out) {
    OF_ROWS(products)
}

/* `group_products` for up to FEW rows. */
static void few_group_products(
    const char *weight, enum kind kind, const float *x, long rows, long inputs, float *out
) {
    OF_ROWS(group_products)
}

/* Finishes one output of each row from its product `out` and stores it. */
static inline void store(
    const struct layer *layer, const float *out, const void *residual, void *y, long rows, long output, int has_gelu
) {
    const int is_bfloat16 = layer->is_bfloat16;
    for (long row = 0; row < rows; row++) {
        long index = row * layer->outputs + output;
        float value = out[row];
        if (layer->scale) value *= element(layer->scale, output, is_bfloat16);
        if (layer->bias) value += element(layer->bias, output, is_bfloat16);
        if (has_gelu) value = gelu(value);
        if (residual) value += element(residual, index, is_bfloat16);
        if (is_bfloat16) ((uint16_t *)y)[index] = bfloat16_of(value);
        else ((float *)y)[index] = value;
    }
}

/* `column_products` with constants for the compiler, for COLUMNS(vectors) outputs or for one. */
static void many_products(
    const float *weights, const float *columns, long outputs, int vectors, long inputs, float *out
) {
    if (outputs == 1) column_products(weights, columns, 1, MANY / LANES, inputs, out);
    else if (vectors == 1) column_products(weights, columns, COLUMNS(1), 1, inputs, out);
    else column_products(weights, columns, COLUMNS(2), MANY / LANES, inputs, out);
}

/* row_product for FEW to MANY rows of a layer in float32. */
static void column_product(
    const struct layer *layer, const float *x, const float *residual, float *y, long rows, int has_gelu
) {
    const long outputs = layer->outputs, inputs = layer->inputs;
    const int vectors = (rows + LANES - 1) / LANES;
    const long group = COLUMNS(vectors), groups = outputs / group;
    float *columns = aligned_alloc(64, MANY * inputs * sizeof(float));
#pragma omp parallel
    {
#pragma omp for schedule(static)
        for (long index = 0; index < inputs; index++)
            for (long row = 0; row < MANY; row++) columns[index * MANY + row] = row < rows ? x[row * inputs + index] : 0;
#pragma omp for schedule(static)
        for (long part = 0; part < groups + outputs % group; part++) { /* groups of outputs, then single ones */
            const long count = part < groups ? group : 1;
            const long output = part < groups ? part * group : groups * group + part - groups;
            float out[COLUMNS(1)][MANY];
            many_products((const float *)layer->weight + output * inputs, columns, count, vectors, inputs, out[0]);
            for (long number = 0; number < count; number++)
                store(layer, out[number], residual, y, rows, output + number, has_gelu);
        }
    }
    free(columns);
}

/* GELU of `count` numbers in float32, for products of more rows than `row_product` accepts. */
void gelu_in_place(float *numbers, long count) {
#pragma omp parallel for schedule(static)
    for (long part = 0; part < count / LANES; part++)
        STORE(numbers + part * LANES, gelus(LOAD(numbers + part * LANES)));
    for (long index = count / LANES * LANES; index < count; index++) numbers[index] = gelu(numbers[index]);
}

/* x (rows, inputs), rows 1 to max_rows; y and residual, which may be NULL, (rows, outputs). */
void row_product(const struct layer *layer, const void *x, const void *residual, void *y, long rows, int has_gelu) {
    const long outputs = layer->outputs, inputs = layer->inputs;
    if (rows > FEW && is_tiled(layer)) {
        tile_product(layer, x, residual, y, rows, has_gelu);
        return;
    }
    if (rows > FEW && layer->kind == FLOAT32) {
        column_product(layer, x, residual, y, rows, has_gelu);
        return;
    }
    const long row_bytes = bytes_of(layer->kind) * inputs;
    float converted[layer->is_bfloat16 ? rows * inputs : 1];
    const float *numbers = layer->is_bfloat16 ? converted : x;
    if (layer->is_bfloat16)
        for (long index = 0; index < rows * inputs; index++) converted[index] = float_of(((const uint16_t *)x)[index]);
    if (rows <= FEW) { /* without the loop over groups of rows, which costs a single row 7 % */
#pragma omp parallel for schedule(static)
        for (long output = 0; output < outputs; output++) {
            float out[FEW];
            few_products(layer->weight + output * row_bytes, layer->kind, numbers, rows, inputs, out);
            store(layer, out, residual, y, rows, output, has_gelu);
        }
        return;
    }
    const long groups = outputs / GROUP;
#pragma omp parallel for schedule(static)
    for (long part = 0; part < groups + outputs % GROUP; part++) { /* groups of outputs, then single ones */
        const int is_group = part < groups;
        const long output = is_group ? part * GROUP : groups * GROUP + part - groups;
        const char *weight = layer->weight + output * row_bytes;
        float out[GROUP][MANY];
        for (long first = 0; first < rows; first += FEW) { /* the weights are in the cache after the first rows */
            const long count = rows - first < FEW ? rows - first : FEW;
            const float *these = numbers + first * inputs;
            if (is_group) few_group_products(weight, layer->kind, these, count, inputs, out[0] + first);
            else few_products(weight, layer->kind, these, count, inputs, out[0] + first);
        }
        for (int number = 0; number < (is_group ? GROUP : 1); number++)
            store(layer, out[number], residual, y, rows, output + number, has_gelu);
    }
}
