#include <cmath>
#include <cstring>
#include <vector>

#include "edgemoe_core.h"
#include "thread_pool.h"

int32_t em_attention(em_pool *pool, const float *q, const void *keys, const void *values,
                     int32_t kv_bits, int64_t num_tokens, int64_t num_heads, int64_t num_kv_heads,
                     int64_t head_dim, int64_t capacity, int64_t position, int64_t window,
                     float scale, float *out) {
  if (num_kv_heads < 1 || num_heads % num_kv_heads || (kv_bits != 16 && kv_bits != 32) ||
      position + num_tokens > capacity) {
    return EM_ERR_ARG;
  }
  const auto load = [&](const void *base, int64_t i) {
    if (kv_bits == 32) return static_cast<const float *>(base)[i];
    const uint32_t bits = uint32_t{static_cast<const uint16_t *>(base)[i]} << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
  };
  em::parallel_for(pool, num_tokens * num_heads, [&](int64_t item, int) {
    const int64_t t = item / num_heads, h = item % num_heads;
    const int64_t base = h / (num_heads / num_kv_heads) * capacity * head_dim;
    const int64_t end = position + t + 1;
    const int64_t begin = window > 0 && end > window ? end - window : 0;
    std::vector<float> scores(end - begin);
    const float *query = q + item * head_dim;
    float *y = out + item * head_dim;
    float highest = -INFINITY, sum = 0;
    for (int64_t j = begin; j < end; ++j) {
      float dot = 0;
      for (int64_t k = 0; k < head_dim; ++k) dot += query[k] * load(keys, base + j * head_dim + k);
      scores[j - begin] = dot * scale;
      highest = std::fmax(highest, dot * scale);
    }
    for (float &score : scores) sum += score = std::exp(score - highest);
    for (int64_t k = 0; k < head_dim; ++k) y[k] = 0;
    for (int64_t j = begin; j < end; ++j) {
      for (int64_t k = 0; k < head_dim; ++k) {
        y[k] += scores[j - begin] / sum * load(values, base + j * head_dim + k);
      }
    }
  });
  return 0;
}
