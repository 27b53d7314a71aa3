// The experts of one layer in rounds: a round computes what has landed, the others go on being read.
#include <atomic>
#include <cerrno>
#include <cstddef>
#include <vector>

#include "ahead.h"
#include "cache.h"
#include "edgemoe_core.h"
#include "experts.h"
#include "moe.h"
#include "platform.h"
#include "prefetch.h"
#include "store.h"
#include "thread_pool.h"

namespace em {
namespace {

constexpr int64_t kItemsBetween = 16;  // tens of microseconds

class Layer {
 public:
  Layer(em_pool *pool, em_store *store, const em_record *records, em_moe_args *args,
        Prefetcher *between, Cache *cache, Ahead *ahead)
      : pool_(pool),
        store_(store),
        records_(records),
        a_(*args),
        between_(between),
        cache_(cache),
        ahead_(ahead) {}

  int32_t run();
  void drain() const;  // waits for every read of the list

 private:
  struct Part {
    Segment segment;
    Phase phase = Phase::kGateUp;
  };

  bool is_valid() const;
  void cut();
  int32_t gather();
  bool find_rows(Segment *segment) const;
  void gather_inputs(const Experts &experts);
  std::size_t place_of(int64_t item) const;
  int32_t compute(const Experts &experts);
  int32_t learn_beside() const;
  bool learn_waiting();
  bool has_news() const;
  void fetch_ahead();
  void wait();

