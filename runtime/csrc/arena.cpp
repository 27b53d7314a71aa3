#include "edgemoe_core.h"
#include "platform.h"

extern "C" {

void *em_arena_create(int64_t num_bytes) { return em::map_memory(num_bytes); }

void em_arena_destroy(void *arena, int64_t num_bytes) { em::unmap_memory(arena, num_bytes); }
}
