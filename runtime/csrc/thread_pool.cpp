#include "thread_pool.h"

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

#include "edgemoe_core.h"
#include "platform.h"

#if defined(__x86_64__) || defined(__i386__) || defined(_M_X64)
#include <immintrin.h>
#endif

namespace {

// Long enough to bridge the gap between two loops of one layer, short enough not to matter.
constexpr int64_t kSpinNs = 50'000;
constexpr int kMaxThreads = 1024;

void pause_core() {
#if defined(__x86_64__) || defined(__i386__) || defined(_M_X64)
  _mm_pause();
#elif defined(__aarch64__) && defined(__GNUC__)
  __asm__ volatile("yield");
#endif
}

// Items begin .. end - 1 that are still to be taken, both in one word. No value comes back: an item
// that was taken is never in a run again.
struct alignas(64) Run {
  std::atomic<uint64_t> word{0};

  static uint64_t pack(uint64_t begin, uint64_t end) { return begin << 32 | end; }
  static int64_t begin_of(uint64_t word) { return static_cast<int64_t>(word >> 32); }
  static int64_t end_of(uint64_t word) { return static_cast<int64_t>(word & 0xffffffffu); }

  void set(int64_t begin, int64_t end) { word.store(pack(begin, end), std::memory_order_relaxed); }
  int64_t num_left() const {
    const uint64_t seen = word.load(std::memory_order_relaxed);
    return end_of(seen) - begin_of(seen);
  }
  int64_t take_first() {  // -1: none left
    uint64_t seen = word.load(std::memory_order_relaxed);
    do {
      if (begin_of(seen) >= end_of(seen)) return -1;
    } while (!word.compare_exchange_weak(seen, seen + pack(1, 0), std::memory_order_relaxed));
    return begin_of(seen);
  }
  bool move_last_half(Run *empty) {
    uint64_t seen = word.load(std::memory_order_relaxed);
    const int64_t begin = begin_of(seen), end = end_of(seen);
    if (begin >= end) return false;
    const int64_t middle = begin + (end - begin) / 2;
    if (!word.compare_exchange_strong(seen, pack(begin, middle), std::memory_order_relaxed)) {
      return false;
    }
    empty->set(middle, end);
    return true;
  }
};

constexpr int64_t kMaxItems = int64_t{1} << 31;  // of one loop; more are several loops

}  // namespace

// A loop is announced in `state`: its number, whether it may still be joined, and how many workers
// are inside. A worker that wakes late finds the loop closed and does not touch it; so the caller
// never waits for a worker that has not started.
struct em_pool {
  static constexpr uint64_t kOpen = uint64_t{1} << 31;
  static constexpr uint64_t kInside = kOpen - 1;
  static constexpr int kNumberShift = 32;

  std::vector<std::thread> workers;
  int caller_core = -1;
  int64_t spin_ns = 0;

  std::mutex one_call;  // callers take turns
  alignas(64) std::atomic<uint64_t> state{0};
  std::vector<Run> runs;  // by thread: the items it takes from the front, others from the back
  int64_t first_item = 0;
  em::LoopBody body = nullptr;
  void *context = nullptr;

  alignas(64) std::mutex mutex;  // of the two conditions
  std::condition_variable announced, left;
  std::atomic<int> num_sleeping{0};
  std::atomic<bool> caller_sleeps{false}, stop{false};

  // A thread's items follow each other in memory, which the processor's prefetch needs: of weights
  // read by two threads, items dealt one by one reach less of the memory's rate.
  void run_items(int thread) {
    Run &own = runs[thread];
    do {
      for (int64_t item; (item = own.take_first()) >= 0;) body(context, first_item + item, thread);
    } while (steal(&own));
  }

  // Moves the later half of the longest other run into an empty one; false where all are empty.
  bool steal(Run *own) {
    for (;;) {
      Run *longest = nullptr;
      int64_t most = 0;
      for (Run &run : runs) {
        const int64_t left = run.num_left();
        if (left > most) longest = &run, most = left;
      }
      if (longest == nullptr) return false;
      if (longest->move_last_half(own)) return true;
    }
  }

  void deal(int64_t num_items) {
    const int64_t num = static_cast<int64_t>(runs.size());
    for (int64_t i = 0; i < num; ++i) runs[i].set(i * num_items / num, (i + 1) * num_items / num);
  }

  // Enters the announced loop unless it is closed or was already run by this worker.
  bool join(uint64_t *last_number) {
    uint64_t seen = state.load(std::memory_order_acquire);
    while ((seen & kOpen) != 0 && seen >> kNumberShift != *last_number) {
      if (state.compare_exchange_weak(seen, seen + 1, std::memory_order_acq_rel)) {
        *last_number = seen >> kNumberShift;
        return true;
      }
    }
    return false;
  }

