// The expert cache: extents against a map of every page, the cache against what it was told.
#include <algorithm>
#include <csignal>
#include <cstring>
#include <vector>

#include "cache_rig.h"
#include "check.h"
#include "extents.h"
#include "sigint.h"

namespace {

constexpr int64_t kPage = 4096;

// 3 layers of 8 experts, of two sizes.
StoreFolder make() {
  return make_store("cache", 64, 96, {0, 1, 3}, 8,
                    {{4, 32, EM_MODE_SYM}, {8, 32, EM_MODE_SYM}, {4, 32, EM_MODE_SYM}});
}

struct Rig : CacheRig {
  Rig(const StoreFolder &folder, int64_t capacity_bytes, const char *policy = "cycle")
      : CacheRig(folder, 64 * kPage * static_cast<int64_t>(folder.records.size()), capacity_bytes,
                 policy) {}
};

// Accounts are exact, nothing overlaps, and what is whole has the bytes of the file.
void check_places(const Rig &rig, const StoreFolder &folder) {
  const uint64_t *addresses = em_cache_addresses(rig.cache);
  std::vector<std::pair<uint64_t, uint64_t>> spans;
  int64_t resident_bytes = 0;
  for (int32_t key = 0; key < rig.num_keys; ++key) {
    if (addresses[key] == 0) continue;
    const int64_t num_bytes = folder.records[key].num_bytes;
    resident_bytes += num_bytes;
    spans.push_back({addresses[key], addresses[key] + num_bytes});
    if (em_store_wait(rig.store, key) == EM_READY) {
      const void *memory = reinterpret_cast<const void *>(addresses[key]);
      CHECK(std::memcmp(memory, folder.experts[key].record.data(), num_bytes) == 0);
    }
  }
  std::sort(spans.begin(), spans.end());
  uint64_t end = reinterpret_cast<uint64_t>(rig.arena);
  for (const auto &[first, last] : spans) {
    CHECK(first >= end);
    end = last;
  }
  const em_cache_stats now = rig.stats();
  CHECK(end <= reinterpret_cast<uint64_t>(rig.arena) + now.capacity_bytes);
  CHECK_EQUAL(now.resident_bytes, resident_bytes);
  CHECK_EQUAL(now.num_resident, static_cast<int64_t>(spans.size()));
}

int num_calls = 0;
void count_call(int) { ++num_calls; }

}  // namespace

TEST(extents_are_those_of_a_map_of_pages) {
  check::Random random(51);
  for (int round = 0; round < 50; ++round) {
    int64_t num_pages = 64;
    em::Extents extents(num_pages * kPage);
    std::vector<int32_t> owner(num_pages, -1);
    std::vector<em::Placed> blocks;
    const auto free_run = [&](int64_t page) {  // pages of the free run that starts here
      int64_t n = 0;
      while (page + n < num_pages && owner[page + n] < 0) ++n;
      return n;
    };
    for (int32_t step = 0; step < 60; ++step) {
      const int64_t wanted = 1 + random.below(9);
      if (random.below(3) != 0) {
        int64_t best = -1;
        for (int64_t page = 0; page < num_pages; page += std::max<int64_t>(1, free_run(page))) {
          const int64_t n = free_run(page);
          if (n >= wanted && (best < 0 || n < free_run(best))) best = page;
        }
        int64_t offset = extents.allocate(wanted * kPage);
        CHECK_EQUAL(offset, best < 0 ? -1 : best * kPage);
        if (offset < 0) {
          std::vector<em::Move> moves;
          int64_t moved = 0;
          std::sort(blocks.begin(), blocks.end(),
                    [](const em::Placed &a, const em::Placed &b) { return a.offset < b.offset; });
          if (!extents.plan(wanted * kPage, blocks, &moves, &moved)) continue;
          for (const em::Move &move : moves) {
            em::Placed &block = *std::find_if(blocks.begin(), blocks.end(), [&](const auto &each) {
              return each.key == move.key;
            });
            CHECK(!block.is_fixed && move.target < block.offset);
            extents.free(block.offset, block.num_bytes);
            extents.take(move.target, block.num_bytes);
            std::replace(owner.begin(), owner.end(), block.key, -1);
            std::fill_n(owner.begin() + move.target / kPage, block.num_bytes / kPage, block.key);
            block.offset = move.target;
          }
          offset = extents.allocate(wanted * kPage);
          REQUIRE(offset >= 0);
        }
        for (int64_t i = 0; i < wanted; ++i) {
          CHECK_EQUAL(owner[offset / kPage + i], -1);
          owner[offset / kPage + i] = step;
        }
        blocks.push_back({offset, wanted * kPage, step, random.below(4) == 0});
      } else if (!blocks.empty()) {
        const auto gone = blocks.begin() + random.below(static_cast<int64_t>(blocks.size()));
        extents.free(gone->offset, gone->num_bytes);
        std::replace(owner.begin(), owner.end(), gone->key, -1);
        blocks.erase(gone);
      }
      CHECK_EQUAL(extents.free_bytes(), kPage * std::count(owner.begin(), owner.end(), -1));
    }
  }
}

