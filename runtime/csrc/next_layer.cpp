#include "next_layer.h"

#include <algorithm>

#include "predict.h"
#include "store.h"

namespace em {

void NextLayer::add(const em_matrix &matrix, std::vector<Span> *spans) const {
  if (matrix.rows == 0) return;
  const int64_t num_bytes = em_matrix_bytes(matrix.rows, matrix.cols, matrix.format);
  for (int part = 0; part < matrix.num_parts; ++part) {
    spans->push_back({reinterpret_cast<const char *>(matrix.packed[part]), num_bytes});
  }
}

void NextLayer::add_heads(int64_t layer, std::vector<Span> *spans) const {
  const em_model &model = decoder_.model();
  const int64_t key_bytes = model.head_dim * (kv_.kv_bits / 8);
  const int64_t window = decoder_.layer(layer).window;
  const int64_t first = window > 0 ? std::max<int64_t>(0, kv_.position + 1 - window) : 0;
  const char *const data = static_cast<const char *>(kv_.data);
  for (int64_t head = 0; head < 2 * model.num_kv_heads; ++head) {  // of keys, then of values
    const int64_t place = (layer * 2 * model.num_kv_heads + head) * kv_.capacity + first;
    spans->push_back({data + place * key_bytes, (kv_.position - first) * key_bytes});
  }
}

void NextLayer::add_records(int64_t layer, std::vector<Span> *spans) const {
  const em_block &block = decoder_.layer(layer);
  const int64_t num_bodies = decoder_.routing_of(layer).num_bodies();
  std::vector<float> scores(static_cast<size_t>(std::max(num_bodies, block.router.rows)));
  if (decoder_.look_ahead(layer, x_, scores.data()) != 0) return;
  std::vector<int32_t> ranked(
      static_cast<size_t>(std::min<int64_t>(decoder_.model().top_k, num_bodies)));
  rank_largest(scores.data(), num_bodies, static_cast<int64_t>(ranked.size()), ranked.data());
  for (const int32_t expert : ranked) {
    const int32_t key = static_cast<int32_t>(block.first_key) + expert;
    if (status_of(cache_.store(), key) != EM_READY) continue;
    spans->push_back({reinterpret_cast<const char *>(cache_.data(key)),
                      records_of(cache_.store())[key].num_bytes});
  }
}

void NextLayer::collect(std::vector<Span> *spans) {
  const int64_t next = number_ + 1;
  if (next == decoder_.model().num_layers) return add(decoder_.model().lm_head, spans);
  const em_block &block = decoder_.layer(next);
  for (const em_matrix &matrix : block.qkv) add(matrix, spans);
  add_heads(next, spans);
  add(block.output, spans);
  add(block.router, spans);
  for (const em_matrix &matrix : block.gate_up) add(matrix, spans);
  add(block.down, spans);
  if (block.router.rows != 0) add_records(next, spans);
}

}  // namespace em
