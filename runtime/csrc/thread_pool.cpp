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

}  // namespace

// A loop is announced in `state`: its number, whether it may still be joined, and how many workers
// are inside. A worker that wakes late finds the loop closed and does not touch it; so the caller
// never waits for a worker that has not started.
struct em_pool {
  static constexpr uint64_t kOpen = uint64_t{1} << 31;
  static constexpr uint64_t kInside = kOpen - 1;
  static constexpr int kNumberShift = 32;

  std::vector<std::thread> workers;
  int64_t spin_ns = 0;

  std::mutex one_call;  // callers take turns
  alignas(64) std::atomic<uint64_t> state{0};
  alignas(64) std::atomic<int64_t> next_item{0};
  int64_t num_items = 0;
  em::LoopBody body = nullptr;
  void *context = nullptr;

  alignas(64) std::mutex mutex;  // of the two conditions
  std::condition_variable announced, left;
  std::atomic<int> num_sleeping{0};
  std::atomic<bool> caller_sleeps{false}, stop{false};

  void run_items(int thread) {
    for (;;) {
      const int64_t item = next_item.fetch_add(1, std::memory_order_relaxed);
      if (item >= num_items) return;
      body(context, item, thread);
    }
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

void parallel_for_raw(em_pool *pool, int64_t num_items, LoopBody body, void *context) {
  if (pool == nullptr || pool->workers.empty() || num_items <= 1) {
    for (int64_t item = 0; item < num_items; ++item) body(context, item, 0);
    return;
  }
  const std::lock_guard<std::mutex> turn(pool->one_call);
  pool->num_items = num_items;
  pool->body = body;
  pool->context = context;
  pool->next_item.store(0, std::memory_order_relaxed);
  const uint64_t number = (pool->state.load() >> em_pool::kNumberShift) + 1;
  pool->state.store(number << em_pool::kNumberShift | em_pool::kOpen);
  pool->wake_sleepers();
  pool->run_items(0);
  pool->state.fetch_and(~em_pool::kOpen);
  pool->wait_until_empty();
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
