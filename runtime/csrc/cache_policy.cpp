#include "cache_policy.h"

#include <cmath>

namespace em {
namespace {

constexpr double kRescaleAt = 512.0;  // half-lives; a double overflows after 1,023

class Lru : public Policy {
 public:
  using Policy::Policy;
  void score(int64_t, int64_t, int32_t first, int32_t end, double *scores) const override {
    for (int32_t key = first; key < end; ++key) {
      scores[key - first] = static_cast<double>(last_use_[key]);
    }
  }
};

class Fifo : public Valued {
 public:
  using Valued::Valued;
  void insert(int32_t key) override { value_[key] = static_cast<double>(++num_arrivals_); }

 private:
  int64_t num_arrivals_ = 0;
};

class Lfu : public Valued {
 public:
  using Valued::Valued;
  void touch(const int32_t *keys, int64_t n, const double *counts, int64_t step,
             int64_t num_tokens) override {
    Policy::touch(keys, n, counts, step, num_tokens);
    for (int64_t i = 0; i < n; ++i) {
      value_[keys[i]] += counts == nullptr ? 1.0 : counts[i];
    }
  }
};

// Decayed frequency / distance to the layer (the reasons are in runtime/policy.py). Frequencies grow
// instead of decaying: a use at step s weighs 2 ^ (s / half_life).
class CycleAware : public ByDistance {
 public:
  CycleAware(const Cycle &cycle, double half_life) : ByDistance(cycle), half_life_(half_life) {}

  void touch(const int32_t *keys, int64_t n, const double *counts, int64_t step,
             int64_t num_tokens) override {
    Policy::touch(keys, n, counts, step, num_tokens);
    double exponent = static_cast<double>(step - base_step_) / half_life_;
    if (exponent > kRescaleAt) {
      const double factor = std::pow(base_, -exponent);
      for (double &value : value_) value *= factor;
      base_step_ = step;
      exponent = 0.0;
    }
    double weight = std::pow(base_, exponent);
    if (counts == nullptr) {
      for (int64_t i = 0; i < n; ++i) value_[keys[i]] += weight;
      return;
    }
    // As if the uses were spread evenly over the tokens.
    const double decay = std::pow(base_, -1.0 / half_life_);
    const double num = static_cast<double>(num_tokens);
    weight *= (1.0 - std::pow(decay, num)) / (1.0 - decay) / num;
    for (int64_t i = 0; i < n; ++i) value_[keys[i]] += weight * counts[i];
  }

 private:
  const double base_ = 2.0, half_life_;
  int64_t base_step_ = 0;
};

}  // namespace

void Policy::touch(const int32_t *keys, int64_t n, const double *, int64_t, int64_t) {
  ++clock_;
  for (int64_t i = 0; i < n; ++i) last_use_[keys[i]] = clock_;
}

void Valued::score(int64_t, int64_t, int32_t first, int32_t end, double *scores) const {
  for (int32_t key = first; key < end; ++key) scores[key - first] = value_[key];
}

void ByDistance::score(int64_t running, int64_t place, int32_t first, int32_t end,
                       double *scores) const {
  const int64_t ahead = place - running;
  const int64_t distance = ahead > 0 ? ahead : ahead + cycle_.num_places();
  const double nearness = 1.0 / static_cast<double>(distance);
  for (int32_t key = first; key < end; ++key) scores[key - first] = value_[key] * nearness;
}

std::unique_ptr<Policy> make_policy(const std::string &name, const Cycle &cycle, double half_life) {
  if (name == "forecast") return make_forecast(cycle);
  if (name == "lru") return std::make_unique<Lru>(cycle);
  if (name == "lfu") return std::make_unique<Lfu>(cycle);
  if (name == "fifo") return std::make_unique<Fifo>(cycle);
  if (name == "cycle") return std::make_unique<CycleAware>(cycle, half_life);
  return nullptr;
}

}  // namespace em
