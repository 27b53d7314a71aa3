// The experts of one layer, with somebody to be called between two pieces of work.
#pragma once
#include "edgemoe_core.h"

namespace em {

class Prefetcher;

// em_moe_run in a thread that is pinned already; `between` (may be null) has its turn now and then, in
// the caller's thread.
int32_t run_moe(em_pool *pool, em_store *store, const em_record *records, em_moe_args *args,
                Prefetcher *between);

}  // namespace em