TEST(any_demand_keeps_the_accounts_of_the_cache) {
  const StoreFolder folder = make();
  check::Random random(52);
  for (const char *policy : {"cycle", "lru", "lfu", "fifo"}) {
    Rig rig(folder, 10 * folder.records[1].num_bytes, policy);
    REQUIRE(rig.cache != nullptr);
    std::vector<std::vector<int32_t>> held;
    int64_t num_hits = 0, num_misses = 0;
    for (int step = 0; step < 400; ++step) {
      const int64_t action = random.below(6);
      if (action == 0) {
        CHECK_EQUAL(em_cache_begin_layer(rig.cache, random.below(3), 1, 0, nullptr), 0);
      } else if (action < 4) {
        std::vector<int32_t> keys(1 + random.below(5));
        for (int32_t &key : keys) key = static_cast<int32_t>(random.below(rig.num_keys));
        std::sort(keys.begin(), keys.end());
        keys.erase(std::unique(keys.begin(), keys.end()), keys.end());
        em_cache_demand demand;
        const int64_t n = static_cast<int64_t>(keys.size());
        const int32_t status = em_cache_hint(rig.cache, n, keys.data(), nullptr, &demand);
        CHECK(status == 0 || status == 1);
        if (status == 1) {
          num_hits += demand.num_hits;
          num_misses += demand.num_misses;
          CHECK_EQUAL(demand.num_hits + demand.num_misses, n);
          held.push_back(keys);
        }
      } else if (!held.empty()) {
        if (random.below(2)) rig.wait_all();
        const auto gone = held.begin() + random.below(static_cast<int64_t>(held.size()));
        CHECK_EQUAL(
            em_cache_release(rig.cache, static_cast<int64_t>(gone->size()), gone->data()), 0);
        held.erase(gone);
      }
      for (const std::vector<int32_t> &keys : held) {
        for (const int32_t key : keys) CHECK(em_cache_addresses(rig.cache)[key] != 0);
      }
      if (step % 20 == 0) check_places(rig, folder);
    }
    for (const auto &keys : held) {
      em_cache_release(rig.cache, static_cast<int64_t>(keys.size()), keys.data());
    }
    em_cache_settle(rig.cache);
    check_places(rig, folder);
    int64_t hits = 0, misses = 0;
    for (int place = 0; place < 3; ++place) {
      hits += em_cache_place_stats(rig.cache)[place].num_hits;
      misses += em_cache_place_stats(rig.cache)[place].num_misses;
    }
    CHECK_EQUAL(hits, num_hits);
    CHECK_EQUAL(misses, num_misses);
    const em_cache_stats now = rig.stats();
    CHECK_EQUAL(now.pinned_bytes, 0);
    CHECK_EQUAL(now.num_evictions, num_misses - now.num_resident);
    // Nothing is stuck: everything can go, and come back.
    CHECK_EQUAL(em_cache_resize(rig.cache, 0, 0), 0);
    CHECK_EQUAL(rig.stats().num_resident, 0);
    CHECK_EQUAL(em_cache_resize(rig.cache, rig.arena_bytes / kPage * kPage, 0), 0);
    std::vector<int32_t> all(rig.num_keys), placed(rig.num_keys);
    for (int32_t key = 0; key < rig.num_keys; ++key) all[key] = key;
    CHECK_EQUAL(em_cache_preload(rig.cache, rig.num_keys, all.data(), placed.data()),
                rig.num_keys);
    em_cache_settle(rig.cache);
    check_places(rig, folder);
    CHECK_EQUAL(rig.stats().num_resident, rig.num_keys);
  }
}

