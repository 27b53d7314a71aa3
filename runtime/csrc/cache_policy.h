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

#include "cache_guard.h"

namespace em {

// Keys first_key[place] .. first_key[place + 1] - 1 belong to a place in the cycle of MoE layers.
struct Cycle {
  std::vector<int64_t> first_key;  // [num_places + 1]
  int64_t num_places() const { return static_cast<int64_t>(first_key.size()) - 1; }
  int64_t num_keys() const { return first_key.back(); }
};

// Keys in blocks of one place each: which of these hold a value that has changed since `clear`, and
// which keys somebody has let go of or has begun to hold since `clear_turned`.
class Blocks {
 public:
  explicit Blocks(const Cycle &cycle);

  int64_t num() const { return static_cast<int64_t>(place_.size()); }
  int32_t first(int64_t block) const { return first_[block]; }
  int32_t end(int64_t block) const { return first_[block + 1]; }
  int64_t place(int64_t block) const { return place_[block]; }
  bool has_changed(int64_t block) const { return has_changed_[block] != 0; }
  void clear(int64_t block) { has_changed_[block] = 0; }
  void change(int32_t key) { has_changed_[of_key_[key]] = 1; }
  void change_place(int64_t place);
  void change_all();
  int64_t of(int32_t key) const { return of_key_[key]; }
  void turn(int32_t key) {
    if (turned_.size() == kMaxTurned) change_turned();
    turned_.push_back(key);
  }
  void fetch_ahead(int64_t first, int64_t end) const;
  const std::vector<int32_t> &turned() const { return turned_; }  // some of them more than once
  void clear_turned() { turned_.clear(); }

 private:
  static constexpr size_t kMaxTurned = 512;  // where nobody asks, blocks are looked through again
  void change_turned();

  std::vector<int32_t> turned_;
  std::vector<int32_t> first_;  // [num + 1]
  std::vector<int32_t> place_;
  std::vector<int32_t> of_key_, of_place_;  // of_place_ [num_places + 1]: its first block
  std::vector<uint8_t> has_changed_;
};

// The score of a key is its value times the nearness of its place, both doubles.
class Policy {
 public:
  explicit Policy(const Cycle &cycle)
      : cycle_(cycle),
        blocks_(cycle),
        value_(static_cast<size_t>(cycle.num_keys()), 0.0),
        last_use_(static_cast<size_t>(cycle.num_keys()), -1) {}
  virtual ~Policy() = default;

  // n keys, each once, are demanded by the num_tokens tokens that end with number `step`; counts
  // [n]: how many of those tokens want each, null: one each.
  virtual void touch(const int32_t *keys, int64_t n, const double *counts, int64_t step,
                     int64_t num_tokens);
  // What touches at `step` will sum up: experts [num_tokens, top_k] of a place, -1: none.
  virtual void route(int64_t, const int32_t *, int64_t, int64_t, int64_t) {}
  // n keys will be touched together, as soon as there is room for those absent.
  void expect(const int32_t *keys, int64_t n) {
    if (guard_) guard_->expect(keys, n);
  }
  void fetch_ahead(int64_t first, int64_t end) const;  // keys that are demanded soon
  // Each key counts as if it had been wanted so often just now.
  void seed(const int32_t *keys, int64_t n, const double *counts, int64_t step);
  virtual void insert(int32_t key) {  // the key was given memory
    if (guard_) guard_->insert(key);
  }
  virtual void remove(int32_t key) {  // it lost it; what is known of its demand stays known
    if (guard_) guard_->remove(key);
  }
  // Bytes of the record of each key; without a call all are equal.
  void set_sizes(const std::vector<int64_t> &sizes) {
    if (guard_) guard_ = std::make_unique<Guard>(sizes, blocks_);
  }
  virtual void set_share(double share) {  // the capacity has become this share of all records
    if (guard_) guard_->set_share(share);
  }
  const Guard *guard() const { return guard_.get(); }  // null: none
  // Of a place `ahead` of the running one, 1 .. num_places.
  virtual double nearness(int64_t) const { return 1.0; }
  virtual bool forecasts() const { return false; }  // whether values are chances
  const double *values() const { return value_.data(); }  // by key
  int64_t last_use(int32_t key) const { return last_use_[key]; }
  Blocks &blocks() { return blocks_; }  // that a change of value has marked

 protected:
  const Cycle &cycle_;
  Blocks blocks_;
  std::vector<double> value_;      // by key
  std::vector<int64_t> last_use_;  // by key: number of the demand, -1: none
  int64_t clock_ = 0;
  std::unique_ptr<Guard> guard_;
};

// Scores are values / distance to the layer.
class ByDistance : public Policy {
 public:
  using Policy::Policy;
  double nearness(int64_t ahead) const override { return 1.0 / static_cast<double>(ahead); }
};

std::unique_ptr<Policy> make_forecast(const Cycle &cycle);

// "forecast", "cycle", "lru", "lfu", "fifo"; null for another name. half_life: in tokens; of "cycle".
std::unique_ptr<Policy> make_policy(const std::string &name, const Cycle &cycle, double half_life);

}  // namespace em
