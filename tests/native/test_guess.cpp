// Guesses in the expert cache: whatever is guessed, demanded and dropped, accounts are exact and what
// is whole has the bytes of the file; with io_uring and with reader threads.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>
#include <utility>
#include <vector>

#include "cache_rig.h"
#include "check.h"
#include "gate.h"
#include "predict.h"
#include "shift.h"
#include "trial.h"

namespace {

constexpr int64_t kPage = 4096;
constexpr int32_t kExperts = 8, kPlaces = 3, kTopK = 2;

// Two experts of a place, ascending.
std::pair<int32_t, int32_t> pick_two(std::mt19937 &random, int32_t place) {
  const int32_t one = static_cast<int32_t>(random() % kExperts);
  const int32_t other = static_cast<int32_t>((one + 1 + random() % (kExperts - 1)) % kExperts);
  return {place * kExperts + std::min(one, other), place * kExperts + std::max(one, other)};
}

void run(const StoreFolder &folder, int32_t method, int64_t num_records, uint32_t seed) {
  const int64_t largest = folder.max_record_bytes(), arena_bytes = num_records * largest;
  const CacheRig rig(folder, arena_bytes, arena_bytes, "cycle", method);
  em_cache *const cache = rig.cache;
  CHECK(cache != nullptr);
  std::mt19937 random(seed);
  int64_t num_used = 0;
  for (int step = 0; step < 600; ++step) {
    const int32_t place = step % kPlaces, first = place * kExperts;
    for (int i = 0; i < 3; ++i) {  // for this place and for the one after it
      const int32_t key = static_cast<int32_t>(first + random() % (2 * kExperts)) % rig.num_keys;
      const bool was_absent = cache->is_absent(key);
      CHECK(!cache->guess(key) || was_absent);
      if (random() % 4 == 0) em_store_pump(rig.store);
    }
    const auto [one, other] = pick_two(random, place);
    const int32_t keys[kTopK] = {one, other};
    cache->drop_guesses(first, first + kExperts, keys, kTopK);
    cache->begin_layer(place, 1);
    em_cache_demand demand = {};
    CHECK(cache->hint(kTopK, keys, nullptr, &demand) == 1);
    CHECK(demand.num_hits + demand.num_misses + demand.num_guessed == kTopK);
    num_used += demand.num_guessed;
    for (const int32_t key : keys) {
      CHECK(em_store_wait(rig.store, key) == EM_READY);
      CHECK(std::memcmp(cache->data(key), folder.experts[key].record.data(),
                        static_cast<size_t>(folder.records[key].num_bytes)) == 0);
    }
    cache->release(kTopK, keys);
    if (step % 97 == 96) CHECK(cache->resize(arena_bytes - (step % 2) * largest, step % 3 == 0));
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
}

// All places but the last are known before the first of a round, as those of hash-routed layers.
void run_foreseen(const StoreFolder &folder, int32_t method, int64_t num_records, uint32_t seed) {
  const int64_t largest = folder.max_record_bytes(), arena_bytes = num_records * largest;
  const CacheRig rig(folder, arena_bytes, arena_bytes, "forecast", method);
  em_cache *const cache = rig.cache;
  CHECK(cache != nullptr);
  std::mt19937 random(seed);
  int64_t num_used = 0, num_misses = 0, num_early = 0;
  for (int round = 0; round < 200; ++round) {
    std::vector<int32_t> keys;
    for (int32_t place = 0; place < kPlaces; ++place) {
      const auto [one, other] = pick_two(random, place);
      keys.insert(keys.end(), {one, other});
    }
    const int64_t known = 2 * kTopK;
    int64_t num = 0;
    const auto foresee = [&] {
      const em_cache_stats now = cache->stats();
      num += em_cache_foresee(cache, known - num, keys.data() + num,
                              now.capacity_bytes - now.pinned_bytes);
      CHECK(num <= known);
    };
    foresee();
    const bool is_early = num == known;  // else records, which differ in size, lie too badly
    num_early += is_early;
    for (int32_t place = 0; place < kPlaces; ++place) {
      const int32_t *own = keys.data() + place * kTopK;
      cache->begin_layer(place, 1);
      em_cache_demand demand = {};
      CHECK(cache->hint(kTopK, own, nullptr, &demand) == 1);
      CHECK(demand.num_hits + demand.num_misses + demand.num_guessed == kTopK);
      num_used += demand.num_guessed;
      if (is_early && place < kPlaces - 1) CHECK(demand.num_misses == 0);
      num_misses += demand.num_misses;
      if (num < known && place == 0) foresee();
      for (int i = 0; i < kTopK; ++i) {
        CHECK(em_store_wait(rig.store, own[i]) == EM_READY);
        CHECK(std::memcmp(cache->data(own[i]), folder.experts[own[i]].record.data(),
                          static_cast<size_t>(folder.records[own[i]].num_bytes)) == 0);
      }
      cache->release(kTopK, own);
      if (random() % 17 == 0) {  // a token that ends here
        CHECK(em_cache_foresee(cache, 0, nullptr, 0) == 0);
        em_cache_settle(cache);  // until when nobody can tell what is still there
        break;
      }
    }
    if (round % 37 == 36) CHECK(cache->resize(arena_bytes - (round % 2) * largest, round % 2 == 0));
  }
  const em_cache_stats stats = cache->stats();
  CHECK(num_used > 0 && num_used <= stats.num_foreseen && num_misses > 0);
  CHECK(num_records <= 2 * kPlaces * kTopK || num_early > 180);
  CHECK(stats.num_foreseen_in_time <= num_used && stats.pinned_bytes == 0);
  CHECK(cache->guess_counts().num_guesses == 0 && cache->guess_counts().wasted_bytes == 0);
  const int32_t all[] = {0, 9, 3};
  CHECK(em_cache_foresee(cache, 3, all, arena_bytes) >= 0);  // closed while they are being read
}

}  // namespace

TEST(what_is_known_is_there_when_it_is_demanded) {
  const StoreFolder folder = make_store("foresee", 64, 96, {0, 1, 3}, kExperts,
                                        {{4, 32, EM_MODE_SYM}, {8, 32, EM_MODE_SYM}});
  for (const int32_t method : {EM_METHOD_AUTO, EM_METHOD_THREADS}) {
    for (const int64_t num_records : {4, 5, 9, 14}) run_foreseen(folder, method, num_records, 5);
  }
}

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
  CHECK(gate.worth_ns(1.0, kRecord, 0, 1e6) <= 0);  // nothing was measured yet
  for (int i = 0; i < 100; ++i) {
    gate.saw_reading(1 << 20, 500 * 1000);  // 2 GB/s
    gate.saw_layer(1, 1000 * 1000);
    gate.saw_interval(1, 1500 * 1000, false);
    gate.score(1, 0, 2, true);
    gate.score(1, 0, 0, i % 20 == 0);
  }
  CHECK(gate.interval_ns(1) == 1500 * 1000);
  CHECK(gate.tail_ns(1) == 1500 * 1000);  // no layer before it has waited yet
  gate.saw_interval(1, 200 * 1000, true);
  CHECK(gate.interval_ns(1) == 1500 * 1000 && gate.tail_ns(1) == 200 * 1000);
  CHECK(gate.request_bytes() == 204 * kPage);  // what the drive reads in 400 us
  CHECK(gate.odds(1, 0, 2) > 0.9 && gate.odds(1, 0, 0) < 0.15);
  CHECK(gate.odds(1, 1, 2) > 0.8);  // as at other places, until it is known better
  CHECK(gate.odds(1, 0, 3) > 0.8 && gate.odds(1, 0, 1) < 0.15);  // never seen: as the grade below
  CHECK(gate.odds(2, 0, 2) < 0.5);  // another depth is another thing
  CHECK(gate.worth_ns(gate.odds(1, 0, 2), kRecord, 0, 1.5e6) > 0);
  CHECK(gate.worth_ns(gate.odds(1, 0, 0), kRecord, 0, 1.5e6) <= 0);
  CHECK(gate.worth_ns(1.0, kRecord, 0, 0) <= 0);                // the router is about to speak
  CHECK(gate.worth_ns(1.0, kRecord, 8 * kRecord, 1.5e6) <= 0);  // others are read until then
  // What a wrong one costs depends on the drive: the same odds, and less time to gain.
  CHECK(gate.worth_ns(0.7, kRecord, 0, 0.6e6) > 0 && gate.worth_ns(0.7, kRecord, 0, 0.05e6) <= 0);
  CHECK(gate.worth_ns(0.8, 16 << 10, 0, 1.5e6) <= 0);  // 8 us: read in less time than a guess takes
  CHECK(gate.worth_ns(1.0, 16 << 10, 0, 1.5e6) > 0);   // but it saves the asking of a demand
  // Where routers follow soon, smaller requests, and demands wait for what is left of the first.
  CHECK(gate.worth_ns(0.6, kRecord, 0, 0.35e6) > 0);
  for (int i = 0; i < 200; ++i) gate.saw_interval(1, 300 * 1000, true);
  CHECK(gate.request_bytes() == 102 * kPage);
  // Where a layer whose guess is wrong has nothing else to wait for, nothing waits behind the guess.
  const double dear = gate.worth_ns(0.5, kRecord, 0, 0.35e6);
  for (int i = 0; i < 100; ++i) gate.saw_wrong(false);
  CHECK(gate.worth_ns(0.5, kRecord, 0, 0.35e6) > dear);
  // Asking for a guess is in vain where it is wrong.
  const double cheap = gate.worth_ns(0.5, kRecord, 0, 0.35e6), right = gate.worth_ns(1.0, kRecord, 0, 0.35e6);
  for (int i = 0; i < 100; ++i) gate.saw_asking(200 * 1000);
  CHECK(gate.worth_ns(0.5, kRecord, 0, 0.35e6) < cheap - 50e3);
  CHECK(gate.worth_ns(1.0, kRecord, 0, 0.35e6) == right);
  em::Gate idle(1, 4);
  for (int i = 0; i < 100; ++i) {
    idle.saw_reading(1 << 20, 500 * 1000);
    idle.saw_layer(1, 0);  // never waited for: nothing to gain
  }
  CHECK(idle.worth_ns(0.9, kRecord, 0, 1.5e6) <= 0);
}

