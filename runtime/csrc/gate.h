// Whether reading a guess is worth it: what a right one gains against what a wrong one costs, all of
// it measured while decoding. Arithmetic only. Depth: layers ahead, from 1. Grade: how sure
// a guess is, by its score or its rank; 0 is the least.
#pragma once
#include <cstdint>
#include <vector>

namespace em {

constexpr int kMaxDepth = 2;

// A mean that forgets: the last 1 / `weight` samples count most. The first ones count alike.
class Mean {
 public:
  explicit Mean(double start = 0.0) : value_(start) {}
  void add(double sample);
  double value() const { return value_; }
  bool is_known() const { return num_ > 0; }
  int num() const { return num_; }  // samples that count

 private:
  double value_;
  int num_ = 0;
};

class Gate {
 public:
  Gate(int64_t num_places, int64_t num_grades);

  // Of a guess of a record that was absent then: was it demanded? It need not have been read.
  void score(int depth, int64_t place, int64_t grade, bool was_right);
  double odds(int depth, int64_t place, int64_t grade) const;

  void saw_reading(int64_t num_bytes, int64_t busy_ns);  // storage was never idle in that time
  // From one router to the next one, at `place`, of a layer that waited for nothing; or from the end
  // of its waiting.
  void saw_interval(int64_t place, int64_t ns, bool has_waited) {
    (has_waited ? tails_ : intervals_)[place].add(static_cast<double>(ns));
    windows_.add(static_cast<double>(ns));
  }
  // A layer is done, of which so many records were absent when its router spoke.
  void saw_layer(int64_t num_misses, int64_t stall_ns);
  // A guess was handed over to the drive, which took a thread so long.
  void saw_asking(int64_t ns) { asking_ns_.add(static_cast<double>(ns)); }
  // The likeliest guess for a layer was wrong: whether the layer had others to wait for.
  void saw_wrong(bool has_absent) { delays_.add(has_absent ? 1.0 : 0.0); }

  // Until the router at `place` speaks: from the router before, or from when the layer has all records.
  double interval_ns(int64_t place) const { return of(intervals_, tails_, place); }
  double tail_ns(int64_t place) const { return of(tails_, intervals_, place); }
  double read_ns(double num_bytes) const { return num_bytes * ns_per_byte_.value(); }
  // What reading a guess gains beyond its cost, above 0 where it is worth it: a record of `num_bytes`
  // behind `backlog_bytes`, which will be demanded with the probability `odds`, if so `window_ns`
  // from now.
  double worth_ns(double odds, double num_bytes, double backlog_bytes, double window_ns) const;
  int64_t request_bytes() const;  // into which guesses are cut, by the speed of the drive

 private:
  struct Count {
    float right = 0.0f, seen = 0.0f;
  };
  static void add(Count *count, bool was_right);
  Count &at(int depth, int64_t place, int64_t grade) {
    return counts_[(((depth - 1) * (num_places_ + 1)) + place) * num_grades_ + grade];
  }
  const Count &at(int depth, int64_t place, int64_t grade) const {
    return const_cast<Gate *>(this)->at(depth, place, grade);
  }

  static double of(const std::vector<Mean> &means, const std::vector<Mean> &others, int64_t place) {
    return (means[place].is_known() ? means : others)[place].value();
  }

  int64_t num_places_, num_grades_;
  std::vector<Count> counts_;  // [kMaxDepth][num_places + 1: all together][num_grades]
  std::vector<Mean> intervals_, tails_;
  Mean windows_;  // both, of all places
  Mean ns_per_byte_, stall_ns_;  // stall: of a layer with misses
  // Share of wrong guesses that a demand waits behind. Layers of which absent records are expected have
  // others far more often than layers at large.
  Mean delays_{1.0};
  Mean asking_ns_{40e3};  // as on a virtual machine; a core of one's own is faster
};

}  // namespace em
