// A pool that runs one loop at a time; the caller is one of its threads.
#pragma once
#include <cstdint>

struct em_pool;

namespace em {

int num_threads(const em_pool *pool);  // 1 for a null pool
// The core that the workers leave to the caller, or -1. A call that waits for reads keeps its thread
// there (`Pinned`): woken by the drive, it would often run on a worker's core, and compute at half
// speed. Decode with 75 % of the experts in memory: 64 ms a token, 48 so.
int caller_core(const em_pool *pool);

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
