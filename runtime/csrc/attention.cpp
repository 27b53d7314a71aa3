#include <cerrno>
#include <cstring>
#include <memory>
#include <new>

#include "attention.h"
#include "edgemoe_core.h"
#include "thread_pool.h"

namespace {

em::AttentionKernel choose() {
  em::AttentionKernel kernel = nullptr;
  const bool is_512 = std::strcmp(em_isa(), "avx512vnni") == 0 || std::strcmp(em_isa(), "amx") == 0;
  if (is_512) kernel = em::attention_avx512vnni();
  const bool is_256 = std::strcmp(em_isa(), "avx2") == 0 || std::strcmp(em_isa(), "avxvnni") == 0;
  if (is_256) kernel = em::attention_avx2();
  if (std::strncmp(em_isa(), "neon", 4) == 0) kernel = em::attention_neon();
  return kernel ? kernel : em::attention_scalar();
}

// Rows per item. More rows share one pass over the keys; fewer keep all threads busy and the scores
// in the second cache. No bit depends on it.
int rows_per_item(int64_t rows_per_head, int64_t num_kv_heads, int64_t num_keys, int num_threads) {
  constexpr int64_t kMaxScores = 128 * 1024;
  int rows = em::kMaxAttentionRows;
  while (rows > 1 && (rows / 2 >= rows_per_head || rows * num_keys > kMaxScores ||
                      num_kv_heads * ((rows_per_head + rows - 1) / rows) < num_threads)) {
    rows /= 2;
  }
  return rows;
}

}  // namespace

int32_t em_attention(em_pool *pool, const float *q, const void *keys, const void *values,
                     int32_t kv_bits, int64_t num_tokens, int64_t num_heads, int64_t num_kv_heads,
                     int64_t head_dim, int64_t capacity, int64_t position, int64_t window,
                     float scale, float *out) {
  static const em::AttentionKernel kernel = choose();
  if (!q || !keys || !values || !out || (kv_bits != 16 && kv_bits != 32) || num_tokens < 0 ||
      num_kv_heads < 1 || num_heads < 1 || num_heads % num_kv_heads || head_dim < 1 ||
      position < 0 || window < 0 || num_tokens > capacity || position > capacity - num_tokens) {
    return EM_ERR_ARG;
  }
  if (num_tokens == 0) return 0;
  const int64_t group = num_heads / num_kv_heads;  // query heads that share a key/value head
  const int64_t rows_per_head = num_tokens * group;
  const int num_threads = em::num_threads(pool);
  int64_t num_keys = position + num_tokens;
  if (window > 0 && window < num_keys) num_keys = window;
  const int rows = rows_per_item(rows_per_head, num_kv_heads, num_keys, num_threads);
  const int64_t items_per_head = (rows_per_head + rows - 1) / rows;
  const int64_t thread_scratch = em::attention_scratch(rows, head_dim, num_keys);
  const std::unique_ptr<float[]> scratch(new (std::nothrow) float[num_threads * thread_scratch]);
  if (!scratch) return -ENOMEM;
  const int64_t head_bytes = capacity * head_dim * (kv_bits / 8);
  const int64_t num_items = items_per_head * num_kv_heads;
  em::parallel_for(pool, num_items, [&](int64_t item, int thread) {
    // The longest rows first, so that no thread is left with one at the end.
    item = num_items - 1 - item;
    const int64_t first = item / num_kv_heads * rows;
    const int64_t kv_head = item % num_kv_heads;
    em::AttentionRows block;
    block.num_rows = static_cast<int>(rows_per_head - first < rows ? rows_per_head - first : rows);
    for (int r = 0; r < block.num_rows; ++r) {
      const int64_t t = (first + r) / group;
      const int64_t offset = (t * num_heads + kv_head * group + (first + r) % group) * head_dim;
      block.q[r] = q + offset;
      block.out[r] = out + offset;
      block.end[r] = position + t + 1;
      block.begin[r] = window > 0 && block.end[r] > window ? block.end[r] - window : 0;
    }
    block.keys = static_cast<const char *>(keys) + kv_head * head_bytes;
    block.values = static_cast<const char *>(values) + kv_head * head_bytes;
    block.is_bf16 = kv_bits == 16;
    block.head_dim = head_dim;
    block.scale = scale;
    kernel(block, scratch.get() + thread * thread_scratch);
  });
  return 0;
}
