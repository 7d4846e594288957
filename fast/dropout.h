/* Dropout without a stored mask: a seed and a number's index decide whether it is dropped. */
struct dropout {
    uint32_t seed, least; /* a number is kept if its random bits are at least `least`; 0 turns dropout off */
    float scale;          /* of the numbers that are kept */
};

#ifdef HAS_TILES
/* 16 numbers after dropout, with indices from `index` on, `step` apart. The random bits are a hash of the index (lowbias32,
 * by Chris Wellons). */
static inline lanes dropped(const struct dropout *dropout, uint32_t index, uint32_t step, lanes numbers) {
    if (!dropout->least) return numbers;
    const __m512i order = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i indices = _mm512_add_epi32(_mm512_set1_epi32(index), _mm512_mullo_epi32(order, _mm512_set1_epi32(step)));
    __m512i bits = _mm512_xor_si512(indices, _mm512_set1_epi32(dropout->seed));
    bits = _mm512_xor_si512(bits, _mm512_srli_epi32(bits, 16));
    bits = _mm512_mullo_epi32(bits, _mm512_set1_epi32(0x7feb352d));
    bits = _mm512_xor_si512(bits, _mm512_srli_epi32(bits, 15));
    bits = _mm512_mullo_epi32(bits, _mm512_set1_epi32((int)0x846ca68bu));
    bits = _mm512_xor_si512(bits, _mm512_srli_epi32(bits, 16));
    const __mmask16 kept = _mm512_cmpge_epu32_mask(bits, _mm512_set1_epi32(dropout->least));
    return _mm512_maskz_mul_ps(kept, numbers, SAME(dropout->scale));
}
#endif
