/* y = x weight' * scale + bias + residual for a few rows x: what generation does for each token.
 *
 * Every weight is read once, in the order in which it lies in memory, and ahead of its use: the time is the memory's.
 * The compiler leaves parallel regions to the OpenMP library that torch has loaded, so both share its threads.
 */
#include <immintrin.h>
#include <stdint.h>

#define AHEAD 8192 /* bytes between what is used and what is fetched, into the second cache */

#if defined(__AVX512F__) && defined(__AVX512BW__)
#define LANES 16
typedef __m512 lanes;
#define ZERO _mm512_setzero_ps()
#define LOAD(p) _mm512_loadu_ps(p)
#define ADD_PRODUCT(a, b, sum) _mm512_fmadd_ps(a, b, sum)
#define ADD(a, b) _mm512_add_ps(a, b)
#define SUM(a) _mm512_reduce_add_ps(a)
#define FROM_INT8(p) _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(p))))
#define FROM_BFLOAT16(p) \
    _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(p))), 16))
#elif defined(__AVX2__) && defined(__FMA__)
#define LANES 8
typedef __m256 lanes;
#define ZERO _mm256_setzero_ps()
#define LOAD(p) _mm256_loadu_ps(p)
#define ADD_PRODUCT(a, b, sum) _mm256_fmadd_ps(a, b, sum)
#define ADD(a, b) _mm256_add_ps(a, b)
#define SUM(a) sum_of_8(a)
#define FROM_INT8(p) _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(p))))
#define FROM_BFLOAT16(p) \
    _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(p))), 16))
static inline float sum_of_8(__m256 numbers) {
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(numbers), _mm256_extractf128_ps(numbers, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
#else
#error "no vector instructions that this was written for"
#endif

#define STEP (4 * LANES) /* weights of a turn: four sums hide how long each addition takes */

static float float_of(uint16_t bfloat16) {
    union { uint32_t bits; float number; } value = {(uint32_t)bfloat16 << 16};
    return value.number;
}

static uint16_t bfloat16_of(float number) { /* rounds to the nearest, to even between two */
    union { float number; uint32_t bits; } value = {number};
    if (number != number) return 0x7fc0;
    return (uint16_t)((value.bits + 0x7fff + ((value.bits >> 16) & 1)) >> 16);
}

static float element(const void *numbers, long place, int is_bfloat16) {
    return is_bfloat16 ? float_of(((const uint16_t *)numbers)[place]) : ((const float *)numbers)[place];
}

/* The products of one output's weights with each of `rows` inputs, which are float32 with `inputs` in a row. */
static inline __attribute__((always_inline)) void products(
    const char *weight, const int is_int8, const float *x, const int rows, long inputs, float *found
) {
    const int bytes = is_int8 ? 1 : 2;
    lanes sums[rows][4];
    for (int row = 0; row < rows; row++)
        for (int part = 0; part < 4; part++) sums[row][part] = ZERO;
    long place = 0;
    for (; place + STEP <= inputs; place += STEP) {
        for (int line = 0; line < bytes * STEP; line += 64)
            __builtin_prefetch(weight + bytes * place + line + AHEAD, 0, 2);
        for (int part = 0; part < 4; part++) {
            const char *here = weight + bytes * (place + part * LANES);
            lanes weights = is_int8 ? FROM_INT8(here) : FROM_BFLOAT16(here);
            for (int row = 0; row < rows; row++)
                sums[row][part] = ADD_PRODUCT(weights, LOAD(x + row * inputs + place + part * LANES), sums[row][part]);
        }
    }
    for (int row = 0; row < rows; row++) {
        float total = SUM(ADD(ADD(sums[row][0], sums[row][1]), ADD(sums[row][2], sums[row][3])));
        for (long rest = place; rest < inputs; rest++) {
            float one = is_int8 ? ((const int8_t *)weight)[rest] : float_of(((const uint16_t *)weight)[rest]);
            total += one * x[row * inputs + rest];
        }
        found[row] = total;
    }
}

/* A layer: weight (outputs, inputs) int8 or bfloat16; scale and bias (outputs) or NULL. These, the inputs and the
 * outputs are all bfloat16 or all float32. */
struct layer {
    const char *weight;
    const void *scale, *bias;
    long outputs, inputs;
    int is_int8, is_bfloat16;
};

/* x (rows, inputs), rows 1 to 4; y and residual, which may be NULL, (rows, outputs). */
void row_product(const struct layer *layer, const void *x, const void *residual, void *y, long rows) {
    const long outputs = layer->outputs, inputs = layer->inputs;
    const int is_int8 = layer->is_int8, is_bfloat16 = layer->is_bfloat16;
    float numbers[rows * inputs];
    for (long place = 0; place < rows * inputs; place++) numbers[place] = element(x, place, is_bfloat16);
#pragma omp parallel for schedule(static)
    for (long output = 0; output < outputs; output++) {
        const char *weight = layer->weight + (is_int8 ? 1 : 2) * output * inputs;
        float found[4];
        switch (2 * rows + is_int8) { /* numbers that the compiler knows, so that sums stay in registers */
            case 2: products(weight, 0, numbers, 1, inputs, found); break;
            case 3: products(weight, 1, numbers, 1, inputs, found); break;
            case 4: products(weight, 0, numbers, 2, inputs, found); break;
            case 5: products(weight, 1, numbers, 2, inputs, found); break;
            case 6: products(weight, 0, numbers, 3, inputs, found); break;
            case 7: products(weight, 1, numbers, 3, inputs, found); break;
            case 8: products(weight, 0, numbers, 4, inputs, found); break;
            default: products(weight, 1, numbers, 4, inputs, found);
        }
        for (long row = 0; row < rows; row++) {
            long place = row * outputs + output;
            float value = found[row];
            if (layer->scale) value *= element(layer->scale, output, is_bfloat16);
            if (layer->bias) value += element(layer->bias, output, is_bfloat16);
            if (residual) value += element(residual, place, is_bfloat16);
            if (is_bfloat16) ((uint16_t *)y)[place] = bfloat16_of(value);
            else ((float *)y)[place] = value;
        }
    }
}
