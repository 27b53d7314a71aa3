// What is read from memory next: threads that wait for a record fetch it into the last cache.
#pragma once
#include <cstdint>
#include <vector>

namespace em {

struct Span {
  const char *begin;
  int64_t num_bytes;
};

class Ahead {
 public:
  // Spans of memory that stays mapped, first needed first. Asked where somebody waits, at most once.
  virtual void collect(std::vector<Span> *spans) = 0;

 protected:
  ~Ahead() = default;
};

// The first `most` bytes, cut into pieces that take a thread microseconds.
std::vector<Span> pieces_of(const std::vector<Span> &spans, int64_t most);
void fetch(const Span &span);

}  // namespace em
