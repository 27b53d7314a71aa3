// Hash-routed layers (2106.04426): a table says which rows of the router a token id goes through, so
// that their demand is certain before the first layer of a token runs.
#include <algorithm>

#include "cache.h"
#include "decoder.h"

namespace em {

bool Decoder::has_good_table(const em_block &layer) const {
  const int32_t *row = layer.experts_of_token;
  if (row == nullptr) return true;
  for (int64_t id = 0; id < model_.embedding.rows; ++id, row += model_.top_k) {
    for (int64_t k = 0; k < model_.top_k; ++k) {
      if (row[k] < 0 || row[k] >= layer.router.rows || (k > 0 && row[k] <= row[k - 1])) return false;
    }
  }
  return true;
}

bool Decoder::has_good_ids(int64_t layer, int64_t num_tokens, const int32_t *token_ids) const {
  if (layers_[layer].experts_of_token == nullptr) return true;
  return token_ids != nullptr && std::all_of(token_ids, token_ids + num_tokens, [&](int32_t id) {
           return id >= 0 && id < model_.embedding.rows;
         });
}

bool Decoder::computes_all() const {
  const bool is_some = rule_.active_experts > 0 && rule_.active_experts < model_.top_k;
  return !is_some && !(rule_.top_p > 0 && rule_.top_p < 1) && !(rule_.cold_share > 0) &&
         rule_.stand_ins == 0;
}

// Recorded routes are as certain as the table in whose place they stand.
void Decoder::begin_foresight(Cache &cache, const em_decode_args &args) {
  certain_.clear();
  num_certain_ = 0;
  const int64_t num = num_routes(args);
  int64_t place = 0;
  for (size_t number = 0; number < layers_.size(); ++number) {
    const em_block &layer = layers_[number];
    if (layer.router.rows == 0) continue;
    const int64_t first = num * place++;
    if (!is_foreseen(static_cast<int64_t>(number))) continue;
    const int32_t *row = args.forced_ids != nullptr
                             ? args.forced_ids + first
                             : layer.experts_of_token + args.token_id * model_.top_k;
    for (int64_t k = 0; k < num; ++k) {
      if (row[k] < 0) break;
      const int32_t body = args.forced_ids != nullptr ? row[k] : routing_[number].body_of(row[k]);
      if (body >= 0) certain_.push_back(static_cast<int32_t>(layer.first_key) + body);
    }
  }
  if (!certain_.empty()) foresee(cache);
}

// What does not fit beside the layer that runs is tried again behind it.
void Decoder::foresee(Cache &cache) {
  const Cache::Guessing guessing(cache);
  const em_cache_stats now = cache.stats();
  num_certain_ += static_cast<std::size_t>(
      cache.foresee(static_cast<int64_t>(certain_.size() - num_certain_),
                    certain_.data() + num_certain_, now.capacity_bytes - now.pinned_bytes));
}

}  // namespace em
