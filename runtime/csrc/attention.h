// Attention, and the small loops over the rows of a decoder layer: one table per instruction set, all
// with the same bits.
#pragma once
#include <cstdint>

#include "edgemoe_core.h"

namespace em {

constexpr int kLanes = 16;
constexpr int kMaxAttentionRows = 8;

// Up to kMaxAttentionRows queries that read one key/value head; row r sees keys begin[r] .. end[r].
struct AttentionRows {
  const float *q[kMaxAttentionRows];  // [head_dim]
  float *out[kMaxAttentionRows];      // [head_dim]
  int64_t begin[kMaxAttentionRows], end[kMaxAttentionRows];
  int num_rows;
  const void *keys, *values;  // [.., head_dim] of this head: float, the words of bf16, or int8
  const void *next_keys;      // that are read after these, or null: to have them under way
  const float *key_scales, *value_scales;  // [..], of int8
  int32_t kv_bits;
  int64_t head_dim;
  float scale;
};

// Floats of scratch for rows that see at most `num_keys` keys each.
inline int64_t attention_scratch(int num_rows, int64_t head_dim, int64_t num_keys) {
  const int64_t padded = (head_dim + kLanes - 1) / kLanes * kLanes;
  return num_rows * (2 * padded + num_keys + 2 * kLanes + kLanes * kLanes);
}

struct RowKernels {
  void (*attend)(const AttentionRows &rows, float *scratch);
  // As em_rms_norm, of one row.
  void (*rms_norm)(const float *x, const float *weight, int64_t cols, float eps, float *y);
  // Pairs (i, i + half) of a head become first * cos - second * sin, second * cos + first * sin.
  void (*rotate)(float *head, const float *cos, const float *sin, int64_t half);
  void (*clamp)(float *x, int64_t num, float limit);                // to -limit .. limit
  void (*add)(const float *x, int64_t num, float *y);               // y += x
  void (*softmax)(float *scores, int64_t num);                      // in place
  void (*to_bf16)(const float *x, int64_t num, uint16_t *dst);      // nearest, ties to even
  float (*to_int8)(const float *x, int64_t num, int8_t *dst);       // x ~ scale * dst; the scale
  float (*sigmoid)(float x);
};

const RowKernels *rows_scalar();
const RowKernels *rows_avx2();        // null where the compiler was not asked for it
const RowKernels *rows_avx512vnni();  // null where the compiler was not asked for it
const RowKernels *rows_neon();        // null on other processors
const RowKernels &row_kernels();      // the level in use

// The arguments of em_attention, with queries that may lie apart.
struct AttentionCall {
  const float *q;
  int64_t q_stride;  // floats from one token's queries to the next one's
  const void *keys, *values;
  const float *key_scales, *value_scales;
  int32_t kv_bits;
  int64_t num_tokens, num_heads, num_kv_heads, head_dim, capacity, position, window;
  float scale;
  float *out;
};
int64_t attention_scratch_floats(const AttentionCall &call, int num_threads);
void attention(em_pool *pool, const AttentionCall &call, float *scratch);

}  // namespace em
