// Guesses in the expert cache: whatever is guessed, demanded and dropped, accounts are exact and what
// is whole has the bytes of the file; with io_uring and with reader threads.
#include <algorithm>
#include <cstring>
#include <random>
#include <vector>

#include "cache.h"
#include "check.h"
#include "gate.h"
#include "predict.h"
#include "store_folder.h"

namespace {

constexpr int64_t kPage = 4096;
constexpr int32_t kExperts = 8, kPlaces = 3, kTopK = 2;

void run(const StoreFolder &folder, int32_t method, int64_t num_records, uint32_t seed) {
  const int32_t num_keys = static_cast<int32_t>(folder.records.size());
  int64_t largest = 0;
  for (const em_record &record : folder.records) largest = std::max(largest, record.num_bytes);
  const int64_t arena_bytes = num_records * largest;
  void *arena = em_arena_create(arena_bytes);
  int32_t error = 0;
  em_store *store = em_store_open(folder.experts_path().c_str(), folder.records.data(), num_keys, 4,
                                  0, method, &error);
  const int64_t first_keys[] = {0, 8, 16, 24};
  em_cache_config config = {};
  config.arena = arena;
  config.arena_bytes = config.capacity_bytes = arena_bytes;
  config.first_keys = first_keys;
  config.num_places = kPlaces;
  config.policy = "cycle";
  config.half_life = 16;
  config.max_moved_per_byte = 4;
  em_cache *cache = em_cache_create(store, &config);
  CHECK(cache != nullptr);
  std::mt19937 random(seed);
  int64_t num_used = 0;
  for (int step = 0; step < 600; ++step) {
    const int32_t place = step % kPlaces, first = place * kExperts;
    for (int i = 0; i < 3; ++i) {  // for this place and for the one after it
      const int32_t key = static_cast<int32_t>(first + random() % (2 * kExperts)) % num_keys;
      const bool was_absent = cache->is_absent(key);
      CHECK(!cache->guess(key) || was_absent);
      if (random() % 4 == 0) em_store_pump(store);
    }
    const int32_t one = static_cast<int32_t>(random() % kExperts);
    const int32_t other = static_cast<int32_t>((one + 1 + random() % (kExperts - 1)) % kExperts);
    const int32_t keys[kTopK] = {first + std::min(one, other), first + std::max(one, other)};
    cache->drop_guesses(first, first + kExperts, keys, kTopK);
    cache->begin_layer(place, 1);
    em_cache_demand demand = {};
    CHECK(cache->hint(kTopK, keys, nullptr, &demand) == 1);
    CHECK(demand.num_hits + demand.num_misses + demand.num_guessed == kTopK);
    num_used += demand.num_guessed;
    for (const int32_t key : keys) {
      CHECK(em_store_wait(store, key) == EM_READY);
      CHECK(std::memcmp(cache->data(key), folder.experts[key].record.data(),
                        static_cast<size_t>(folder.records[key].num_bytes)) == 0);
    }
    cache->release(kTopK, keys);
    if (step % 97 == 96) CHECK(cache->resize(arena_bytes - (step % 2) * largest));
  }
  const em_prefetch_stats &counts = cache->guess_counts();
  CHECK(counts.num_in_time + counts.num_late == num_used);
  CHECK(num_used > 0 && counts.num_dropped + counts.wasted_bytes > 0 && counts.num_failed == 0);
  cache->drop_all_guesses();
  cache->settle(true);
  CHECK(cache->num_reading_guesses() == 0);
  const em_cache_stats stats = cache->stats();
  CHECK(stats.pinned_bytes == 0 && stats.resident_bytes <= stats.capacity_bytes);
  for (int32_t key = 0; key < 6; ++key) cache->guess(key);  // closed while they are being read
  em_store_close(store);
  em_cache_destroy(cache);
  em_arena_destroy(arena, arena_bytes);
}

}  // namespace

TEST(guesses_leave_accounts_and_bytes_right) {
  const StoreFolder folder = make_store("guess", 64, 96, {0, 1, 3}, kExperts,
                                        {{4, 32, EM_MODE_SYM}, {8, 32, EM_MODE_SYM}});
  for (const int32_t method : {EM_METHOD_AUTO, EM_METHOD_THREADS}) {
    for (const int64_t num_records : {3, 7, 20}) run(folder, method, num_records, 11);
  }
}

TEST(a_gate_opens_for_what_pays) {
  em::Gate gate(2, 4);
  const double kRecord = 4 << 20;
  CHECK(!gate.is_open(1.0, kRecord, 0, 1e6));  // nothing was measured yet
  for (int i = 0; i < 100; ++i) {
    gate.saw_reading(1 << 20, 500 * 1000);  // 2 GB/s
    gate.saw_layer(1, 1000 * 1000);
    gate.saw_interval(1, 1500 * 1000);
    gate.score(1, 0, 0, true);
    gate.score(1, 0, 3, i % 20 == 0);
  }
  CHECK(gate.interval_ns(1) == 1500 * 1000);
  CHECK(gate.odds(1, 0, 0) > 0.9 && gate.odds(1, 0, 3) < 0.15);
  CHECK(gate.odds(1, 1, 0) > 0.8);  // as at other places, until it is known better
  CHECK(gate.odds(2, 0, 0) < 0.5);  // another depth is another thing
  CHECK(gate.is_open(gate.odds(1, 0, 0), kRecord, 0, 1.5e6));
  CHECK(!gate.is_open(gate.odds(1, 0, 3), kRecord, 0, 1.5e6));
  CHECK(!gate.is_open(1.0, kRecord, 0, 0));                  // the router is about to speak
  CHECK(!gate.is_open(1.0, kRecord, 8 * kRecord, 1.5e6));    // others are read until then
  CHECK(!gate.is_open(1.0, 32 << 10, 0, 1.5e6));  // 16 us: read in less time than a guess takes
  em::Gate idle(1, 4);
  for (int i = 0; i < 100; ++i) {
    idle.saw_reading(1 << 20, 500 * 1000);
    idle.saw_layer(1, 0);  // never waited for: nothing to gain
  }
  CHECK(!idle.is_open(0.9, kRecord, 0, 1.5e6));
}

TEST(the_largest_come_first) {
  const float scores[] = {0.1f, 0.5f, 0.3f, 0.5f, 0.0f};
  int32_t found[5];
  em::rank_largest(scores, 5, 3, found);
  CHECK(found[0] == 1 && found[1] == 3 && found[2] == 2);
  em::rank_largest(scores, 5, 5, found);
  CHECK(found[3] == 0 && found[4] == 4);
}
