#include "cache_victims.h"

#include <algorithm>
#include <limits>

namespace em {
namespace {

constexpr double kNever = std::numeric_limits<double>::infinity();

}  // namespace

Victims::Victims(const Cycle &cycle, Policy &policy, const std::vector<uint8_t> &blocked)
    : policy_(policy),
      blocks_(policy.blocks()),
      blocked_(blocked),
      lowest_(static_cast<size_t>(blocks_.num()), kNever),
      unguarded_(lowest_),
      num_places_(cycle.num_places()) {
  for (int64_t ahead = 0; ahead <= num_places_; ++ahead) {
    nearness_.push_back(ahead == 0 ? 0.0 : policy.nearness(ahead));
  }
}

void Victims::measure(int64_t block) {
  const double *values = policy_.values();
  const Guard *guard = policy_.guard();
  double lowest = kNever, unguarded = kNever;
  for (int32_t key = blocks_.first(block); key < blocks_.end(block); ++key) {
    const double value = blocked_[key] ? kNever : values[key];
    lowest = value < lowest ? value : lowest;
    if (guard == nullptr) continue;
    const double other = guard->in_shadow(key) ? kNever : value;
    unguarded = other < unguarded ? other : unguarded;
  }
  lowest_[block] = lowest;
  unguarded_[block] = unguarded;
}

// Of the keys with that score the one not used for longest, then the lowest.
int32_t Victims::oldest(int64_t block, double lowest, int64_t ahead, bool is_free) const {
  int32_t found = -1;
  for (int32_t key = blocks_.first(block); key < blocks_.end(block); ++key) {
    if (!blocked_[key] && (is_free || !policy_.guard()->in_shadow(key)) &&
        score(policy_.values()[key], ahead) == lowest &&
        (found < 0 || policy_.last_use(key) < policy_.last_use(found))) {
      found = key;
    }
  }
  return found;
}

// Where the key is free its value counts, whether it did so before or not; where it is held, the
// lowest may have been its own.
void Victims::turn(int32_t key) {
  const int64_t block = blocks_.of(key);
  if (blocks_.has_changed(block)) return;
  const double value = policy_.values()[key];
  const Guard *guard = policy_.guard();
  const auto count = [&](double &lowest, bool is_in) {
    if (is_in) {
      lowest = std::min(lowest, value);
    } else if (value <= lowest && lowest != kNever) {
      blocks_.change(key);
    }
  };
  count(lowest_[block], !blocked_[key]);
  if (guard != nullptr) count(unguarded_[block], !blocked_[key] && !guard->in_shadow(key));
}

void Victims::measure() {
  for (const int32_t key : blocks_.turned()) turn(key);
  blocks_.clear_turned();
  for (int64_t block = 0; block < blocks_.num(); ++block) {
    if (!blocks_.has_changed(block)) continue;
    blocks_.clear(block);
    measure(block);
  }
}

int32_t Victims::next(int64_t running, int64_t num_tokens) {
  measure();
  num_squarings_ = 0;
  while (policy_.forecasts() && num_tokens > int64_t{1} << num_squarings_) ++num_squarings_;
  const Guard *const guard = policy_.guard();
  const bool is_free = guard == nullptr || num_squarings_ > 0 || guard->is_free();
  const int32_t found = lowest(running, is_free);
  return found < 0 && !is_free ? lowest(running, true) : found;
}

// Of records that a prompt has yet to reach, the chance that one of its tokens wants them counts: in
// squarings, since both twins round those alike.
double Victims::score(double value, int64_t ahead) const {
  if (value == kNever) return kNever;
  if (ahead <= 0) return value * nearness_[ahead + num_places_];
  double none = std::max(0.0, 1.0 - value);
  for (int i = 0; i < num_squarings_; ++i) none *= none;
  return (num_squarings_ > 0 ? 1.0 - none : value) * nearness_[ahead];
}

// Rounding keeps the order of products, so that the lowest value has the lowest score of its block.
int32_t Victims::lowest(int64_t running, bool is_free) const {
  const std::vector<double> &values = is_free ? lowest_ : unguarded_;
  const auto ahead = [&](int64_t block) { return blocks_.place(block) - running; };
  double best = kNever;
  for (int64_t block = 0; block < blocks_.num(); ++block) {
    best = std::min(best, score(values[block], ahead(block)));
  }
  if (best == kNever) return -1;
  int32_t found = -1;
  for (int64_t block = 0; block < blocks_.num(); ++block) {
    if (score(values[block], ahead(block)) != best) continue;
    const int32_t key = oldest(block, best, ahead(block), is_free);
    if (found < 0 || policy_.last_use(key) < policy_.last_use(found)) found = key;
  }
  return found;
}

}  // namespace em
