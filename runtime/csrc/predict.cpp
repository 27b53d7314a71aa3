#include "predict.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <iterator>
#include <vector>

namespace em {

uint64_t path_key(const int32_t *before, int64_t num_before, const int32_t *active,
                  int64_t num_active) {
  uint64_t key = 0;
  const auto mix = [&key](int32_t id) {
    key = (key ^ (static_cast<uint64_t>(id) + 1)) * 0x9E3779B97F4A7C15u;
    key ^= key >> 32;
  };
  for (int64_t i = 0; i < num_before; ++i) mix(before[i]);
  for (int64_t i = 0; i < num_active; ++i) mix(active[i]);
  return key;
}

// scores [num] lean on what followed the state, the more the oftener it was seen.
static void refine(const em_state_table &table, uint64_t key, float back_off, int64_t num,
                   float *scores) {
  const uint64_t *end = table.key + table.num_states;
  const uint64_t *found = std::lower_bound(table.key, end, key);
  if (found == end || *found != key) return;
  const int64_t row = found - table.key;
  for (int64_t e = 0; e < num; ++e) scores[e] *= back_off;
  for (int64_t j = table.begin[row]; j < table.begin[row + 1]; ++j) {
    scores[table.expert[j]] += table.count[j];
  }
  const float total = table.total[row] + back_off;
  for (int64_t e = 0; e < num; ++e) scores[e] /= total;
}

void profile_scores(const em_place_tables &tables, float back_off, int64_t num_experts,
                    const int32_t *before, int64_t num_before, const int32_t *active,
                    int64_t num_active, int64_t token_id, float *scores) {
  std::vector<float> by_token;
  if (token_id >= 0 || num_active == 0) {
    by_token.assign(tables.popularity, tables.popularity + num_experts);
    if (token_id >= 0) {
      refine(tables.tokens, static_cast<uint64_t>(token_id), back_off, num_experts, by_token.data());
    }
  }
  if (num_active == 0) {
    std::copy(by_token.begin(), by_token.end(), scores);
    return;
  }
  std::fill_n(scores, num_experts, 0.0f);
  for (int64_t a = 0; a < num_active; ++a) {
    const float *row = tables.pairwise + active[a] * num_experts;
    for (int64_t e = 0; e < num_experts; ++e) scores[e] += row[e];
  }
  const float num = static_cast<float>(num_active);
  for (int64_t e = 0; e < num_experts; ++e) scores[e] /= num;
  if (num_before > 0) {
    const uint64_t key = path_key(before, num_before, active, num_active);
    refine(tables.paths, key, back_off, num_experts, scores);
  }
  for (size_t e = 0; e < by_token.size(); ++e) scores[e] = (scores[e] + by_token[e]) / 2.0f;
}

void rank_largest(const float *scores, int64_t num, int64_t n, int32_t *positions) {
  // Inserted one by one: few are as large as what is in the list by then. As integers, which gives
  // NaN a place.
  const auto bits = [scores](int64_t i) {
    int32_t word;
    std::memcpy(&word, scores + i, 4);
    return word & INT32_MAX;
  };
  int64_t count = 0;
  for (int64_t i = 0; i < num; ++i) {
    const int32_t score = bits(i);
    if (count == n && score <= bits(positions[n - 1])) continue;
    if (count < n) ++count;
    int64_t at = count - 1;
    for (; at > 0 && bits(positions[at - 1]) < score; --at) positions[at] = positions[at - 1];
    positions[at] = static_cast<int32_t>(i);
  }
}

int32_t margin_of(float score, float last_chosen, float first_left) {
  // e to the power of -1, -.5, -.25, -.1, 0, .1, .25, .5, .75, 1, 1.5, 2.
  static constexpr float kShares[] = {0.37f, 0.61f, 0.78f, 0.90f, 1.0f, 1.11f,
                                      1.28f, 1.65f, 2.12f, 2.72f, 4.48f, 7.39f};
  static_assert(std::size(kShares) == kNumMargins - 1);
  const float line = std::sqrt(last_chosen) * std::sqrt(first_left);
  const float *end = std::end(kShares);
  return static_cast<int32_t>(
      std::partition_point(kShares, end, [&](float share) { return share * line <= score; }) - kShares);
}

}  // namespace em

void em_profile_scores(const em_place_tables *tables, float back_off, int64_t num_experts,
                       const int32_t *before, int64_t num_before, const int32_t *active,
                       int64_t num_active, int64_t token_id, float *scores) {
  em::profile_scores(*tables, back_off, num_experts, before, num_before, active, num_active,
                     token_id, scores);
}
