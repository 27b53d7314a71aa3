// Every item of a loop runs once, whatever the pool, the number of loops and of callers.
#include <atomic>
#include <chrono>
#include <memory>
#include <thread>

#include "check.h"
#include "edgemoe_core.h"
#include "thread_pool.h"

namespace {

// Runs a loop; counts how often each item ran and that thread numbers are in range.
void loop(em_pool *pool, int64_t num_items) {
  std::unique_ptr<std::atomic<int>[]> times(new std::atomic<int>[num_items + 1]());
  const int limit = em::num_threads(pool);
  std::atomic<int> bad{0};
  em::parallel_for(pool, num_items, [&](int64_t item, int thread) {
    if (item < 0 || item >= num_items || thread < 0 || thread >= limit) ++bad;
    else ++times[item];
  });
  CHECK_EQUAL(bad.load(), 0);
  for (int64_t i = 0; i < num_items; ++i) CHECK_EQUAL(times[i].load(), 1);
}

}  // namespace

TEST(loops_run_every_item_once) {
  for (const int32_t num_threads : {0, 1, 2, 3, 8}) {
    em_pool *pool = num_threads == 0 ? nullptr : em_pool_create(num_threads);
    CHECK_EQUAL(em::num_threads(pool), num_threads == 0 ? 1 : num_threads);
    for (const int64_t num_items : {0, 1, 2, 3, 7, 100, 1001}) loop(pool, num_items);
    em_pool_destroy(pool);
  }
}

TEST(many_loops_follow_each_other) {
  em_pool *pool = em_pool_create(3);
  std::atomic<int64_t> sum{0};
  constexpr int kLoops = 3000;
  for (int i = 0; i < kLoops; ++i) {
    em::parallel_for(pool, i % 9, [&](int64_t item, int) { sum += item + 1; });
    // Sometimes long enough for the workers to fall asleep.
    if (i % 500 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  int64_t expected = 0;
  for (int i = 0; i < kLoops; ++i) expected += (i % 9) * (i % 9 + 1) / 2;
  CHECK_EQUAL(sum.load(), expected);
  em_pool_destroy(pool);
}

TEST(a_loop_sees_what_its_caller_wrote_and_the_other_way_round) {
  em_pool *pool = em_pool_create(2);
  std::vector<int64_t> values(512);  // plain memory: the pool itself must order it
  for (int64_t round = 0; round < 300; ++round) {
    for (size_t i = 0; i < values.size(); ++i) values[i] = round;
    em::parallel_for(pool, 512, [&](int64_t item, int) { values[item] += item; });
    for (size_t i = 0; i < values.size(); ++i) CHECK(values[i] == round + static_cast<int64_t>(i));
  }
  em_pool_destroy(pool);
}

TEST(two_callers_take_turns) {
  em_pool *pool = em_pool_create(2);
  std::thread other([&] {
    for (int i = 0; i < 200; ++i) loop(pool, 50);
  });
  for (int i = 0; i < 200; ++i) loop(pool, 37);
  other.join();
  em_pool_destroy(pool);
}

TEST(a_loop_inside_a_loop_uses_another_pool_or_none) {
  em_pool *outer = em_pool_create(2), *inner = em_pool_create(2);
  std::atomic<int64_t> sum{0};
  em::parallel_for(outer, 20, [&](int64_t, int) {
    em::parallel_for(inner, 10, [&](int64_t item, int) { sum += item; });
    em::parallel_for(nullptr, 10, [&](int64_t item, int) { sum += item; });
  });
  CHECK_EQUAL(sum.load(), 20 * 90);
  em_pool_destroy(inner);
  em_pool_destroy(outer);
}

TEST(impossible_pools_are_refused) {
  for (const int32_t num_threads : {0, -1, INT32_MIN, INT32_MAX}) {
    CHECK(em_pool_create(num_threads) == nullptr);
  }
  em_pool_destroy(nullptr);
}
