#include "shift.h"

#include <algorithm>
#include <cmath>

namespace em {
namespace {

constexpr float kRate = 0.2f;     // of normalized least mean squares; .1 and .3 are alike
constexpr float kAlways = 0.25f;  // input of what counts for all choices
constexpr float kSmallest = 1e-30f;

}  // namespace

Shift::Shift(int64_t num_experts, int64_t num_scores)
    : num_scores_(num_scores),
      num_experts_(num_experts),
      rows_(static_cast<size_t>((num_experts + 1) * num_scores)),
      predicted_(static_cast<size_t>(num_scores)),
      error_(predicted_) {}

void Shift::apply(const int32_t *ids, const float *weights, int64_t num, float *scores) {
  float sum = 0.0f;
  for (int64_t k = 0; k < num; ++k) sum += weights[k];
  inputs_.assign(1, {num_experts_, kAlways});
  for (int64_t k = 0; k < num && sum > 0.0f; ++k) inputs_.push_back({ids[k], weights[k] / sum});
  for (int64_t e = 0; e < num_scores_; ++e) predicted_[e] = std::log(std::max(scores[e], kSmallest));
  for (const Input &each : inputs_) {
    const float *row = rows_.data() + each.row * num_scores_;
    for (int64_t e = 0; e < num_scores_; ++e) predicted_[e] += each.value * row[e];
  }
  const float largest = *std::max_element(predicted_.begin(), predicted_.end());
  for (int64_t e = 0; e < num_scores_; ++e) scores[e] = std::exp(predicted_[e] - largest);
}

void Shift::learn(const float *scores) {
  if (inputs_.empty()) return;
  float mean = 0.0f, square = 0.0f;
  for (int64_t e = 0; e < num_scores_; ++e) {
    error_[e] = std::log(std::max(scores[e], kSmallest)) - predicted_[e];
    mean += error_[e] / static_cast<float>(num_scores_);
  }
  for (const Input &each : inputs_) square += each.value * each.value;
  if (!std::isfinite(mean)) return inputs_.clear();
  for (const Input &each : inputs_) {
    const float step = kRate * each.value / square;
    float *row = rows_.data() + each.row * num_scores_;
    for (int64_t e = 0; e < num_scores_; ++e) row[e] += step * (error_[e] - mean);
  }
  inputs_.clear();
}

}  // namespace em
