/* Causal attention of one head within one document, forward and backward, as document_attention.c calls it for all of them.
 *
 * qkv (rows, tokens, 3, heads, size) is the output of c_attn. `q`, `y`, `y_grad`, `q_grad` and `logsumexp` point to the
 * head's part of the document's first token; `length` is the number of its tokens, and `memory` belongs to the thread. */
#include <stdint.h>

#include "dropout.h"

struct shape {
    long rows, tokens, heads, size, threads; /* `size` of a head */
    int is_bfloat16;
    struct dropout dropout; /* of the weights, only in bfloat16 */
};

/* In bfloat16 with sums in float32, by AMX (document_tiles.c). */
int supports_tiles(long size);
long tile_memory_bytes(const struct shape *shape);
void attend_in_tiles(
    const struct shape *shape, long length, uint32_t index, const uint16_t *q, uint16_t *y, float *logsumexp, char *memory);
void attend_in_tiles_backward(
    const struct shape *shape, long length, uint32_t index, const uint16_t *q, const uint16_t *y_grad, const uint16_t *y,
    const float *logsumexp, uint16_t *q_grad, char *memory);