TEST(a_damaged_record_loses_its_memory_when_it_is_released) {
  const StoreFolder folder = make();
  std::string bytes = folder.experts_bytes();
  bytes[folder.records[5].offset + 9] ^= 1;
  write_file(folder.experts_path(), bytes);
  Rig rig(folder, 24 * folder.records[1].num_bytes);
  REQUIRE(rig.cache != nullptr);
  const int32_t keys[] = {4, 5, 6};
  for (int times = 1; times <= 2; ++times) {
    CHECK_EQUAL(em_cache_hint(rig.cache, 3, keys, nullptr, nullptr), 1);
    CHECK_EQUAL(em_store_wait(rig.store, 4), EM_READY);
    CHECK_EQUAL(em_store_wait(rig.store, 5), EM_ERR_CRC);
    CHECK_EQUAL(em_store_wait(rig.store, 6), EM_READY);
    CHECK_EQUAL(em_cache_release(rig.cache, 3, keys), 0);
    CHECK_EQUAL(rig.stats().num_resident, 2);
    CHECK_EQUAL(em_cache_addresses(rig.cache)[5], 0u);
    CHECK_EQUAL(em_cache_place_stats(rig.cache)[0].num_misses, 2 + times);
  }
}

TEST(what_a_cache_cannot_do_is_refused) {
  const StoreFolder folder = make();
  Rig rig(folder, 3 * folder.records[1].num_bytes);
  REQUIRE(rig.cache != nullptr);
  const int32_t twice[] = {3, 3}, beyond[] = {24}, many[] = {0, 1, 2, 3, 4, 5, 6, 7};
  CHECK_EQUAL(em_cache_hint(rig.cache, 2, twice, nullptr, nullptr), EM_ERR_ARG);
  CHECK_EQUAL(em_cache_hint(rig.cache, 1, beyond, nullptr, nullptr), EM_ERR_ARG);
  CHECK_EQUAL(em_cache_release(rig.cache, 1, beyond), EM_ERR_ARG);
  CHECK_EQUAL(em_cache_release(rig.cache, 2, many), 0);  // not pinned: nothing happens
  CHECK_EQUAL(em_cache_hint(rig.cache, 8, many, nullptr, nullptr), 0);
  const int32_t route[] = {7, -1}, no_route[] = {-2, 8};
  CHECK_EQUAL(em_cache_begin_layer(rig.cache, 0, 2, 0, nullptr), 0);
  CHECK_EQUAL(em_cache_route(rig.cache, 2, 1, route), 0);
  CHECK_EQUAL(em_cache_route(rig.cache, 1, 1, no_route), EM_ERR_ARG);
  CHECK_EQUAL(em_cache_route(rig.cache, 1, 1, no_route + 1), EM_ERR_ARG);
  CHECK_EQUAL(em_cache_begin_layer(rig.cache, 3, 1, 0, nullptr), EM_ERR_ARG);
  CHECK_EQUAL(em_cache_begin_layer(rig.cache, 0, 1, 1, beyond), EM_ERR_ARG);
  CHECK_EQUAL(em_cache_resize(rig.cache, rig.arena_bytes + kPage, 0), EM_ERR_ARG);
  CHECK_EQUAL(em_cache_hint(rig.cache, 1, many, nullptr, nullptr), 1);
  CHECK_EQUAL(em_cache_resize(rig.cache, 0, 0), EM_ERR_ARG);  // pinned
  CHECK_EQUAL(em_cache_release(rig.cache, 1, many), 0);
  CHECK_EQUAL(em_cache_resize(rig.cache, 0, 0), 0);
  CHECK(Rig(folder, kPage, "best").cache == nullptr);
  CHECK(Rig(folder, 100).cache == nullptr);
  CHECK(Rig(folder, -kPage).cache == nullptr);
}

#if !defined(_WIN32)
TEST(an_interrupt_is_noted_beside_its_handler) {
  std::atomic<int32_t> flag{0};
  void (*before)(int) = std::signal(SIGINT, count_call);
  num_calls = 0;
  {
    const em::SigintWatch watch(&flag);
    std::atomic<int32_t> other{0};
    const em::SigintWatch second(&other);  // one at a time
    std::raise(SIGINT);
    CHECK_EQUAL(flag.load(), 1);
    CHECK_EQUAL(other.load(), 0);
  }
  flag = 0;
  std::raise(SIGINT);
  CHECK_EQUAL(flag.load(), 0);
  CHECK_EQUAL(num_calls, 2);
  std::signal(SIGINT, SIG_IGN);
  {
    const em::SigintWatch watch(&flag);
    std::raise(SIGINT);  // nobody wants it
  }
  CHECK_EQUAL(flag.load(), 0);
  std::signal(SIGINT, before);
}
#endif
