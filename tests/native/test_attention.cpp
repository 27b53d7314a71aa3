// Attention against float64: shapes, windows, both kinds of cache; one row alone as in a batch.
#include <cmath>
#include <cstring>

#include "check.h"
#include "edgemoe_core.h"

namespace {

using check::Random;

struct Shape {
  int64_t num_tokens, num_heads, num_kv_heads, head_dim, capacity, position, window;
};

struct Cache {
  int32_t kv_bits;
  std::vector<float> keys, values;              // what the cache stands for
  std::vector<uint8_t> key_bytes, value_bytes;  // bf16 or int8
  std::vector<float> key_scales, value_scales;  // of int8
  const void *k() const { return kv_bits == 32 ? static_cast<const void *>(keys.data()) : key_bytes.data(); }
  const void *v() const { return kv_bits == 32 ? static_cast<const void *>(values.data()) : value_bytes.data(); }
};

void to_int8(std::vector<float> *values, int64_t head_dim, std::vector<uint8_t> *bytes,
             std::vector<float> *scales) {
  for (size_t i = 0; i < values->size(); ++i) {
    if (i % static_cast<size_t>(head_dim) == 0) scales->push_back(0.01f + 0.001f * (i % 7));
    const float whole = std::round((*values)[i] * 50);
    bytes->push_back(static_cast<uint8_t>(static_cast<int8_t>(whole)));
    (*values)[i] = whole * scales->back();
  }
}

void to_words(std::vector<float> *values, std::vector<uint8_t> *bytes) {
  for (float &value : *values) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    bytes->push_back(static_cast<uint8_t>(bits >> 16));
    bytes->push_back(static_cast<uint8_t>(bits >> 24));
    bits &= 0xffff0000;
    std::memcpy(&value, &bits, 4);
  }
}

Cache make_cache(Random &random, const Shape &s, int32_t kv_bits) {
  const int64_t num = s.num_kv_heads * s.capacity * s.head_dim;
  Cache cache = {kv_bits, random.floats(num, 2.0f), random.floats(num), {}, {}, {}, {}};
  if (kv_bits == 16) {
    to_words(&cache.keys, &cache.key_bytes);
    to_words(&cache.values, &cache.value_bytes);
  } else if (kv_bits == 8) {
    to_int8(&cache.keys, s.head_dim, &cache.key_bytes, &cache.key_scales);
    to_int8(&cache.values, s.head_dim, &cache.value_bytes, &cache.value_scales);
  }
  return cache;
}

std::vector<double> oracle(const Shape &s, const std::vector<float> &q, const Cache &cache,
                           double scale) {
  std::vector<double> out(q.size());
  for (int64_t t = 0; t < s.num_tokens; ++t) {
    for (int64_t h = 0; h < s.num_heads; ++h) {
      const int64_t row = (t * s.num_heads + h) * s.head_dim;
      const int64_t head = h / (s.num_heads / s.num_kv_heads) * s.capacity * s.head_dim;
      const int64_t end = s.position + t + 1;
      const int64_t begin = s.window > 0 && end > s.window ? end - s.window : 0;
      std::vector<double> weights;
      double sum = 0, largest = -INFINITY;
      for (int64_t j = begin; j < end; ++j) {
        double score = 0;
        for (int64_t c = 0; c < s.head_dim; ++c) {
          score += static_cast<double>(q[row + c]) * cache.keys[head + j * s.head_dim + c];
        }
        weights.push_back(score * scale);
        largest = std::fmax(largest, weights.back());
      }
      for (double &weight : weights) sum += weight = std::exp(weight - largest);
      for (int64_t j = begin; j < end; ++j) {
        for (int64_t c = 0; c < s.head_dim; ++c) {
          out[row + c] += weights[j - begin] / sum * cache.values[head + j * s.head_dim + c];
        }
      }
    }
  }
  return out;
}

