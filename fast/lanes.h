/* Vectors of float32 in AVX512 or AVX2 registers, and conversions between bfloat16 and float32. */
#include <immintrin.h>
#include <math.h>
#include <stdint.h>

#if defined(__AVX512F__) && defined(__AVX512BW__)
#define LANES 16
typedef __m512 lanes;
#define ZERO _mm512_setzero_ps()
#define LOAD(p) _mm512_loadu_ps(p)
#define STORE(p, a) _mm512_storeu_ps(p, a)
#define SAME(number) _mm512_set1_ps(number)
#define ADD_PRODUCT(a, b, sum) _mm512_fmadd_ps(a, b, sum)
#define ADD(a, b) _mm512_add_ps(a, b)
#define MULTIPLY(a, b) _mm512_mul_ps(a, b)
#define DIVIDE(a, b) _mm512_div_ps(a, b)
#define LARGER(a, b) _mm512_max_ps(a, b)
#define IF_NEGATIVE(test, a, b) _mm512_mask_blend_ps(_mm512_cmp_ps_mask(test, ZERO, _CMP_LT_OQ), b, a)
#define POWER_OF_2(whole) \
    _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(whole), _mm512_set1_epi32(127)), 23))
#define SUM(a) _mm512_reduce_add_ps(a)
#define FROM_INT8(p) _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(p))))
#define FROM_BFLOAT16(p) \
    _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(p))), 16))
#elif defined(__AVX2__) && defined(__FMA__)
#define LANES 8
typedef __m256 lanes;
#define ZERO _mm256_setzero_ps()
#define LOAD(p) _mm256_loadu_ps(p)
#define STORE(p, a) _mm256_storeu_ps(p, a)
#define SAME(number) _mm256_set1_ps(number)
#define ADD_PRODUCT(a, b, sum) _mm256_fmadd_ps(a, b, sum)
#define ADD(a, b) _mm256_add_ps(a, b)
#define MULTIPLY(a, b) _mm256_mul_ps(a, b)
#define DIVIDE(a, b) _mm256_div_ps(a, b)
#define LARGER(a, b) _mm256_max_ps(a, b)
#define IF_NEGATIVE(test, a, b) _mm256_blendv_ps(b, a, test)
#define POWER_OF_2(whole) \
    _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(whole), _mm256_set1_epi32(127)), 23))
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
#error "needs AVX512 or AVX2 with FMA"
#endif

static inline float float_of(uint16_t bfloat16) {
    union { uint32_t bits; float number; } value = {(uint32_t)bfloat16 << 16};
    return value.number;
}

static inline uint16_t bfloat16_of(float number) { /* rounds to the nearest, to even between two */
    union { float number; uint32_t bits; } value = {number};
    if (number != number) return 0x7fc0;
    return (uint16_t)((value.bits + 0x7fff + ((value.bits >> 16) & 1)) >> 16);
}

static inline float element(const void *numbers, long index, int is_bfloat16) {
    return is_bfloat16 ? float_of(((const uint16_t *)numbers)[index]) : ((const float *)numbers)[index];
}

/* exp(x) for x <= 0, accurate to a few ulp: a power of two times the Taylor series of the rest. */
static inline float exponential(float x) {
    const float power = (x < -87 ? -87 : x) * 1.44269504f;
    const float whole = (power + 12582912.0f) - 12582912.0f; /* rounds: the sum has no bits for fractions */
    const float rest = (power - whole) * 0.69314718f;        /* at most 0.35 */
    const float series =
        1 + rest * (1 + rest * (1 / 2.0f + rest * (1 / 6.0f + rest * (1 / 24.0f + rest * (1 / 120.0f + rest / 720)))));
    union { int32_t bits; float number; } scale = {((int32_t)whole + 127) << 23};
    return series * scale.number;
}

/* The same for each lane. */
static inline lanes exponentials(lanes x) {
    const lanes power = MULTIPLY(LARGER(x, SAME(-87)), SAME(1.44269504f)), shift = SAME(12582912.0f);
    const lanes whole = ADD(ADD(power, shift), SAME(-12582912.0f));
    const lanes rest = MULTIPLY(ADD_PRODUCT(whole, SAME(-1), power), SAME(0.69314718f));
    lanes series = SAME(1 / 720.0f);
    for (int term = 5; term >= 0; term--) {
        static const float factors[] = {1, 1, 1 / 2.0f, 1 / 6.0f, 1 / 24.0f, 1 / 120.0f};
        series = ADD_PRODUCT(rest, series, SAME(factors[term]));
    }
    return MULTIPLY(series, POWER_OF_2(whole));
}

/* GELU by its tanh: x times the sigmoid of 2 sqrt(2 / pi) (x + 0.044715 x^3). */
static inline float gelu(float x) {
    const float doubled = 1.59576912f * x * (1 + 0.044715f * x * x), shrunk = exponential(-fabsf(doubled));
    return x * (doubled < 0 ? shrunk : 1.0f) / (1 + shrunk);
}

/* The same for each lane. */
static inline lanes gelus(lanes x) {
    const lanes cubic = ADD_PRODUCT(MULTIPLY(x, x), SAME(0.044715f), SAME(1));
    const lanes doubled = MULTIPLY(MULTIPLY(x, SAME(1.59576912f)), cubic), negated = MULTIPLY(doubled, SAME(-1));
    const lanes shrunk = exponentials(IF_NEGATIVE(doubled, doubled, negated));
    return MULTIPLY(x, DIVIDE(IF_NEGATIVE(doubled, shrunk, SAME(1)), ADD(shrunk, SAME(1))));
}
