// The experts of one layer, with somebody to be called between two pieces of work.
#pragma once
#include "edgemoe_core.h"

namespace em {

class Ahead;
class Cache;
class Prefetcher;

// em_moe_run in a thread that is pinned already. In the caller's thread `between` has its turn now
// and then, and `cache` learns from the layer's demand: while nothing can be computed, else beside
// the first computing that no read delays. While a record is waited for, what is `ahead` is fetched.
// All three may be null.
int32_t run_moe(em_pool *pool, em_store *store, const em_record *records, em_moe_args *args,
                Prefetcher *between, Cache *cache, Ahead *ahead);

}  // namespace em
