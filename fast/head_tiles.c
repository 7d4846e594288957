/* The loss of the head and its gradients, in bfloat16 with AMX: logits, softmax, cross entropy, and two more products.
 *
 * A thread takes CHUNK rows at a time, whose logits stay in its cache. Of a row's logits, it keeps the powers
 * exp(logit - largest) and never divides them by their sum: the sums of the products are divided instead. The gradient of
 * the target's logit is minus the sum of all other powers, so nothing is lost where a probability is close to 1.
 *
 * Parallel regions run on the OpenMP library that torch has loaded, so both share its threads.
 */
#include <math.h>
#include <omp.h>
#include <string.h>

#include "tile_products.h"

struct head {
    long rows, width, ids, threads;
};

#ifdef HAS_TILES

static long own_bytes(const struct head *head) {
    const long numbers = CHUNK * (3 * head->width + 2 * head->ids), sums = head->width * head->ids;
    return numbers * sizeof(uint16_t) + (sums + CHUNK * (SIDE + 1)) * sizeof(float);
}

long head_memory_bytes(const struct head *head) {
    return 2 * head->width * head->ids * sizeof(uint16_t) + head->threads * own_bytes(head);
}

/* Where a chunk's logits go: left tiles (CHUNK, ids), and LANES of each row's largest ones. */
struct logits_to {
    tile *left;
    float *maxima;
    long ids;
};

static void store_logits(const void *how, long row, long column, const float *sums) {
    const struct logits_to *to = how;
    for (long i = 0; i < BLOCK; i += 2) {
        __m512i both[2];
        for (long next = 0; next < 2; next++, sums += BLOCK) {
            const lanes first = LOAD(sums), second = LOAD(sums + LANES);
            float *maxima = to->maxima + (row + i + next) * LANES;
            STORE(maxima, LARGER(LOAD(maxima), LARGER(first, second)));
            both[next] = rounded(first, second);
        }
        store_rows(both[0], both[1], to->left, 0, CHUNK, to->ids, row + i, column);
    }
}

/* Where a chunk's gradients of the hidden state go: each row divided by its sum of powers, in its place. */
struct hidden_grads {
    float *to;
    const float *inverses;
    const int64_t *rows;
    long count, width;
};

static void store_hidden_grads(const void *how, long row, long column, const float *sums) {
    const struct hidden_grads *grads = how;
    for (long i = row; i < row + BLOCK && i < grads->count; i++, sums += BLOCK)
        for (long j = 0; j < BLOCK; j += LANES)
            STORE(grads->to + grads->rows[i] * grads->width + column + j,
                  MULTIPLY(LOAD(sums + j), SAME(grads->inverses[i])));
}

/* The powers of two rows of logits, in place and in right tiles, and their sums. */
static void to_powers(tile *logits, tile *right, long ids, long row, const float *most, float *totals) {
    lanes sums[2] = {ZERO, ZERO};
    for (long column = 0; column < ids; column += DEPTH) {
        const uint16_t *here = number_at(logits, ids, row, column);
        __m512i both[2];
        for (long next = 0; next < 2; next++, here += DEPTH) {
            lanes powers[2];
            for (long part = 0; part < 2; part++) {
                const lanes exponents = MULTIPLY(ADD(FROM_BFLOAT16(here + part * LANES), SAME(-most[next])), SAME(LOG2_E));
                powers[part] = powers_of_2(LARGER(exponents, SAME(LEAST)));
                sums[next] = ADD(sums[next], powers[part]);
            }
            both[next] = rounded(powers[0], powers[1]);
        }
        store_rows(both[0], both[1], logits, right, CHUNK, ids, row, column);
    }
    totals[0] = SUM(sums[0]);
    totals[1] = SUM(sums[1]);
}

/* The losses of a chunk's first `count` rows. Their logits become gradients, times the sum of the powers, whose inverses are
 * kept. */
