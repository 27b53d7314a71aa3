// A store, an arena and an expert cache over them.
#pragma once
#include <vector>

#include "cache.h"
#include "store_folder.h"

struct CacheRig {
  // One place of the cache for each layer of the store.
  CacheRig(const StoreFolder &folder, int64_t arena_bytes, int64_t capacity_bytes,
           const char *policy, int32_t method = EM_METHOD_AUTO)
      : arena_bytes(arena_bytes),
        arena(em_arena_create(arena_bytes)),
        num_keys(static_cast<int32_t>(folder.records.size())) {
    int32_t error = 0;
    store = em_store_open(folder.experts_path().c_str(), folder.records.data(), num_keys, 4, 0,
                          method, &error);
    std::vector<int64_t> first_keys;
    for (size_t place = 0; place <= folder.layers.size(); ++place) {
      first_keys.push_back(static_cast<int64_t>(place) * folder.num_experts);
    }
    em_cache_config config = {};
    config.arena = arena;
    config.arena_bytes = arena_bytes;
    config.capacity_bytes = capacity_bytes;
    config.first_keys = first_keys.data();
    config.num_places = static_cast<int64_t>(folder.layers.size());
    config.policy = policy;
    config.half_life = 16;
    config.max_moved_per_byte = 4;
    cache = em_cache_create(store, &config);
  }
  ~CacheRig() {  // reads may be under way
    em_cache_destroy(cache);
    em_store_close(store);
    em_arena_destroy(arena, arena_bytes);
  }
  CacheRig(const CacheRig &) = delete;

  em_cache_stats stats() const { return cache->stats(); }
  void wait_all() const {
    for (int32_t key = 0; key < num_keys; ++key) em_store_wait(store, key);
  }

  int64_t arena_bytes;
  void *arena;
  int32_t num_keys;
  em_store *store = nullptr;
  em_cache *cache = nullptr;
};
