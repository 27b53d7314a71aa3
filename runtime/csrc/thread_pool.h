// A pool that runs one loop at a time; the caller is one of its threads.
#pragma once
#include <cstdint>

struct em_pool;

namespace em {

int num_threads(const em_pool *pool);  // 1 for a null pool

using LoopBody = void (*)(void *context, int64_t item, int thread);
// Run body for every item in 0..num_items-1; returns when all are done. Each thread begins with a
// run of consecutive items, in order, and then takes over parts of the others' runs.
// `thread` is 0..num_threads-1 (for per-thread scratch). A null pool runs everything in the caller.
void parallel_for_raw(em_pool *pool, int64_t num_items, LoopBody body, void *context);

template <class Body>
void parallel_for(em_pool *pool, int64_t num_items, const Body &body) {
  parallel_for_raw(
      pool, num_items,
      [](void *context, int64_t item, int thread) {
        (*static_cast<const Body *>(context))(item, thread);
      },
      const_cast<Body *>(&body));
}

}  // namespace em