static void to_gradients(
    tile *logits, tile *right, long ids, long count, const float *maxima, const int64_t *targets, float *losses,
    float *inverses
) {
    for (long row = 0; row < CHUNK; row += 2) {
        float most[2], scores[2], missed[2];
        for (long next = 0; next < 2; next++) {
            /* rounded, as the logits are: the largest of them minus the unrounded one could be far below 0 */
            most[next] = float_of(bfloat16_of(_mm512_reduce_max_ps(LOAD(maxima + (row + next) * LANES))));
            if (row + next >= count) continue;
            uint16_t *target = number_at(logits, ids, row + next, targets[row + next]);
            scores[next] = float_of(*target) - most[next];
            *target = bfloat16_of(-1e38f); /* leaves the target's power out of the sum */
        }
        to_powers(logits, right, ids, row, most, missed);
        for (long next = 0; next < 2 && row + next < count; next++) {
            const long target = targets[row + next], here = row + next;
            const float hit = expf(scores[next]), total = hit + missed[next];
            const uint16_t grad = bfloat16_of(-missed[next]);
            losses[here] = missed[next] < hit ? log1pf(missed[next] / hit) : logf(total) - scores[next];
            inverses[here] = 1 / total;
            *number_at(logits, ids, here, target) = grad;
            right[target / SIDE * (CHUNK / DEPTH) + here / DEPTH].numbers[here % DEPTH / 2 * DEPTH + target % SIDE * 2 +
                                                                           here % 2] = grad;
        }
    }
}

/* Store the rows of `hidden` that `rows` lists, times `factors` if there are any, in tiles; rows from `count` on are 0. */
static void pack_hidden(
    const float *hidden, const int64_t *rows, long count, long width, const float *factors, tile *left, tile *right
) {
    for (long row = 0; row < CHUNK; row += 2)
        for (long column = 0; column < width; column += DEPTH) {
            __m512i both[2];
            for (long next = 0; next < 2; next++) {
                const float *here = hidden + (row + next < count ? rows[row + next] : 0) * width + column;
                const lanes factor = SAME(row + next >= count ? 0 : factors ? factors[row + next] : 1);
                both[next] = rounded(MULTIPLY(LOAD(here), factor), MULTIPLY(LOAD(here + LANES), factor));
            }
            store_rows(both[0], both[1], left, right, CHUNK, width, row, column);
        }
}

/* The losses (rows) of the rows of `hidden` (any, width) that `rows` lists, with their targets. Unless they are 0,
 * `hidden_grad` gets their gradients, and `weight_grad` (ids, width) that of the weight. */
void head_losses(
    const struct head *head, const float *hidden, const float *weight, const int64_t *rows, const int64_t *targets,
    float *losses, float *hidden_grad, float *weight_grad, char *memory
) {
    const long width = head->width, ids = head->ids, step = own_bytes(head), n_tiles = CHUNK * width / (SIDE * DEPTH);
    tile *transposed = tiles_of(&memory, width * ids), *packed_weight = tiles_of(&memory, width * ids);
#pragma omp parallel num_threads(head->threads)
    {
        char *own = memory + omp_get_thread_num() * step;
        float *sums = floats_of(&own, width * ids), *maxima = floats_of(&own, CHUNK * SIDE);
        float *inverses = floats_of(&own, CHUNK);
        tile *left = tiles_of(&own, CHUNK * width), *right = tiles_of(&own, CHUNK * width);
        tile *columns = tiles_of(&own, CHUNK * width); /* left tiles of a transpose */
        tile *powers = tiles_of(&own, CHUNK * ids), *powers_right = tiles_of(&own, CHUNK * ids);
        pack(weight, ids, width, 1, transposed);
        if (hidden_grad) pack(weight, ids, width, 0, packed_weight);
        if (weight_grad) memset(sums, 0, width * ids * sizeof *sums);
        use_tiles();
#pragma omp for schedule(static)
        for (long first = 0; first < head->rows; first += CHUNK) {
            const long count = first + CHUNK < head->rows ? CHUNK : head->rows - first;
            const struct logits_to to_logits = {powers, maxima, ids};
            const struct hidden_grads to_hidden = {hidden_grad, inverses, rows + first, count, width};
            for (long n = 0; n < CHUNK * SIDE; n++) maxima[n] = -INFINITY;
            pack_hidden(hidden, rows + first, count, width, 0, left, 0);
            product(left, CHUNK, transposed, ids, width, store_logits, &to_logits);
            to_gradients(powers, powers_right, ids, count, maxima, targets + first, losses + first, inverses);
            if (hidden_grad) product(powers, CHUNK, packed_weight, width, ids, store_hidden_grads, &to_hidden);
            if (!weight_grad) continue;
            pack_hidden(hidden, rows + first, count, width, inverses, 0, right);
            transpose_tiles(right, n_tiles, columns);
            accumulate(columns, width, powers_right, ids, CHUNK, sums);
        }
        _tile_release();
        if (weight_grad) add_up((const float *)memory, step, width, ids, 1, weight_grad);
    }
}
#endif
