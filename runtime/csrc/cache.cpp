#include "cache.h"

#include <algorithm>
#include <atomic>
#include <limits>

#include "platform.h"
#include "store.h"

namespace em {
namespace {

constexpr double kNoLimit = std::numeric_limits<double>::infinity();
// Of records of different sizes; runtime/cache.py has the figures behind it.
constexpr int64_t kMaxRecordsToPlan = 256;

}  // namespace

uint64_t new_identity() {
  static std::atomic<uint64_t> last{0};
  return ++last;
}

bool Cache::is_valid(em_store *store, const em_cache_config &config) {
  constexpr int64_t kPage = 4096;
  if (!config.arena || reinterpret_cast<uintptr_t>(config.arena) % kPage || !config.policy ||
      config.capacity_bytes < 0 || config.capacity_bytes > config.arena_bytes ||
      config.capacity_bytes % kPage || !config.first_keys || config.num_places < 0 ||
      !(config.half_life > 0) || !(config.max_moved_per_byte >= 0) || config.first_keys[0] != 0 ||
      config.first_keys[config.num_places] != num_records_of(store)) {
    return false;
  }
  for (int64_t place = 0; place < config.num_places; ++place) {
    if (config.first_keys[place] > config.first_keys[place + 1]) return false;
  }
  return make_policy(config.policy, Cycle{{0}}, config.half_life) != nullptr;
}

Cache::Cache(em_store *store, const em_cache_config &config)
    : store_(store),
      cycle_{{config.first_keys, config.first_keys + config.num_places + 1}},
      slots_(store, config.arena, config.capacity_bytes),
      policy_(make_policy(config.policy, cycle_, config.half_life)),
      arena_bytes_(config.arena_bytes),
      max_moved_per_byte_(config.max_moved_per_byte),
      blocked_(static_cast<size_t>(num_keys()), 1),
      victims_(cycle_, *policy_, blocked_),
      pins_(static_cast<size_t>(num_keys()), 0),
      hint_of_(static_cast<size_t>(num_keys()), 0),
      is_unsettled_(static_cast<size_t>(num_keys()), 0),
      guess_of_(static_cast<size_t>(num_keys()), Guess::kNone),
      place_stats_(static_cast<size_t>(num_places())) {
  std::vector<int64_t> sizes;
  for (int32_t key = 0; key < num_keys(); ++key) {
    sizes.push_back(slots_.num_bytes_of(key));
    max_record_bytes_ = std::max(max_record_bytes_, sizes.back());
  }
  policy_->set_sizes(sizes);
  unsettled_.reserve(static_cast<size_t>(num_keys()));  // so that a release cannot fail
  set_share(config.capacity_bytes);
}

em_cache_stats Cache::stats() const {
  em_cache_stats now = {};
  now.capacity_bytes = slots_.extents().num_bytes();
  now.resident_bytes = slots_.extents().used_bytes();
  now.pinned_bytes = pinned_bytes_;
  now.num_resident = slots_.num_resident();
  now.num_evictions = evictions_;
  now.moved_bytes = slots_.moved_bytes();
  now.native_ns = native_ns_;
  now.decide_ns = decide_ns_;
  now.guess_ns = guess_ns_;
  now.submit_ns = submit_ns_;
  now.num_foreseen = num_foreseen_;
  now.num_foreseen_in_time = num_foreseen_in_time_;
  return now;
}

void Cache::begin_layer(int64_t place, int64_t num_tokens, int64_t n, const int32_t *wanted) {
  learn();
  if (place <= place_) step_ += num_tokens;
  place_ = place;
  num_tokens_ = num_tokens;
  unblock_wanted();
  for (int64_t i = 0; i < n; ++i) {
    if (blocked_[wanted[i]]) continue;
    block(wanted[i]);
    wanted_.push_back(wanted[i]);
  }
}

int32_t Cache::route(int64_t num_tokens, int64_t top_k, const int32_t *experts) {
  const int64_t num_experts = cycle_.first_key[place_ + 1] - cycle_.first_key[place_];
  const auto is_one = [=](int32_t expert) { return expert >= -1 && expert < num_experts; };
  if (!std::all_of(experts, experts + num_tokens * top_k, is_one)) return EM_ERR_ARG;
  learn();
  policy_->route(place_, experts, num_tokens, top_k, step_);
  return 0;
}

int32_t Cache::hint(int64_t n, const int32_t *keys, const double *counts,
                    em_cache_demand *demand) {
  learn();
  if (!unsettled_.empty()) settle(false);
  ++hint_number_;
  absent_.clear();
  taken_.clear();
  em_cache_demand found = {};
  for (int64_t i = 0; i < n; ++i) {
    const int32_t key = keys[i];
    if (key < 0 || key >= num_keys() || hint_of_[key] == hint_number_) return EM_ERR_ARG;
    hint_of_[key] = hint_number_;
    if (guess_of_[key] != Guess::kNone && take_guess(key)) {
      ++found.num_guessed;
      found.num_bytes += slots_.num_bytes_of(key);
    }
    if (is_absent(key)) absent_.push_back(key);
  }
  if (absent_.empty()) {
    pin(n, keys);
  } else {
    if (!fits(n, keys)) return 0;
    policy_->expect(keys, n);
    const int32_t status = read(n, keys);
    if (status <= 0) return status;
  }
  lesson_.assign(keys, keys + n);
  if (counts != nullptr || n == 0) {
    lesson_.clear();
    policy_->touch(keys, n, counts, step_, num_tokens_);
  }
  found.num_misses = static_cast<int64_t>(absent_.size());
  found.num_hits = n - found.num_misses - found.num_guessed;
  for (const int32_t key : absent_) found.num_bytes += slots_.num_bytes_of(key);
  em_place_stats &stats = place_stats_[place_];
  stats.num_hits += found.num_hits;
  stats.num_misses += found.num_misses;
  stats.num_guessed += found.num_guessed;
  stats.num_bytes += found.num_bytes;
  if (demand != nullptr) *demand = found;
  return 1;
}

void Cache::learn() {
  if (lesson_.empty()) return;
  policy_->touch(lesson_.data(), static_cast<int64_t>(lesson_.size()), nullptr, step_, num_tokens_);
  lesson_.clear();
}

void Cache::fetch_ahead(int64_t place) const {
  const int64_t first = cycle_.first_key[place], end = cycle_.first_key[place + 1];
  em::fetch_ahead(hint_of_.data(), first, end);
  em::fetch_ahead(pins_.data(), first, end);
  em::fetch_ahead(blocked_.data(), first, end);
  em::fetch_ahead(is_unsettled_.data(), first, end);
  em::fetch_ahead(guess_of_.data(), first, end);
  em::fetch_ahead(&place_stats_[place], 0, 1);
  slots_.fetch_ahead(first, end);
  policy_->fetch_ahead(first, end);
  em::fetch_ahead(store_, first, end);
}

bool Cache::fits(int64_t n, const int32_t *keys) const {
  const int64_t room = slots_.extents().num_bytes() - pinned_bytes_;
  if (n * max_record_bytes_ <= room) return true;
  int64_t needed = 0;
  for (int64_t i = 0; i < n; ++i) {
    if (!is_pinned(keys[i])) needed += slots_.num_bytes_of(keys[i]);
  }
  return needed <= room;
}

void Cache::pin(int64_t n, const int32_t *keys) {
  for (int64_t i = 0; i < n; ++i) {
    if (pins_[keys[i]]++ == 0) pinned_bytes_ += slots_.num_bytes_of(keys[i]);
    block(keys[i]);
  }
  const auto is_gone = [this](int32_t key) { return is_pinned(key); };
  for (std::vector<int32_t> *kept : {&wanted_, &foreseen_}) {
    if (!kept->empty()) kept->erase(std::remove_if(kept->begin(), kept->end(), is_gone), kept->end());
  }
}

bool Cache::is_ours(int32_t key) const {
  return pins_[key] == (hint_of_[key] == hint_number_ ? 1 : 0);
}

// Pin the keys, give the absent ones memory and submit their reads.
int32_t Cache::read(int64_t n, const int32_t *keys) {
  pin(n, keys);
  size_t num_placed = 0;
  while (num_placed < absent_.size() && place_record(absent_[num_placed])) ++num_placed;
  int32_t status = 0;
  if (num_placed == absent_.size()) {
    status = submit(absent_);
    if (status == 0) {
      for (const int32_t key : absent_) policy_->insert(key);
      return 1;
    }
  }
  for (size_t i = 0; i < num_placed; ++i) drop(absent_[i]);
  release(n, keys);
  return status;
}

int32_t Cache::submit(const std::vector<int32_t> &keys) {
  dst_.clear();
  for (const int32_t key : keys) dst_.push_back(reinterpret_cast<void *>(slots_.address(key)));
  const int64_t before = monotonic_ns();
  const int32_t status = em_store_submit(store_, static_cast<int64_t>(keys.size()), keys.data(),
                                         dst_.data(), 0);
  submit_ns_ += monotonic_ns() - before;
  return status;
}

// Give a record memory: a free extent, else by moving or evicting others, or false.
bool Cache::place_record(int32_t key) {
  const int64_t num_bytes = slots_.num_bytes_of(key);
  const auto is_fixed = [this](int32_t other) { return !is_ours(other); };
  double limit = max_moved_per_byte_ * static_cast<double>(num_bytes);
  if (slots_.num_resident() > kMaxRecordsToPlan) limit = 0;
  while (!slots_.place(key)) {
    if (limit > 0 && slots_.extents().free_bytes() >= num_bytes) {
      const bool is_joined = slots_.join(num_bytes, limit, is_fixed);
      limit = 0;  // tried once
      if (is_joined) continue;
    }
    int32_t victim = victims_.next(place_, num_tokens_);
    std::vector<int32_t> &kept = foreseen_.empty() ? wanted_ : foreseen_;  // of later layers first
    if (victim < 0 && !kept.empty()) {
      victim = kept.back();  // the last of them is needed last
      kept.pop_back();
    }
    if (victim >= 0 && slots_.num_bytes_of(victim) == num_bytes) {
      slots_.take_over(victim, key);
      forget(victim);
      return true;
    }
    if (victim >= 0) {
      evict(victim);
    } else if (!unsettled_.empty() || !guesses_.empty()) {
      drop_all_guesses();
      settle(true);
    } else if (!slots_.join(num_bytes, kNoLimit, is_fixed)) {
      if (taken_.empty()) return false;
      for (const int32_t guess : taken_) em_store_wait(store_, guess);  // then they can be moved
      taken_.clear();
    }
  }
  return true;
}

void Cache::release(int64_t n, const int32_t *keys) {
  bool is_all_ready = true;
  for (int64_t i = 0; i < n; ++i) {
    const int32_t key = keys[i];
    if (pins_[key] == 0 || --pins_[key] > 0) continue;
    pinned_bytes_ -= slots_.num_bytes_of(key);
    if (is_absent(key)) continue;
    if (status_of(store_, key) == EM_READY) {
      unblock(key);
    } else {
      add_unsettled(key);
      is_all_ready = false;
    }
  }
  if (!is_all_ready) settle(false);
}

int64_t Cache::preload(int64_t n, const int32_t *keys, int32_t *placed) {
  learn();
  std::vector<int32_t> found;
  for (int64_t i = 0; i < n; ++i) {
    if (is_absent(keys[i]) && slots_.place(keys[i])) found.push_back(keys[i]);
  }
  const int32_t status = submit(found);
  if (status != 0) {
    for (const int32_t key : found) drop(key);
    return status;
  }
  for (const int32_t key : found) policy_->insert(key);
  for (const int32_t key : found) add_unsettled(key);
  std::copy(found.begin(), found.end(), placed);
  return static_cast<int64_t>(found.size());
}

void Cache::add_unsettled(int32_t key) {
  if (!is_unsettled_[key]) unsettled_.push_back(key);
  is_unsettled_[key] = 1;
}

void Cache::settle(bool wait) {
  if (!wait) em_store_pump(store_);
  size_t num_left = 0;
  for (const int32_t key : unsettled_) {
    is_unsettled_[key] = 0;
    if (is_pinned(key) || is_absent(key)) continue;  // if pinned, settled when released again
    const int32_t status = wait ? em_store_wait(store_, key) : status_of(store_, key);
    if (status == EM_READING) {
      is_unsettled_[key] = 1;
      unsettled_[num_left++] = key;
    } else if (status == EM_READY) {
      unblock(key);
    } else {
      learn();
      drop(key);
      policy_->remove(key);
    }
  }
  unsettled_.resize(num_left);
}

bool Cache::resize(int64_t capacity_bytes, bool keeps_memory) {
  if (pinned_bytes_ > 0) return false;
  learn();
  drop_all_guesses();
  settle(true);
  unblock_wanted();
  set_share(capacity_bytes);
  while (slots_.extents().used_bytes() > capacity_bytes) {
    const int32_t victim = victims_.next(place_, 1);
    if (victim < 0) break;  // cannot be: nothing is held
    evict(victim);
  }
  for (const int32_t key : slots_.shrink(capacity_bytes)) evict(key);
  slots_.resize(capacity_bytes, keeps_memory);
  return true;
}

void Cache::set_share(int64_t capacity_bytes) {
  int64_t num_bytes = 0;
  for (int32_t key = 0; key < num_keys(); ++key) num_bytes += slots_.num_bytes_of(key);
  if (num_bytes > 0) {
    policy_->set_share(static_cast<double>(capacity_bytes) / static_cast<double>(num_bytes));
  }
}

void Cache::evict(int32_t key) {
  slots_.drop(key);
  forget(key);
}

void Cache::forget(int32_t key) {
  if (guess_of_[key] != Guess::kNone) guess_counts_.wasted_bytes += slots_.num_bytes_of(key);
  guess_of_[key] = Guess::kNone;
  block(key);
  policy_->remove(key);
  ++evictions_;
}

void Cache::drop(int32_t key) {
  if (guess_of_[key] != Guess::kNone) count_lost_guess(key);
  slots_.drop(key);
  block(key);
}

// Leave those records to the policy that nothing else holds.
void Cache::unblock_wanted() { unblock_all(wanted_); }

void Cache::unblock_all(std::vector<int32_t> &keys) {
  for (const int32_t key : keys) {
    if (!is_absent(key) && !is_pinned(key) && !is_unsettled_[key]) unblock(key);
  }
  keys.clear();
}

}  // namespace em
