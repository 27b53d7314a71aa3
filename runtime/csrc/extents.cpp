#include "extents.h"

#include <algorithm>
#include <iterator>

namespace em {

Extents::Extents(int64_t num_bytes) : num_bytes_(num_bytes) {
  if (num_bytes > 0) add(0, num_bytes);
}

int64_t Extents::allocate(int64_t num_bytes, int64_t below) {
  auto found = by_size_.lower_bound({num_bytes, 0});
  while (found != by_size_.end() && found->second > below - num_bytes) ++found;
  if (found == by_size_.end()) return -1;
  const int64_t start = found->second;
  take(start, num_bytes);
  return start;
}

void Extents::take(int64_t offset, int64_t num_bytes) {
  const auto [start, end] = *std::prev(end_of_.upper_bound(offset));
  remove(start, end);
  if (start < offset) add(start, offset);
  if (offset + num_bytes < end) add(offset + num_bytes, end);
}

void Extents::free(int64_t offset, int64_t num_bytes) {
  int64_t start = offset, end = offset + num_bytes;
  const auto after = end_of_.find(end);
  if (after != end_of_.end()) {
    end = after->second;
    remove(after->first, end);
  }
  const auto behind = end_of_.lower_bound(offset);
  if (behind != end_of_.begin() && std::prev(behind)->second == offset) {
    start = std::prev(behind)->first;
    remove(start, offset);
  }
  add(start, end);
}

void Extents::resize(int64_t num_bytes) {
  const int64_t old = num_bytes_;
  num_bytes_ = num_bytes;
  if (num_bytes > old) {
    free(old, num_bytes - old);
  } else if (num_bytes < old) {
    take(num_bytes, old - num_bytes);
  }
}

// gaps[i] lies before record i, gaps[n] behind the last. A window (i, j) joins the gaps i .. j by
// moving the records i .. j - 1 between them.
bool Extents::plan(int64_t num_bytes, const std::vector<Placed> &records, std::vector<Move> *moves,
                   int64_t *moved_bytes) const {
  const std::size_t n = records.size();
  const auto edge = [&](std::size_t i) {
    return i == 0 ? 0 : records[i - 1].offset + records[i - 1].num_bytes;
  };
  const auto gap = [&](std::size_t i) {
    return (i < n ? records[i].offset : num_bytes_) - edge(i);
  };
  bool is_found = false;
  std::size_t best = 0, best_end = 0;
  int64_t sum = gap(0), moved = 0;  // of the window (i, j)
  for (std::size_t i = 0, j = 0; i <= n; ++i) {
    if (j < i) {
      j = i;
      sum = gap(i);
      moved = 0;
    }
    while (j < n && sum < num_bytes && !records[j].is_fixed) {
      moved += records[j].num_bytes;
      sum += gap(++j);
    }
    if (sum >= num_bytes && (!is_found || moved < *moved_bytes)) {
      is_found = true;
      best = i;
      best_end = j;
      *moved_bytes = moved;
    }
    sum -= gap(i);
    if (i < j) moved -= records[i].num_bytes;
  }
  moves->clear();
  if (!is_found) return false;
  *moved_bytes = 0;
  int64_t target = edge(best);
  for (std::size_t i = best; i < best_end; ++i) {
    if (records[i].offset != target) {
      moves->push_back({records[i].key, target});
      *moved_bytes += records[i].num_bytes;
    }
    target += records[i].num_bytes;
  }
  return true;
}

void Extents::add(int64_t start, int64_t end) {
  end_of_.emplace(start, end);
  by_size_.emplace(end - start, start);
  free_bytes_ += end - start;
}

void Extents::remove(int64_t start, int64_t end) {
  end_of_.erase(start);
  by_size_.erase({end - start, start});
  free_bytes_ -= end - start;
}

}  // namespace em
