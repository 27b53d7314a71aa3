// Memory for records, and how fast it can be read.
#include <atomic>

#include "edgemoe_core.h"
#include "kernels.h"
#include "platform.h"
#include "thread_pool.h"

void *em_arena_create(int64_t num_bytes) { return em::map_memory(num_bytes); }

void em_arena_destroy(void *arena, int64_t num_bytes) { em::unmap_memory(arena, num_bytes); }

uint64_t em_memory_sweep(em_pool *pool, const void *data, int64_t num_bytes) {
  constexpr int64_t kItemLines = 4096;  // 256 KiB: taking an item costs nothing beside it
  const int64_t num_lines = num_bytes / em::kLineBytes;
  const em::Kernels &level = em::kernels();
  std::atomic<uint64_t> all{0};
  em::parallel_for(pool, (num_lines + kItemLines - 1) / kItemLines, [&](int64_t item, int) {
    const int64_t first = item * kItemLines;
    const int64_t num = first + kItemLines < num_lines ? kItemLines : num_lines - first;
    all |= level.sweep(static_cast<const uint8_t *>(data) + first * em::kLineBytes, num);
  });
  return all;
}