TEST(guesses_that_promise_less_than_they_take_do_not_pay) {
  em::Payoff payoff;
  const auto predict = [&payoff](int num, double promised_ns) {
    for (int time = 0; time < num; ++time) payoff.add(promised_ns, 10e3);
    return payoff.is_paying();
  };
  CHECK(!payoff.is_paying());  // nothing is known of them
  CHECK(!predict(60, 9e3));
  CHECK(predict(20, 100e3));  // they have begun to pay
  CHECK(predict(200, 14e3) && !predict(200, 12e3));
}

TEST(what_experts_do_to_the_next_router_is_learned) {
  constexpr int kChoices = 4, kScores = 6;
  em::Shift shift(kChoices, kScores);
  check::Random random(3);
  int num_found = 0;
  for (int token = 0; token < 200; ++token) {
    const int32_t ids[] = {token % kChoices, (token + 1) % kChoices};
    const float weights[] = {0.6f, 0.2f};
    float ahead[kScores], own[kScores];
    for (int e = 0; e < kScores; ++e) {
      const float logit = static_cast<float>(random.next() % 1000) / 1000.0f;
      ahead[e] = std::exp(logit);
      own[e] = std::exp(logit + (e == ids[0] + 2 ? 3.0f : 0.0f));  // the first one raises this score
    }
    shift.apply(ids, weights, 2, ahead);
    const int64_t found = std::max_element(ahead, ahead + kScores) - ahead;
    CHECK(ahead[found] == 1.0f);
    if (token >= 100) num_found += found == ids[0] + 2;
    if (token % 5 != 4) shift.learn(own);  // a token may have been applied in vain
  }
  CHECK(num_found >= 95);
  em::Shift fresh(kChoices, kScores);
  float scores[kScores] = {0.1f, 0.4f, 0.2f, 0.0f, 0.25f, 0.05f};
  fresh.learn(scores);  // of nothing that was applied
  fresh.apply(nullptr, nullptr, 0, scores);
  int32_t order[kScores];
  em::rank_largest(scores, kScores, kScores, order);
  CHECK(order[0] == 1 && order[1] == 4 && order[2] == 2 && order[5] == 3);
}

TEST(a_choice_is_as_sure_as_its_score_is_far_from_the_line) {
  const auto grade = [](float score) { return em::margin_of(score, 0.2f, 0.05f); };  // a line at .1
  CHECK(grade(0.0f) == 0 && grade(0.03f) == 0 && grade(std::nanf("")) == 0);
  CHECK(grade(0.099f) == 4 && grade(0.101f) == 5);
  CHECK(grade(0.2f) == 8 && grade(1.0f) == em::kNumMargins - 1);
  CHECK(em::margin_of(1.01e-3f, 2e-3f, 5e-4f) == grade(0.101f));  // scores of any unit
  CHECK(em::margin_of(0.5f, 0.1f, 0.0f) == em::kNumMargins - 1);  // nothing else may be chosen
}

TEST(the_largest_come_first) {
  const float scores[] = {0.1f, 0.5f, 0.3f, 0.5f, 0.0f};
  int32_t found[5];
  em::rank_largest(scores, 5, 3, found);
  CHECK(found[0] == 1 && found[1] == 3 && found[2] == 2);
  em::rank_largest(scores, 5, 5, found);
  CHECK(found[3] == 0 && found[4] == 4);
}
