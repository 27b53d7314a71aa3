#include "cache_guard.h"

#include <algorithm>
#include <utility>

#include "cache_policy.h"
#include "platform.h"

namespace em {

Guard::Guard(std::vector<int64_t> sizes, Blocks &blocks)
    : sizes_(std::move(sizes)),
      largest_(sizes_.empty() ? 0 : *std::max_element(sizes_.begin(), sizes_.end())),
      blocks_(blocks),
      end_(static_cast<int32_t>(sizes_.size())),
      newer_(sizes_.size() + 1, end_),
      older_(newer_),
      in_shadow_(sizes_.size(), 0),
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
  used_ += is_in ? sizes_[key] : -sizes_[key];
  blocks_.turn(key);
}

int64_t Guard::forget() {
  const int32_t oldest = newer_[end_];
  unlink(oldest);
  set_shadow(oldest, false);
  if (!is_resident_[oldest] && !is_expected_[oldest]) debt_ -= sizes_[oldest];
  return sizes_[oldest];
}

void Guard::set_share(double share) {
  int64_t num_bytes = 0;
  for (const int64_t size : sizes_) num_bytes += size;
  capacity_ = static_cast<int64_t>(share * static_cast<double>(num_bytes) + 0.5);
  while (used_ > capacity_) forget();
}

void Guard::fetch_ahead(int64_t first, int64_t end) const {
  em::fetch_ahead(sizes_.data(), first, end);
  em::fetch_ahead(newer_.data(), first, end);
  em::fetch_ahead(older_.data(), first, end);
  for (const std::vector<uint8_t> *each : {&in_shadow_, &is_resident_, &is_expected_}) {
    em::fetch_ahead(each->data(), first, end);
  }
}

void Guard::expect(const int32_t *keys, int64_t n) {
  new_.clear();
  is_hit_.clear();
  int64_t needed = 0;
  for (int64_t i = 0; i < n; ++i) {
    const int32_t key = keys[i];
    if (is_expected_[key]) continue;
    const bool is_hit = in_shadow_[key] != 0;
    new_.push_back(key);
    is_hit_.push_back(is_hit);
    is_expected_[key] = 1;
    credit_ += sizes_[key] * (is_resident_[key] - is_hit);
    if (is_hit) {
      unlink(key);  // and stays in used_
      debt_ -= is_resident_[key] ? 0 : sizes_[key];
    } else {
      needed += sizes_[key];
    }
  }
  while (newer_[end_] != end_ && used_ + needed > capacity_) evicted_ += forget();
  for (size_t i = 0; i < new_.size(); ++i) {
    const int32_t key = new_[i];
    if (!is_hit_[i]) {
      if (used_ + sizes_[key] > capacity_) continue;
      set_shadow(key, true);
    }
    link(key, older_[end_]);
  }
}

void Guard::touch(const int32_t *keys, int64_t n) {
  expect(keys, n);
  for (int64_t i = 0; i < n; ++i) {
    is_expected_[keys[i]] = 0;
    if (in_shadow_[keys[i]] && !is_resident_[keys[i]]) debt_ += sizes_[keys[i]];
  }
}

void Guard::insert(int32_t key) {
  if (is_resident_[key]) return;
  is_resident_[key] = 1;
  if (is_expected_[key]) return;
  if (in_shadow_[key]) {
    debt_ -= sizes_[key];
  } else if (used_ + sizes_[key] <= capacity_) {
    set_shadow(key, true);
    link(key, end_);
  }
}

void Guard::remove(int32_t key) {
  if (!is_resident_[key]) return;
  is_resident_[key] = 0;
  if (in_shadow_[key] && !is_expected_[key]) debt_ += sizes_[key];
}

}  // namespace em
