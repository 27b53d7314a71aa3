// Which bytes of one arena are free: best fit, coalescing. Twin of runtime/extents.py.
//
// Knows offsets and sizes only, all multiples of 4096 bytes; it never touches the memory.
#pragma once
#include <cstdint>
#include <map>
#include <set>
#include <utility>
#include <vector>

namespace em {

// A record where it lies, and bytes that move towards the start of the arena.
struct Placed {
  int64_t offset, num_bytes;
  int32_t key;
  bool is_fixed;
};
struct Move {
  int32_t key;
  int64_t target;
};

class Extents {
 public:
  explicit Extents(int64_t num_bytes);

  int64_t num_bytes() const { return num_bytes_; }
  int64_t free_bytes() const { return free_bytes_; }
  int64_t used_bytes() const { return num_bytes_ - free_bytes_; }

  // Take the smallest free extent that holds the bytes (the first of equals) and lets them end at or
  // before `below`. Returns the offset, or -1 where no single extent will do.
  int64_t allocate(int64_t num_bytes, int64_t below = INT64_MAX);
  // Take these very bytes, which are free.
  void take(int64_t offset, int64_t num_bytes);
  void free(int64_t offset, int64_t num_bytes);
  // Move the end, beyond which nothing may lie.
  void resize(int64_t num_bytes);

  // The cheapest moves after which one free extent holds `num_bytes`, in the order in which they can
  // be carried out one by one, given all records in address order. False where there are none; else
  // *moved_bytes is their price.
  bool plan(int64_t num_bytes, const std::vector<Placed> &records, std::vector<Move> *moves,
            int64_t *moved_bytes) const;

 private:
  void add(int64_t start, int64_t end);
  void remove(int64_t start, int64_t end);

  int64_t num_bytes_, free_bytes_ = 0;
  std::map<int64_t, int64_t> end_of_;               // start -> end of every free extent
  std::set<std::pair<int64_t, int64_t>> by_size_;   // (bytes, start) of the same
};

}  // namespace em
