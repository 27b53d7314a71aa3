// The inner loops of attention, one function per instruction set; all give the same bits.
#pragma once
#include <cstdint>

namespace em {

constexpr int kLanes = 16;
constexpr int kMaxAttentionRows = 8;

// Up to kMaxAttentionRows queries that read one key/value head; row r sees keys begin[r] .. end[r].
struct AttentionRows {
  const float *q[kMaxAttentionRows];  // [head_dim]
  float *out[kMaxAttentionRows];      // [head_dim]
  int64_t begin[kMaxAttentionRows], end[kMaxAttentionRows];
  int num_rows;
  const void *keys, *values;  // [.., head_dim] of this head: float, or the words of bf16
  bool is_bf16;
  int64_t head_dim;
  float scale;
};

// Floats of scratch for rows that see at most `num_keys` keys each.
inline int64_t attention_scratch(int num_rows, int64_t head_dim, int64_t num_keys) {
  const int64_t padded = (head_dim + kLanes - 1) / kLanes * kLanes;
  return num_rows * (2 * padded + num_keys + 2 * kLanes + kLanes * kLanes);
}

using AttentionKernel = void (*)(const AttentionRows &rows, float *scratch);

AttentionKernel attention_scalar();
AttentionKernel attention_avx2();        // null where the compiler was not asked for it
AttentionKernel attention_avx512vnni();  // null where the compiler was not asked for it
AttentionKernel attention_neon();        // null on other processors

}  // namespace em
