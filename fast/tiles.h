/* AMX: products of matrices in tiles of 16 rows of 64 bytes, here of bfloat16 with sums in float32. */
#define SIDE 16  /* rows of a tile, and numbers in a row of sums */
#define DEPTH 32 /* bfloat16 numbers in a row of a tile */

#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__linux__)
#define HAS_TILES
#include <immintrin.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <unistd.h>

/* Whether the system lets this process use the tiles; Linux has to be asked for them. */
static inline int may_use_tiles(void) {
    const long arch_req_xcomp_perm = 0x1023, xfeature_xtiledata = 18;
    return syscall(SYS_arch_prctl, arch_req_xcomp_perm, xfeature_xtiledata) == 0;
}

/* Give each of this thread's 8 tiles 16 rows of 64 bytes, until _tile_release(). */
static inline void use_tiles(void) {
    const struct { uint8_t palette, start_row, reserved[14]; uint16_t row_bytes[16]; uint8_t rows[16]; } shape = {
        .palette = 1,
        .row_bytes = {64, 64, 64, 64, 64, 64, 64, 64},
        .rows = {SIDE, SIDE, SIDE, SIDE, SIDE, SIDE, SIDE, SIDE}};
    _tile_loadconfig(&shape);
}
#else
static inline int may_use_tiles(void) { return 0; }
#endif
