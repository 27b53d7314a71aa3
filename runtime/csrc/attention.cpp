#include "attention.h"

#include <cerrno>
#include <cstring>
#include <memory>
#include <new>

#include "edgemoe_core.h"
#include "thread_pool.h"

namespace em {
namespace {

const RowKernels *choose() {
  const RowKernels *level = nullptr;
  const bool is_512 = std::strcmp(em_isa(), "avx512vnni") == 0 || std::strcmp(em_isa(), "amx") == 0;
  if (is_512) level = rows_avx512vnni();
  const bool is_256 = std::strcmp(em_isa(), "avx2") == 0 || std::strcmp(em_isa(), "avxvnni") == 0;
  if (is_256) level = rows_avx2();
  if (std::strncmp(em_isa(), "neon", 4) == 0) level = rows_neon();
  return level ? level : rows_scalar();
}

int64_t rows_per_head(const AttentionCall &call) {
  return call.num_tokens * (call.num_heads / call.num_kv_heads);
}

int64_t most_keys(const AttentionCall &call) {
  const int64_t num_keys = call.position + call.num_tokens;
  return call.window > 0 && call.window < num_keys ? call.window : num_keys;
}

// Rows per item. More rows share one pass over the keys; fewer keep all threads busy and the scores
// in the second cache. No bit depends on it.
int rows_per_item(const AttentionCall &call, int num_threads) {
  constexpr int64_t kMaxScores = 128 * 1024;
  const int64_t num_rows = rows_per_head(call), num_keys = most_keys(call);
  int rows = kMaxAttentionRows;
  while (rows > 1 && (rows / 2 >= num_rows || rows * num_keys > kMaxScores ||
                      call.num_kv_heads * ((num_rows + rows - 1) / rows) < num_threads)) {
    rows /= 2;
  }
  return rows;
}

bool is_valid(const AttentionCall &call) {
  const bool has_scales = call.key_scales != nullptr && call.value_scales != nullptr;
  return call.q && call.keys && call.values && call.out &&
         (call.kv_bits == 16 || call.kv_bits == 32 || (call.kv_bits == 8 && has_scales)) &&
         call.num_tokens >= 0 && call.num_kv_heads >= 1 && call.num_heads >= 1 &&
         call.num_heads % call.num_kv_heads == 0 && call.head_dim >= 1 && call.position >= 0 &&
         call.window >= 0 && call.num_tokens <= call.capacity &&
         call.position <= call.capacity - call.num_tokens;
}

}  // namespace

const RowKernels &row_kernels() {
  static const RowKernels *const chosen = choose();
  return *chosen;
}

int64_t attention_scratch_floats(const AttentionCall &call, int num_threads) {
  const int rows = rows_per_item(call, num_threads);
  return num_threads * attention_scratch(rows, call.head_dim, most_keys(call));
}

void attention(em_pool *pool, const AttentionCall &call, float *scratch) {
  const int64_t group = call.num_heads / call.num_kv_heads;  // query heads that share a key head
  const int rows = rows_per_item(call, num_threads(pool));
  const int64_t num_rows = rows_per_head(call);
  const int64_t thread_scratch = attention_scratch(rows, call.head_dim, most_keys(call));
  const int64_t head_bytes = call.capacity * call.head_dim * (call.kv_bits / 8);
  const int64_t num_items = (num_rows + rows - 1) / rows * call.num_kv_heads;
  parallel_for(pool, num_items, [&](int64_t item, int thread) {
    // The longest rows first, so that no thread is left with one at the end.
    item = num_items - 1 - item;
    const int64_t first = item / call.num_kv_heads * rows;
    const int64_t kv_head = item % call.num_kv_heads;
    AttentionRows block;
    block.num_rows = static_cast<int>(num_rows - first < rows ? num_rows - first : rows);
    for (int r = 0; r < block.num_rows; ++r) {
      const int64_t t = (first + r) / group;
      const int64_t head = kv_head * group + (first + r) % group;
      block.q[r] = call.q + t * call.q_stride + head * call.head_dim;
      block.out[r] = call.out + (t * call.num_heads + head) * call.head_dim;
      block.end[r] = call.position + t + 1;
      const bool is_cut = call.window > 0 && block.end[r] > call.window;
      block.begin[r] = is_cut ? block.end[r] - call.window : 0;
    }
    block.keys = static_cast<const char *>(call.keys) + kv_head * head_bytes;
    block.values = static_cast<const char *>(call.values) + kv_head * head_bytes;
    block.next_keys = nullptr;
    if (num_rows == 1 && kv_head > 0) {
      const char *next = static_cast<const char *>(block.keys) - head_bytes;
      block.next_keys = next + block.begin[0] * (head_bytes / call.capacity);
    }
    block.key_scales = call.key_scales ? call.key_scales + kv_head * call.capacity : nullptr;
    block.value_scales = call.value_scales ? call.value_scales + kv_head * call.capacity : nullptr;
    block.kv_bits = call.kv_bits;
    block.head_dim = call.head_dim;
    block.scale = call.scale;
    row_kernels().attend(block, scratch + thread * thread_scratch);
  });
}

}  // namespace em

int32_t em_attention(em_pool *pool, const float *q, const void *keys, const void *values,
                     const float *key_scales, const float *value_scales, int32_t kv_bits,
                     int64_t num_tokens, int64_t num_heads, int64_t num_kv_heads, int64_t head_dim,
                     int64_t capacity, int64_t position, int64_t window, float scale, float *out) {
  const em::AttentionCall call = {q,          num_heads * head_dim, keys,      values,
                                  key_scales, value_scales,         kv_bits,   num_tokens,
                                  num_heads,  num_kv_heads,         head_dim,  capacity,
                                  position,   window,               scale,     out};
  if (!em::is_valid(call)) return EM_ERR_ARG;
  if (num_tokens == 0) return 0;
  const int64_t num_floats = em::attention_scratch_floats(call, em::num_threads(pool));
  const std::unique_ptr<float[]> scratch(new (std::nothrow) float[num_floats]);
  if (!scratch) return -ENOMEM;
  em::attention(pool, call, scratch.get());
  return 0;
}

void em_rms_norm(const float *x, const float *weight, int64_t num_tokens, int64_t cols, float eps,
                 float *y) {
  for (int64_t t = 0; t < num_tokens; ++t) {
    em::row_kernels().rms_norm(x + t * cols, weight, cols, eps, y + t * cols);
  }
}