  void leave() {
    const uint64_t before = state.fetch_sub(1);
    if ((before & kInside) == 1 && (before & kOpen) == 0 && caller_sleeps.load()) {
      const std::lock_guard<std::mutex> lock(mutex);
      left.notify_one();
    }
  }

  bool has_news(uint64_t last_number) const {
    const uint64_t seen = state.load();
    return stop.load() || ((seen & kOpen) != 0 && seen >> kNumberShift != last_number);
  }

  void work(int thread, int core) {
    em::block_signals();
    if (core >= 0) em::pin_thread(core);
    uint64_t last_number = 0;
    while (!stop.load()) {
      if (join(&last_number)) {
        run_items(thread);
        leave();
        continue;
      }
      const int64_t end = em::monotonic_ns() + spin_ns;
      while (!has_news(last_number) && em::monotonic_ns() < end) {
        for (int i = 0; i < 16 && !has_news(last_number); ++i) pause_core();
      }
      if (has_news(last_number)) continue;
      std::unique_lock<std::mutex> lock(mutex);
      num_sleeping.fetch_add(1);
      announced.wait(lock, [&] { return has_news(last_number); });
      num_sleeping.fetch_sub(1);
    }
  }

  void wake_sleepers() {
    if (num_sleeping.load() == 0) return;
    { const std::lock_guard<std::mutex> lock(mutex); }  // none is between its check and its sleep
    announced.notify_all();
  }

  void wait_until_empty() {
    const int64_t end = em::monotonic_ns() + spin_ns;
    while ((state.load(std::memory_order_acquire) & kInside) != 0) {
      pause_core();
      if (em::monotonic_ns() < end) continue;
      std::unique_lock<std::mutex> lock(mutex);
      caller_sleeps.store(true);
      left.wait(lock, [&] { return (state.load() & kInside) == 0; });
      caller_sleeps.store(false);
    }
  }
};

namespace em {

int num_threads(const em_pool *pool) {
  return pool == nullptr ? 1 : static_cast<int>(pool->workers.size()) + 1;
}

int caller_core(const em_pool *pool) { return pool == nullptr ? -1 : pool->caller_core; }

void parallel_for_raw(em_pool *pool, int64_t num_items, LoopBody body, void *context) {
  if (pool == nullptr || pool->workers.empty() || num_items <= 1) {
    for (int64_t item = 0; item < num_items; ++item) body(context, item, 0);
    return;
  }
  const std::lock_guard<std::mutex> turn(pool->one_call);
  pool->body = body;
  pool->context = context;
  for (int64_t first = 0; first < num_items; first += kMaxItems) {
    const int64_t left = num_items - first;
    pool->first_item = first;
    pool->deal(left < kMaxItems ? left : kMaxItems);
    const uint64_t number = (pool->state.load() >> em_pool::kNumberShift) + 1;
    pool->state.store(number << em_pool::kNumberShift | em_pool::kOpen);
    pool->wake_sleepers();
    pool->run_items(0);
    pool->state.fetch_and(~em_pool::kOpen);
    pool->wait_until_empty();
  }
}

}  // namespace em

em_pool *em_pool_create(int32_t num_threads) {
  if (num_threads < 1 || num_threads > kMaxThreads) return nullptr;
  em_pool *pool = nullptr;
  try {
    pool = new em_pool;
    const std::vector<int> cores = em::allowed_cores();
    // Pinned, because a worker that sleeps while the caller waits for the disk is otherwise often
    // woken on the caller's core. The first core is left to the caller. With more threads than
    // cores, spinning would only take time from the others.
    const bool fits = static_cast<size_t>(num_threads) <= cores.size();
    pool->spin_ns = fits || cores.empty() ? kSpinNs : 0;
    if (fits && num_threads > 1) pool->caller_core = cores[0];
    pool->runs = std::vector<Run>(num_threads);
    pool->workers.reserve(num_threads - 1);
    for (int thread = 1; thread < num_threads; ++thread) {
      pool->workers.emplace_back(&em_pool::work, pool, thread, fits ? cores[thread] : -1);
    }
    return pool;
  } catch (...) {
    em_pool_destroy(pool);
    return nullptr;
  }
}

void em_pool_destroy(em_pool *pool) {
  if (pool == nullptr) return;
  {
    const std::lock_guard<std::mutex> lock(pool->mutex);
    pool->stop.store(true);
  }
  pool->announced.notify_all();
  for (std::thread &worker : pool->workers) worker.join();
  delete pool;
}
