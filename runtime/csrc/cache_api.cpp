// The C face of the expert cache.
#include <cerrno>

#include "cache.h"

namespace {

bool are_keys(const em_cache *cache, int64_t n, const int32_t *keys) {
  if (n < 0 || (n > 0 && keys == nullptr)) return false;
  for (int64_t i = 0; i < n; ++i) {
    if (keys[i] < 0 || keys[i] >= cache->num_keys()) return false;
  }
  return true;
}

template <class Call>
auto without_exceptions(const Call &call) -> decltype(call()) {
  try {
    return call();
  } catch (...) {  // only lists and tables allocate here
    return -ENOMEM;
  }
}

}  // namespace

em_cache *em_cache_create(em_store *store, const em_cache_config *config) {
  if (store == nullptr || config == nullptr) return nullptr;
  try {
    return em::Cache::is_valid(store, *config) ? new em_cache(store, *config) : nullptr;
  } catch (...) {
    return nullptr;
  }
}

void em_cache_destroy(em_cache *cache) { delete cache; }

int32_t em_cache_begin_layer(em_cache *cache, int64_t place, int64_t num_tokens, int64_t n,
                             const int32_t *wanted) {
  if (!cache || place < 0 || place >= cache->num_places() || num_tokens < 0 ||
      !are_keys(cache, n, wanted)) {
    return EM_ERR_ARG;
  }
  return without_exceptions([&]() -> int32_t {
    cache->drop_uncertain_guesses();  // they are those of em_decode
    cache->begin_layer(place, num_tokens, n, wanted);
    return 0;
  });
}

int32_t em_cache_route(em_cache *cache, int64_t num_tokens, int64_t top_k, const int32_t *experts) {
  if (!cache || num_tokens < 0 || top_k < 0 || (num_tokens * top_k > 0 && !experts)) {
    return EM_ERR_ARG;
  }
  return without_exceptions([&] { return cache->route(num_tokens, top_k, experts); });
}

int32_t em_cache_hint(em_cache *cache, int64_t n, const int32_t *keys, const double *counts,
                      em_cache_demand *demand) {
  if (!cache || n < 0 || (n > 0 && keys == nullptr)) return EM_ERR_ARG;
  return without_exceptions([&] { return cache->hint(n, keys, counts, demand); });
}

int64_t em_cache_foresee(em_cache *cache, int64_t n, const int32_t *keys, int64_t most_bytes) {
  if (!cache || !are_keys(cache, n, keys)) return EM_ERR_ARG;
  return without_exceptions([&]() -> int64_t { return cache->foresee(n, keys, most_bytes); });
}

int32_t em_cache_release(em_cache *cache, int64_t n, const int32_t *keys) {
  if (!cache || !are_keys(cache, n, keys)) return EM_ERR_ARG;
  return without_exceptions([&]() -> int32_t {
    cache->release(n, keys);
    return 0;
  });
}

int32_t em_cache_seed(em_cache *cache, int64_t n, const int32_t *keys, const double *counts) {
  if (!cache || !are_keys(cache, n, keys) || (n > 0 && counts == nullptr)) return EM_ERR_ARG;
  cache->seed(n, keys, counts);
  return 0;
}

int64_t em_cache_preload(em_cache *cache, int64_t n, const int32_t *keys, int32_t *placed) {
  if (!cache || !are_keys(cache, n, keys) || (n > 0 && placed == nullptr)) return EM_ERR_ARG;
  return without_exceptions([&]() -> int64_t { return cache->preload(n, keys, placed); });
}

void em_cache_settle(em_cache *cache) {
  cache->drop_all_guesses();
  cache->settle(true);
}

int32_t em_cache_resize(em_cache *cache, int64_t capacity_bytes, int32_t keeps_memory) {
  if (!cache || capacity_bytes < 0 || capacity_bytes > cache->max_capacity_bytes() ||
      capacity_bytes % 4096) {
    return EM_ERR_ARG;
  }
  return without_exceptions([&]() -> int32_t {
    return cache->resize(capacity_bytes, keeps_memory != 0) ? 0 : EM_ERR_ARG;
  });
}

const uint64_t *em_cache_addresses(const em_cache *cache) { return cache->addresses(); }

em_place_stats *em_cache_place_stats(em_cache *cache) { return cache->place_stats(); }

void em_cache_get_stats(const em_cache *cache, em_cache_stats *stats) { *stats = cache->stats(); }