std::vector<float> attend(em_pool *pool, const Shape &s, const std::vector<float> &q,
                          const Cache &cache, float scale) {
  std::vector<float> out(q.size(), NAN);
  CHECK_EQUAL(em_attention(pool, q.data(), cache.k(), cache.v(), cache.key_scales.data(),
                           cache.value_scales.data(), cache.kv_bits, s.num_tokens, s.num_heads,
                           s.num_kv_heads, s.head_dim, s.capacity, s.position,
                           s.window, scale, out.data()),
              0);
  return out;
}

}  // namespace

TEST(attention_agrees_with_float64) {
  Random random(31);
  em_pool *pool = em_pool_create(2);
  const Shape shapes[] = {
      {1, 1, 1, 1, 1, 0, 0},    {1, 4, 2, 16, 40, 33, 0},  {5, 4, 1, 20, 64, 0, 0},
      {7, 8, 2, 64, 90, 50, 0}, {9, 6, 3, 33, 70, 61, 16}, {1, 16, 2, 128, 300, 290, 0},
      {3, 2, 2, 64, 64, 40, 1},
  };
  for (const Shape &s : shapes) {
    for (const int32_t kv_bits : {32, 16, 8}) {
      const Cache cache = make_cache(random, s, kv_bits);
      const std::vector<float> q = random.floats(s.num_tokens * s.num_heads * s.head_dim);
      const float scale = 1.0f / std::sqrt(static_cast<float>(s.head_dim));
      const std::vector<float> out = attend(nullptr, s, q, cache, scale);
      CHECK(check::relative_error(out, oracle(s, q, cache, scale)) < 2e-6);
      check::digest(out);
      CHECK(check::same_bits(attend(pool, s, q, cache, scale), out));
      for (int64_t t = 0; t < s.num_tokens; ++t) {  // one row alone
        Shape one = s;
        one.num_tokens = 1;
        one.position += t;
        const int64_t size = s.num_heads * s.head_dim;
        const std::vector<float> row(q.begin() + t * size, q.begin() + (t + 1) * size);
        CHECK(check::same_bits(attend(pool, one, row, cache, scale),
                               {out.begin() + t * size, out.begin() + (t + 1) * size}));
      }
    }
  }
  em_pool_destroy(pool);
}

TEST(impossible_attention_is_refused) {
  float x[64] = {};
  const auto run = [&](int32_t bits, Shape s) {
    return em_attention(nullptr, x, x, x, nullptr, nullptr, bits, s.num_tokens, s.num_heads,
                        s.num_kv_heads, s.head_dim, s.capacity, s.position, s.window, 1.0f, x);
  };
  CHECK_EQUAL(run(32, {0, 1, 1, 8, 4, 0, 0}), 0);
  CHECK_EQUAL(run(8, {1, 1, 1, 8, 4, 0, 0}), EM_ERR_ARG);  // without scales
  CHECK_EQUAL(run(17, {1, 1, 1, 8, 4, 0, 0}), EM_ERR_ARG);
  CHECK_EQUAL(run(32, {-1, 1, 1, 8, 4, 0, 0}), EM_ERR_ARG);
  CHECK_EQUAL(run(32, {1, 3, 2, 8, 4, 0, 0}), EM_ERR_ARG);
  CHECK_EQUAL(run(32, {1, 1, 0, 8, 4, 0, 0}), EM_ERR_ARG);
  CHECK_EQUAL(run(32, {1, 1, 1, 0, 4, 0, 0}), EM_ERR_ARG);
  CHECK_EQUAL(run(32, {1, 1, 1, 8, 4, 4, 0}), EM_ERR_ARG);
  CHECK_EQUAL(run(32, {1, 1, 1, 8, 4, INT64_MAX, 0}), EM_ERR_ARG);
  CHECK_EQUAL(run(32, {5, 1, 1, 8, 4, 0, 0}), EM_ERR_ARG);
  CHECK_EQUAL(run(32, {1, 1, 1, 8, 4, 0, -1}), EM_ERR_ARG);
}
