// A bound on what an eviction policy may lose against plain LRU. Twin of runtime/policy_guard.py,
// which gives the reasons.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

namespace em {

class Blocks;

class Guard {
 public:
  // sizes: bytes by key; blocks: told of every key whose in_shadow changes.
  Guard(std::vector<int64_t> sizes, Blocks &blocks);

  bool in_shadow(int32_t key) const { return in_shadow_[key] != 0; }
  // Whether a record may be evicted that the shadow has.
  bool is_free() const {
    const int64_t falling = kEarlyRecords * largest_ - evicted_ / kEvictionsPerLess;
    const int64_t early = std::min(evicted_ / kEvictionsPerEarlyLoss,
                                   std::max(falling, kLateRecords * largest_));
    return (debt_ + largest_ - credit_ - early) * kEvictionsPerLoss <= evicted_;
  }
  void set_share(double share);
  // The keys are demanded together; before room is made for those absent.
  void expect(const int32_t *keys, int64_t n);
  void touch(const int32_t *keys, int64_t n);  // the demand has been met
  void insert(int32_t key);
  void remove(int32_t key);
  void fetch_ahead(int64_t first, int64_t end) const;  // keys that are demanded soon

 private:
  static constexpr int64_t kEvictionsPerEarlyLoss = 2, kEvictionsPerLoss = 96;
  static constexpr int64_t kEarlyRecords = 70, kEvictionsPerLess = 8, kLateRecords = 32;

  void link(int32_t key, int32_t after);
  void unlink(int32_t key);
  void set_shadow(int32_t key, bool is_in);
  int64_t forget();  // the one not used for longest; its size

  const std::vector<int64_t> sizes_;
  const int64_t largest_;
  Blocks &blocks_;
  const int32_t end_;                     // of the list: between the newest and the oldest
  std::vector<int32_t> newer_, older_;    // [num_keys + 1]; of what is in the shadow
  std::vector<uint8_t> in_shadow_, is_resident_, is_expected_;
  std::vector<int32_t> new_;              // of `expect`
  std::vector<uint8_t> is_hit_;
  int64_t capacity_ = 0, used_ = 0, credit_ = 0, debt_ = 0, evicted_ = 0;  // bytes
};

}  // namespace em
