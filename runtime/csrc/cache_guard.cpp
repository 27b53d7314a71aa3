#include "cache_guard.h"

#include "cache_policy.h"

namespace em {

Guard::Guard(int64_t num_keys, Blocks &blocks)
    : blocks_(blocks),
      end_(static_cast<int32_t>(num_keys)),
      newer_(static_cast<size_t>(num_keys + 1), end_),
      older_(newer_),
      in_shadow_(static_cast<size_t>(num_keys), 0),
      is_resident_(in_shadow_),
      is_expected_(in_shadow_) {}

void Guard::link(int32_t key, int32_t after) {
  const int32_t newer = newer_[after];
  older_[key] = after;
  newer_[key] = newer;
  newer_[after] = older_[newer] = key;
}

void Guard::unlink(int32_t key) {
  newer_[older_[key]] = newer_[key];
  older_[newer_[key]] = older_[key];
}

void Guard::set_shadow(int32_t key, bool is_in) {
  in_shadow_[key] = is_in;
  num_in_shadow_ += is_in ? 1 : -1;
  blocks_.change(key);
}

void Guard::forget() {
  const int32_t oldest = newer_[end_];
  unlink(oldest);
  set_shadow(oldest, false);
  debt_ -= !(is_resident_[oldest] || is_expected_[oldest]);
}

void Guard::set_share(double share) {
  capacity_ = static_cast<int64_t>(share * static_cast<double>(end_) + 1e-6);
  while (num_in_shadow_ > capacity_) forget();
}

void Guard::expect(const int32_t *keys, int64_t n) {
  new_.clear();
  is_hit_.clear();
  int64_t num_hits = 0;
  for (int64_t i = 0; i < n; ++i) {
    if (is_expected_[keys[i]]) continue;
    new_.push_back(keys[i]);
    is_hit_.push_back(in_shadow_[keys[i]]);
    num_hits += in_shadow_[keys[i]];
  }
  if (new_.empty()) return;
  for (size_t i = 0; i < new_.size(); ++i) {
    const int32_t key = new_[i];
    is_expected_[key] = 1;
    credit_ += is_resident_[key] - is_hit_[i];
    if (!is_hit_[i]) continue;
    unlink(key);
    debt_ -= !is_resident_[key];
  }
  // Hits stay in num_in_shadow_, though not in the list.
  const int64_t num_new = static_cast<int64_t>(new_.size()) - num_hits;
  while (newer_[end_] != end_ && num_in_shadow_ > capacity_ - num_new) {
    forget();
    ++num_evicted_;
  }
  for (size_t i = 0; i < new_.size(); ++i) {
    const bool fits = is_hit_[i] || num_in_shadow_ < capacity_;
    if (!fits) continue;
    if (!is_hit_[i]) set_shadow(new_[i], true);
    link(new_[i], older_[end_]);
  }
}

void Guard::touch(const int32_t *keys, int64_t n) {
  expect(keys, n);
  for (int64_t i = 0; i < n; ++i) {
    is_expected_[keys[i]] = 0;
    debt_ += in_shadow_[keys[i]] && !is_resident_[keys[i]];
  }
}

void Guard::insert(int32_t key) {
  if (is_resident_[key]) return;
  is_resident_[key] = 1;
  if (is_expected_[key]) return;
  if (in_shadow_[key]) {
    --debt_;
  } else if (num_in_shadow_ < capacity_) {
    set_shadow(key, true);
    link(key, end_);
  }
}

void Guard::remove(int32_t key) {
  if (!is_resident_[key]) return;
  is_resident_[key] = 0;
  debt_ += in_shadow_[key] && !is_expected_[key];
}

}  // namespace em
