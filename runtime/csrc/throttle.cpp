#include "throttle.h"

#include <algorithm>
#include <cmath>
#include <tuple>

namespace em {

void Throttle::reserve(int32_t num_requests) {
  waiting_.reserve(static_cast<size_t>(num_requests));
  ended_.reserve(static_cast<size_t>(num_requests));
}

void Throttle::set_rate(int64_t bytes_per_s, int64_t now) {
  advance(now);
  rate_ = bytes_per_s;
  if (rate_ > 0) return;
  if (is_serving_) {
    if (end_ > now) busy_ns_ -= end_ - now;
    if (!is_forgotten_) ended_.push_back(served_);
  }
  is_serving_ = false;
  for (const Item &item : waiting_) ended_.push_back(item.tag);
  waiting_.clear();
}

void Throttle::serve(const Item &item, int64_t begin) {
  const double seconds = static_cast<double>(item.num_bytes) / static_cast<double>(rate_);
  const int64_t took = static_cast<int64_t>(std::ceil(seconds * 1e9));
  served_ = item.tag;
  end_ = begin + took;
  busy_ns_ += took;
  is_serving_ = true;
  is_forgotten_ = false;
}

void Throttle::advance(int64_t now) {
  while (is_serving_ && end_ <= now) {
    if (!is_forgotten_) ended_.push_back(served_);
    is_serving_ = false;
    if (waiting_.empty()) return;
    const auto next = std::min_element(
        waiting_.begin(), waiting_.end(), [](const Item &a, const Item &b) {
          return std::tie(a.priority, a.turn) < std::tie(b.priority, b.turn);
        });
    const Item item = *next;
    waiting_.erase(next);
    serve(item, end_);
  }
}

void Throttle::add(uint64_t tag, int32_t key, int32_t priority, int64_t num_bytes, int64_t now) {
  advance(now);
  const Item item = {tag, turn_++, key, priority, num_bytes};
  if (is_serving_) {
    waiting_.push_back(item);
  } else {
    serve(item, now);
  }
}

void Throttle::promote(int32_t key, int32_t priority, int64_t now) {
  advance(now);
  for (Item &item : waiting_) {
    if (item.key == key && priority < item.priority) {
      item.priority = priority;
      item.turn = turn_++;
    }
  }
}

void Throttle::forget(uint64_t tag) {
  const auto is_it = [tag](const Item &item) { return item.tag == tag; };
  waiting_.erase(std::remove_if(waiting_.begin(), waiting_.end(), is_it), waiting_.end());
  ended_.erase(std::remove(ended_.begin(), ended_.end(), tag), ended_.end());
  if (is_serving_ && served_ == tag) is_forgotten_ = true;
}

bool Throttle::pop(int64_t now, uint64_t *tag) {
  advance(now);
  if (ended_.empty()) return false;
  *tag = ended_.front();
  ended_.erase(ended_.begin());
  return true;
}

bool Throttle::take(int64_t now, uint64_t tag) {
  advance(now);
  const auto found = std::find(ended_.begin(), ended_.end(), tag);
  if (found == ended_.end()) return false;
  ended_.erase(found);
  return true;
}

}  // namespace em
