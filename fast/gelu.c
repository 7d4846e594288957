/* GELU and its gradient in a training step, in float32 or bfloat16, computed in float32.
 *
 * Parallel regions run on the OpenMP library that torch has loaded, so both share its threads.
 */
#include "lanes.h"

#define CHUNK 4096 /* numbers that a thread computes at a time; a multiple of LANES */

#ifdef __AVX512BF16__
#define TO_BFLOAT16(p, a) _mm256_storeu_si256((__m256i *)(p), (__m256i)_mm512_cvtneps_pbh(a))
#else
#define TO_BFLOAT16(p, a) to_bfloat16(p, a)
static inline void to_bfloat16(uint16_t *to, lanes numbers) {
    float each[LANES];
    STORE(each, numbers);
    for (int lane = 0; lane < LANES; lane++) to[lane] = bfloat16_of(each[lane]);
}
#endif

static inline __attribute__((always_inline)) lanes load(const char *from, long index, const int is_bfloat16) {
    return is_bfloat16 ? FROM_BFLOAT16((const uint16_t *)from + index) : LOAD((const float *)from + index);
}

static inline __attribute__((always_inline)) void store(char *to, long index, lanes numbers, const int is_bfloat16) {
    if (is_bfloat16) TO_BFLOAT16((uint16_t *)to + index, numbers);
    else STORE((float *)to + index, numbers);
}

/* LANES numbers of y = gelu(x) and, with the gradient of y, of the gradient of x. */
static inline __attribute__((always_inline)) void lanes_at(
    const char *x, const char *y_grad, char *y, char *x_grad, long index, const int is_bfloat16
) {
    const lanes z = load(x, index, is_bfloat16), square = MULTIPLY(z, z), one = SAME(1);
    const lanes doubled = MULTIPLY(MULTIPLY(z, SAME(1.59576912f)), ADD_PRODUCT(square, SAME(0.044715f), one));
    const lanes shrunk = exponentials(IF_NEGATIVE(doubled, doubled, MULTIPLY(doubled, SAME(-1))));
    const lanes inverse = DIVIDE(one, ADD(shrunk, one));
    const lanes sigmoid = MULTIPLY(inverse, IF_NEGATIVE(doubled, shrunk, one));
    store(y, index, MULTIPLY(z, sigmoid), is_bfloat16);
    if (!x_grad) return;
    const lanes slope = MULTIPLY(MULTIPLY(z, SAME(1.59576912f)), ADD_PRODUCT(square, SAME(3 * 0.044715f), one));
    const lanes derivative = ADD_PRODUCT(MULTIPLY(shrunk, MULTIPLY(inverse, inverse)), slope, sigmoid);
    store(x_grad, index, MULTIPLY(load(y_grad, index, is_bfloat16), derivative), is_bfloat16);
}

static inline __attribute__((always_inline)) void all(
    const char *x, const char *y_grad, char *y, char *x_grad, long count, long threads, const int is_bfloat16
) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long first = 0; first < count; first += CHUNK)
        for (long index = first; index < first + CHUNK && index < count; index += LANES)
            lanes_at(x, y_grad, y, x_grad, index, is_bfloat16);
}

/* y = gelu(x) for `count` numbers, a multiple of LANES. */
void gelu_forward(const char *x, char *y, long count, long threads, int is_bfloat16) {
    if (is_bfloat16) all(x, 0, y, 0, count, threads, 1);
    else all(x, 0, y, 0, count, threads, 0);
}

/* The gradient of x from that of y, and y again. */
void gelu_backward(const char *x, const char *y_grad, char *y, char *x_grad, long count, long threads, int is_bfloat16) {
    if (is_bfloat16) all(x, y_grad, y, x_grad, count, threads, 1);
    else all(x, y_grad, y, x_grad, count, threads, 0);
}
