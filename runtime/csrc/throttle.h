// An emulated drive: when requests would end on a slower one. Keeps the books only: every clock is
// given, nothing waits here.
#pragma once
#include <cstdint>
#include <vector>

namespace em {

constexpr int64_t kNever = INT64_MAX;

// Serves one request at a time, n bytes for n / rate seconds without a break; of those that wait,
// the most urgent next, else the one that came first.
class Throttle {
 public:
  // At most so many requests are known at a time, so that nothing but this allocates.
  void reserve(int32_t num_requests);

  bool is_on() const { return rate_ > 0; }
  int64_t rate() const { return rate_; }      // bytes per second, 0: off
  int64_t busy_ns() const { return busy_ns_; }  // of all services begun
  // 0 ends everything at once; else what is being served keeps its end.
  void set_rate(int64_t bytes_per_s, int64_t now);

  void add(uint64_t tag, int32_t key, int32_t priority, int64_t num_bytes, int64_t now);
  // Requests of a record that are not being served yet become as urgent as this.
  void promote(int32_t key, int32_t priority, int64_t now);
  void forget(uint64_t tag);  // of a request that will not be read; what it took stays taken

  bool pop(int64_t now, uint64_t *tag);  // one that has ended, in the order of ending
  bool take(int64_t now, uint64_t tag);  // whether this one has ended; then it is no longer known
  int64_t due() const { return is_serving_ ? end_ : kNever; }  // when the next one ends
  bool has_ended() const { return !ended_.empty(); }           // one that nobody took yet

 private:
  struct Item {
    uint64_t tag, turn;
    int32_t key, priority;
    int64_t num_bytes;
  };

  void advance(int64_t now);
  void serve(const Item &item, int64_t begin);

  int64_t rate_ = 0, busy_ns_ = 0, end_ = 0;
  uint64_t turn_ = 0, served_ = 0;  // served_: the tag being served
  bool is_serving_ = false, is_forgotten_ = false;
  std::vector<Item> waiting_;
  std::vector<uint64_t> ended_;
};

}  // namespace em
