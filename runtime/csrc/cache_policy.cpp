#include "cache_policy.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "platform.h"

namespace em {
namespace {

constexpr int64_t kBlockKeys = 64;
constexpr double kRescaleAt = 512.0;  // half-lives; a double overflows after 1,023

class Lru : public Policy {
 public:
  explicit Lru(const Cycle &cycle) : Policy(cycle) { value_.assign(value_.size(), -1.0); }
  void touch(const int32_t *keys, int64_t n, const double *counts, int64_t step,
             int64_t num_tokens) override {
    Policy::touch(keys, n, counts, step, num_tokens);
    for (int64_t i = 0; i < n; ++i) value_[keys[i]] = static_cast<double>(clock_);
  }
};

class Fifo : public Policy {
 public:
  using Policy::Policy;
  void insert(int32_t key) override {
    value_[key] = static_cast<double>(++num_arrivals_);
    blocks_.change(key);
  }

 private:
  int64_t num_arrivals_ = 0;
};

class Lfu : public Policy {
 public:
  using Policy::Policy;
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
      blocks_.change_all();
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
  for (int64_t i = 0; i < n; ++i) {
    last_use_[keys[i]] = clock_;
    blocks_.change(keys[i]);
  }
  if (guard_) guard_->touch(keys, n);
}

void Policy::fetch_ahead(int64_t first, int64_t end) const {
  em::fetch_ahead(value_.data(), first, end);
  em::fetch_ahead(last_use_.data(), first, end);
  blocks_.fetch_ahead(first, end);
  if (guard_) guard_->fetch_ahead(first, end);
}

void Policy::seed(const int32_t *keys, int64_t n, const double *counts, int64_t step) {
  std::unique_ptr<Guard> guard = std::move(guard_);  // nothing is demanded
  touch(keys, n, counts, step, 1);
  guard_ = std::move(guard);
}

Blocks::Blocks(const Cycle &cycle) : of_key_(static_cast<size_t>(cycle.num_keys())) {
  for (int64_t place = 0; place < cycle.num_places(); ++place) {
    of_place_.push_back(static_cast<int32_t>(place_.size()));
    const int32_t end = static_cast<int32_t>(cycle.first_key[place + 1]);
    for (int32_t key = static_cast<int32_t>(cycle.first_key[place]); key < end; ++key) {
      if ((key - cycle.first_key[place]) % kBlockKeys == 0) {
        first_.push_back(key);
        place_.push_back(static_cast<int32_t>(place));
      }
      of_key_[key] = static_cast<int32_t>(place_.size()) - 1;
    }
  }
  of_place_.push_back(static_cast<int32_t>(place_.size()));
  first_.push_back(static_cast<int32_t>(cycle.num_keys()));
  has_changed_.assign(place_.size(), 1);
  turned_.reserve(kMaxTurned);
}

void Blocks::change_place(int64_t place) {
  std::fill(has_changed_.begin() + of_place_[place], has_changed_.begin() + of_place_[place + 1],
            uint8_t{1});
}

void Blocks::fetch_ahead(int64_t first, int64_t end) const {
  em::fetch_ahead(of_key_.data(), first, end);
}

void Blocks::change_turned() {
  for (const int32_t key : turned_) change(key);
  turned_.clear();
}

void Blocks::change_all() { std::fill(has_changed_.begin(), has_changed_.end(), uint8_t{1}); }

std::unique_ptr<Policy> make_policy(const std::string &name, const Cycle &cycle, double half_life) {
  if (name == "forecast") return make_forecast(cycle);
  if (name == "lru") return std::make_unique<Lru>(cycle);
  if (name == "lfu") return std::make_unique<Lfu>(cycle);
  if (name == "fifo") return std::make_unique<Fifo>(cycle);
  if (name == "cycle") return std::make_unique<CycleAware>(cycle, half_life);
  return nullptr;
}

}  // namespace em