  em_pool *pool_;
  em_store *store_;
  const em_record *records_;
  em_moe_args &a_;
  Prefetcher *between_;
  Cache *cache_;
  Ahead *ahead_;
  std::vector<Span> pieces_;  // of what is ahead
  std::atomic<std::size_t> next_piece_{0};
  int64_t num_rows_ = 0;
  std::vector<Part> parts_;           // ascending expert, ascending pair
  std::vector<std::size_t> round_;    // positions in parts_: what is computed next
  std::vector<int64_t> begin_;        // [round + 1] first item of each
  std::vector<int32_t> keys_, seen_;  // being read, and how far they had come
};

bool Layer::is_valid() const {
  const int64_t rows_unit = kTileRows;
  if (a_.num_tokens < 0 || a_.num_experts < 0 || a_.hidden < 1 || a_.width < 1 ||
      a_.hidden % rows_unit || a_.width % rows_unit || (records_ == nullptr && a_.num_experts > 0)) {
    return false;
  }
  for (int64_t i = 0; i < a_.num_experts; ++i) {
    if (a_.keys[i] < 0 || (store_ != nullptr && a_.keys[i] >= num_records_of(store_)) ||
        a_.pair_begin[i] > a_.pair_begin[i + 1] ||
        !RecordShape(records_[a_.keys[i]], a_.hidden, a_.width).is_valid) {
      return false;
    }
  }
  return true;
}

void Layer::cut() {
  num_rows_ = Experts::num_rows(a_.num_tokens, a_.pair_begin[a_.num_experts]);
  for (int64_t i = 0; i < a_.num_experts; ++i) {
    int64_t pair = a_.pair_begin[i];
    do {  // also an expert without pairs: its record is waited for
      int64_t num = a_.pair_begin[i + 1] - pair;
      if (num > num_rows_) num = num_rows_;
      parts_.push_back({{i, pair, num, -1}, num > 0 ? Phase::kGateUp : Phase::kDown});
      pair += num;
    } while (pair < a_.pair_begin[i + 1]);
  }
}

// Free intermediate rows for a segment: the first gap between the segments that hold some.
bool Layer::find_rows(Segment *segment) const {
  for (int64_t row = 0; row + segment->num_pairs <= num_rows_;) {
    int64_t next = row;
    for (const Part &part : parts_) {
      const Segment &other = part.segment;
      if (other.row >= 0 && other.row < row + segment->num_pairs &&
          row < other.row + other.num_pairs) {
        next = other.row + other.num_pairs;
      }
    }
    if (next == row) {
      segment->row = row;
      return true;
    }
    row = next;
  }
  return false;
}

// Collects the next round: what has landed and has room for its rows; the first failure, or 0.
int32_t Layer::gather() {
  round_.clear();
  keys_.clear();
  seen_.clear();
  if (store_ != nullptr) pump(store_);
  for (std::size_t i = 0; i < parts_.size(); ++i) {
    Part &part = parts_[i];
    if (part.phase == Phase::kDone) continue;
    const int32_t key = a_.keys[part.segment.expert];
    const int32_t arrival = store_ == nullptr ? EM_READY : arrival_of(store_, key);
    if (arrival < 0 || arrival == EM_ABSENT) {  // absent: it was never asked for
      a_.failed = part.segment.expert;
      return arrival < 0 ? arrival : EM_ERR_ARG;
    }
    const bool is_down = part.phase == Phase::kDown;
    if (arrival != EM_READY && (is_down || arrival != kGateUpReady)) {
      keys_.push_back(key);
      seen_.push_back(arrival);
    } else if (part.phase != Phase::kGateUp || find_rows(&part.segment)) {
      round_.push_back(i);
    }
  }
  return 0;
}

// Whose item it is: a position in round_.
std::size_t Layer::place_of(int64_t item) const {
  std::size_t i = 0;
  while (begin_[i + 1] <= item) ++i;
  return i;
}

// What the round's first halves need before any of their items can run.
void Layer::gather_inputs(const Experts &experts) {
  begin_.assign(1, 0);
  for (const std::size_t i : round_) {
    const Part &part = parts_[i];
    const bool is_first = part.phase == Phase::kGateUp;
    begin_.push_back(begin_.back() + (is_first ? experts.num_gather_items(part.segment) : 0));
  }
  parallel_for(pool_, begin_.back(), [&](int64_t item, int) {
    const std::size_t i = place_of(item);
    experts.gather(parts_[round_[i]].segment, item - begin_[i]);
  });
}

// While the other threads compute: it takes a share of their time from the token.
int32_t Layer::learn_beside() const {
  const int64_t start = monotonic_ns();
  int32_t status = 0;
  try {
    cache_->learn();
  } catch (...) {  // the others go on with the loop, which must end first
    status = -ENOMEM;
  }
  cache_->count_deciding((monotonic_ns() - start) / num_threads(pool_));
  return status;
}

int32_t Layer::compute(const Experts &experts) {
  gather_inputs(experts);
  begin_.assign(1, 0);
  for (const std::size_t i : round_) {
    begin_.push_back(begin_.back() + experts.num_items(parts_[i].segment, parts_[i].phase));
  }
  const bool may_learn = cache_ != nullptr && keys_.empty();  // else there will be time to wait
  int32_t status = 0;
  parallel_for(pool_, begin_.back(), [&](int64_t item, int thread) {
    if (thread == 0 && may_learn && cache_->has_lesson()) status = learn_beside();
    if (thread == 0 && store_ != nullptr) {  // so that queued reads are started
      pump(store_);
      if (between_ != nullptr && item % kItemsBetween == 0) between_->step();
    }
    const std::size_t i = place_of(item);
    const Part &part = parts_[round_[i]];
    if (item + 1 == begin_[i + 1] && i + 1 < round_.size()) {  // kernels fetch ahead within a record
      const Part &next = parts_[round_[i + 1]];
      experts.fetch_start(next.segment, next.phase);
    }
    experts.compute(part.segment, part.phase, item - begin_[i]);
  });
  for (const std::size_t i : round_) {
    Part &part = parts_[i];
    if (part.phase == Phase::kDown) part.segment.row = -1;
    part.phase = experts.following(part.segment, part.phase);
  }
  return status;
}

// Whether a record that is waited for has come further.
bool Layer::has_news() const {
  for (std::size_t i = 0; i < keys_.size(); ++i) {
    if (arrival_of(store_, keys_[i]) != seen_[i]) return true;
  }
  return false;
}

// By all threads, in turns, until there is news or nothing left. What was fetched is read at twice the
// rate of memory.
void Layer::fetch_ahead() {
  if (ahead_ != nullptr) {
    static const int64_t most_bytes = last_cache_bytes() / 2;
    std::vector<Span> spans;
    if (most_bytes > 0) ahead_->collect(&spans);
    pieces_ = pieces_of(spans, most_bytes);
    ahead_ = nullptr;
  }
  if (next_piece_ >= pieces_.size()) return;
  std::atomic<bool> is_over{false};
  parallel_for(pool_, num_threads(pool_), [&](int64_t, int thread) {
    while (!is_over.load(std::memory_order_relaxed)) {
      const std::size_t i = next_piece_.fetch_add(1, std::memory_order_relaxed);
      if (i >= pieces_.size()) return;
      fetch(pieces_[i]);
      if (thread != 0) continue;
      pump(store_);
      if (between_ != nullptr && i % kItemsBetween == 0) between_->step();
      if (has_news()) is_over = true;
    }
  });
}

// Whether a record has come on meanwhile: then it may have been there to compute, and learning
// counts as deciding; else as waiting.
bool Layer::learn_waiting() {
  const int64_t start = monotonic_ns();
  cache_->learn_ahead();
  pump(store_);
  const bool has_come = has_news();
  const int64_t took_ns = monotonic_ns() - start;
  if (has_come) {
    cache_->count_deciding(took_ns);
  } else {
    a_.stall_ns += took_ns;
  }
  return has_come;
}

void Layer::wait() {
  if (cache_ != nullptr && cache_->has_lesson() && learn_waiting()) return;
  if (between_ != nullptr) between_->step();
  const int64_t start = monotonic_ns();
  fetch_ahead();
  wait_any(store_, keys_.data(), seen_.data(), static_cast<int64_t>(keys_.size()));
  const int64_t now = monotonic_ns();
  a_.stall_ns += now - start;
  if (between_ != nullptr) between_->waited(now);
}

int32_t Layer::run() {
  a_.stall_ns = 0;
  a_.failed = -1;
  if (!is_valid()) return EM_ERR_ARG;
  cut();
  const Experts experts(pool_, records_, a_);
  experts.quantize_inputs();
  for (std::size_t num_done = 0; num_done < parts_.size();) {
    const int32_t error = gather();
    if (error != 0) return error;
    if (round_.empty()) {
      wait();
      continue;
    }
    const int32_t status = compute(experts);
    if (status != 0) return status;
    for (const std::size_t i : round_) num_done += parts_[i].phase == Phase::kDone;
  }
  experts.combine();
  if (a_.pair_norm != nullptr) experts.measure();
  return 0;
}

void Layer::drain() const {
  if (store_ == nullptr) return;
  for (int64_t i = 0; i < a_.num_experts; ++i) {
    const int32_t key = a_.keys[i];
    if (key < 0 || key >= num_records_of(store_)) continue;
    if (status_of(store_, key) == EM_READING) em_store_wait(store_, key);
  }
}

}  // namespace
}  // namespace em

int64_t em_moe_workspace_floats(int64_t num_tokens, int64_t num_pairs, int64_t hidden,
                                int64_t row_floats) {
  return em::Experts::workspace_floats(num_tokens, num_pairs, hidden, row_floats);
}

int32_t em_moe_run(em_pool *pool, em_store *store, const em_record *records, em_moe_args *args) {
  const em::Pinned pinned(store == nullptr ? -1 : em::caller_core(pool));
  return em::run_moe(pool, store, records, args, nullptr, nullptr, nullptr);
}

int32_t em::run_moe(em_pool *pool, em_store *store, const em_record *records, em_moe_args *args,
                    Prefetcher *between, Cache *cache, Ahead *ahead) {
  if (store != nullptr) records = em::records_of(store);
  em::Layer layer(pool, store, records, args, between, cache, ahead);
  int32_t status;
  try {
    status = layer.run();
  } catch (...) {  // only vectors allocate here
    status = -ENOMEM;
  }
  if (status != 0) layer.drain();
  return status;
}
