#include "gate.h"

#include <algorithm>
#include <cmath>

#include "read_queue.h"

namespace em {
namespace {

constexpr int kMemory = 64;          // samples
constexpr float kMaxSeen = 256.0f;   // guesses that a count remembers
constexpr float kPrior = 8.0f;       // guesses that all places together count for, at one place
constexpr float kPriorBelow = 4.0f;  // and that the grade below counts for
constexpr float kUnseen = 0.125f;    // odds of the lowest grade, so that a gate opens by what it sees
// What reading costs beside the drive: .03 CPU s/GB, a byte through memory that has 20 GB/s for reading and
// arithmetic, and the record that goes for it.
constexpr double kReadingNsPerByte = 0.15;
// Of each request of a guess behind its first one. A thread is at it for some 45 us, in part of which it
// would have waited.
constexpr double kRequestNs = 15e3;
// A request of a guess takes half the time that guesses have, within bounds: a demand may have to wait for
// it, and each costs some us of a core.
constexpr double kLeastRequestNs = 200e3, kMostRequestNs = 400e3;
constexpr int64_t kPageBytes = 4096, kLeastRequestBytes = 4 * kPageBytes;
constexpr double kMargin = 1.2;  // of gain over cost, since both are estimates

}  // namespace

void Mean::add(double sample) {
  num_ = std::min(num_ + 1, kMemory);
  value_ += (sample - value_) / num_;
}

Gate::Gate(int64_t num_places, int64_t num_grades)
    : num_places_(num_places),
      num_grades_(num_grades),
      counts_(static_cast<size_t>(kMaxDepth * (num_places + 1) * num_grades)),
      intervals_(static_cast<size_t>(num_places)),
      tails_(intervals_) {}

void Gate::add(Count *count, bool was_right) {
  if (count->seen >= kMaxSeen) {
    count->seen *= 0.5f;
    count->right *= 0.5f;
  }
  count->seen += 1.0f;
  count->right += was_right ? 1.0f : 0.0f;
}

void Gate::score(int depth, int64_t place, int64_t grade, bool was_right) {
  add(&at(depth, place, grade), was_right);
  add(&at(depth, num_places_, grade), was_right);
}

double Gate::odds(int depth, int64_t place, int64_t grade) const {
  float prior = kUnseen;
  for (int64_t each = 0; each <= grade; ++each) {
    const Count &all = at(depth, num_places_, each);
    prior = (all.right + kPriorBelow * prior) / (all.seen + kPriorBelow);
  }
  const Count &here = at(depth, place, grade);
  return (here.right + kPrior * prior) / (here.seen + kPrior);
}

void Gate::saw_reading(int64_t num_bytes, int64_t busy_ns) {
  if (num_bytes <= 0 || busy_ns <= 0) return;
  ns_per_byte_.add(static_cast<double>(busy_ns) / static_cast<double>(num_bytes));
}

void Gate::saw_layer(int64_t num_misses, int64_t stall_ns) {
  if (num_misses > 0) stall_ns_.add(static_cast<double>(stall_ns));
}

double Gate::worth_ns(double odds, double num_bytes, double backlog_bytes, double window_ns) const {
  // Nothing was read or waited for yet: nothing to gain is known of.
  if (!ns_per_byte_.is_known() || !stall_ns_.is_known()) return 0.0;
  const double read = read_ns(num_bytes), ahead = read_ns(backlog_bytes);
  const double done = std::min(read, window_ns - ahead);  // before the router speaks
  if (done <= 0.0) return 0.0;
  const double gain = odds * std::min(done, stall_ns_.value());
  // A wrong guess is dropped then, but demands wait for what is left of the request that is under way:
  // of the first one what does not fit before, of a later one half on average.
  const double request = read_ns(std::min(num_bytes, static_cast<double>(request_bytes())));
  const double left = done < request ? request - done : request / 2.0;
  const double delay = done < read ? delays_.value() * left : 0.0;
  const double beside = kReadingNsPerByte * num_bytes * done / read;
  // A right guess takes no more asking than the demand that it saves, or that goes on beside it.
  const double wrong = delay + beside + asking_ns_.value();
  const double others = kRequestNs * (std::ceil(done / request) - 1.0);
  return gain - kMargin * ((1.0 - odds) * wrong + others);
}

int64_t Gate::request_bytes() const {
  if (!ns_per_byte_.is_known()) return kGuessBytes;
  const double half = windows_.is_known() ? windows_.value() / 2.0 : kMostRequestNs;
  const double num_bytes = std::clamp(half, kLeastRequestNs, kMostRequestNs) / ns_per_byte_.value();
  const int64_t pages = static_cast<int64_t>(num_bytes) / kPageBytes;
  return std::clamp(pages * kPageBytes, kLeastRequestBytes, kGuessBytes);
}

}  // namespace em
