// Which resident record goes when room is needed. Twin of runtime/policy.py.
//
// Pure bookkeeping: a policy sees demand (touch), arrivals (insert) and departures (remove), and
// gives scores; the cache evicts the key with the lowest score among those that nothing holds, of
// equal ones the one not used for longest, then the lowest key.
#pragma once
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace em {

// Keys first_key[place] .. first_key[place + 1] - 1 belong to a place in the cycle of MoE layers.
struct Cycle {
  std::vector<int64_t> first_key;  // [num_places + 1]
  int64_t num_places() const { return static_cast<int64_t>(first_key.size()) - 1; }
  int64_t num_keys() const { return first_key.back(); }
};

class Policy {
 public:
  explicit Policy(const Cycle &cycle)
      : cycle_(cycle), last_use_(static_cast<size_t>(cycle.num_keys()), -1) {}
  virtual ~Policy() = default;

  // n keys, each once, are demanded by the num_tokens tokens that end with number `step`; counts
  // [n]: how many of those tokens want each, null: one each.
  virtual void touch(const int32_t *keys, int64_t n, const double *counts, int64_t step,
                     int64_t num_tokens);
  virtual void insert(int32_t) {}  // the key was given memory
  virtual void remove(int32_t) {}  // it lost it; what is known of its demand stays known
  virtual void set_share(double) {}  // the capacity has become this share of all records
  // Scores of the keys first .. end - 1, all of `place`, while place `running` runs.
  virtual void score(int64_t running, int64_t place, int32_t first, int32_t end,
                     double *scores) const = 0;
  int64_t last_use(int32_t key) const { return last_use_[key]; }

 protected:
  const Cycle &cycle_;
  std::vector<int64_t> last_use_;  // by key: number of the demand, -1: none
  int64_t clock_ = 0;
};

// Scores are values by key that demand or arrival changes.
class Valued : public Policy {
 public:
  explicit Valued(const Cycle &cycle)
      : Policy(cycle), value_(static_cast<size_t>(cycle.num_keys()), 0.0) {}
  void score(int64_t running, int64_t place, int32_t first, int32_t end,
             double *scores) const override;

 protected:
  std::vector<double> value_;
};

// Scores are values / distance to the layer.
class ByDistance : public Valued {
 public:
  using Valued::Valued;
  void score(int64_t running, int64_t place, int32_t first, int32_t end,
             double *scores) const override;
};

std::unique_ptr<Policy> make_forecast(const Cycle &cycle);

// "forecast", "cycle", "lru", "lfu", "fifo"; null for another name. half_life: in tokens; of "cycle".
std::unique_ptr<Policy> make_policy(const std::string &name, const Cycle &cycle, double half_life);

}  // namespace em
