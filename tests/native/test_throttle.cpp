// The emulated drive: its schedule on given clocks, and that a store keeps it.
#include "throttle.h"

#include <utility>
#include <vector>

#include "check.h"
#include "platform.h"
#include "store_folder.h"

namespace {

constexpr int64_t kMega = 1000000;  // at this rate a byte takes a microsecond

em::Throttle at(int64_t rate) {
  em::Throttle throttle;
  throttle.reserve(8);
  throttle.set_rate(rate, 0);
  return throttle;
}

}  // namespace

TEST(an_emulated_drive_serves_one_after_the_other) {
  em::Throttle drive = at(kMega);
  uint64_t tag = 99;
  drive.add(1, 0, 0, 10, 5000);
  drive.add(2, 1, 0, 20, 6000);  // waits for the first
  CHECK_EQUAL(drive.due(), 15000);
  CHECK(!drive.pop(14999, &tag));
  CHECK(drive.pop(15000, &tag) && tag == 1);
  CHECK_EQUAL(drive.due(), 35000);
  CHECK(drive.pop(80000, &tag) && tag == 2);
  CHECK_EQUAL(drive.due(), em::kNever);
  drive.add(3, 2, 0, 1, 90000);  // after a pause from its own arrival
  CHECK_EQUAL(drive.due(), 91000);
  CHECK_EQUAL(drive.busy_ns(), 31000);
}

TEST(an_emulated_drive_takes_the_most_urgent_next) {
  em::Throttle drive = at(kMega);
  uint64_t tag = 0;
  drive.add(1, 10, 2, 100, 0);  // a guess, served at once
  drive.add(2, 11, 2, 100, 0);
  drive.add(3, 12, 1, 100, 0);
  drive.add(4, 13, 0, 100, 0);  // a demand: waits for no more than the one under way
  drive.promote(11, 0, 50000);  // becomes one, behind it
  std::vector<uint64_t> order;
  while (drive.pop(10000000, &tag)) order.push_back(tag);
  CHECK(order == (std::vector<uint64_t>{1, 4, 2, 3}));
}

TEST(an_emulated_drive_lets_go_when_it_is_switched_off) {
  em::Throttle drive = at(kMega);
  uint64_t tag = 0;
  for (const uint64_t each : {1, 2, 3}) drive.add(each, 0, 0, 1000, 0);
  drive.forget(2);
  drive.set_rate(0, 250000);
  CHECK(drive.take(250000, 3));
  CHECK(drive.pop(250000, &tag) && tag == 1);
  CHECK(!drive.pop(250000, &tag));
  CHECK_EQUAL(drive.busy_ns(), 250000);
}

TEST(a_store_hands_over_nothing_before_its_service_has_ended) {
  const StoreFolder folder =
      make_store("throttled", 128, 96, {0, 1}, 6, {{4, 32, EM_MODE_SYM}, {8, 32, EM_MODE_ASYM}});
  constexpr int64_t kRate = 20 * kMega;
  const std::pair<int32_t, int32_t> ways[] = {
      {0, EM_METHOD_AUTO}, {0, EM_METHOD_THREADS}, {2, EM_METHOD_AUTO}};
  for (const auto &way : ways) {
    int64_t slot_bytes = 0, num_bytes = 0;
    for (const em_record &record : folder.records) {
      if (record.num_bytes > slot_bytes) slot_bytes = record.num_bytes;
      num_bytes += record.num_bytes;
    }
    const int64_t num = static_cast<int64_t>(folder.records.size());
    const Slots slots(num, slot_bytes);
    int32_t error = 0;
    em_store *store = em_store_open(folder.experts_path().c_str(), folder.records.data(), num, 4,
                                    way.first, way.second, &error);
    REQUIRE(store != nullptr);
    CHECK_EQUAL(em_store_throttle(store, -1), EM_ERR_ARG);
    CHECK_EQUAL(em_store_throttle(store, kRate), 0);
    const int64_t begin = em::monotonic_ns();
    int64_t served_ns = 0;
    for (int32_t key = 0; key < num; ++key) {
      void *dst = slots.at(key);
      CHECK_EQUAL(em_store_submit(store, 1, &key, &dst, 0), 0);
    }
    for (int32_t key = 0; key < num; ++key) {
      CHECK_EQUAL(em_store_wait(store, key), EM_READY);
      served_ns += folder.records[key].num_bytes * 1000 / 20;
      // Records end in the order of their keys, but for a lag of two for down sections.
      CHECK(em_store_landed_ns(store)[key] - begin >= served_ns);
    }
    em_store_stats stats;
    em_store_get_stats(store, &stats);
    CHECK_EQUAL(stats.throttle_bytes_per_s, kRate);
    CHECK(stats.throttle_busy_ns >= num_bytes * 50 && stats.throttle_busy_ns < num_bytes * 50 + 100);
    CHECK_EQUAL(em_store_throttle(store, 1), 0);  // a record would take hours
    for (int32_t key = 0; key < num; ++key) {
      void *dst = slots.at(key);
      CHECK_EQUAL(em_store_submit(store, 1, &key, &dst, 2), 0);
    }
    CHECK_EQUAL(em_store_throttle(store, 0), 0);
    for (int32_t key = 0; key < num; ++key) CHECK_EQUAL(em_store_wait(store, key), EM_READY);
    const int32_t key = 0;
    void *dst = slots.at(0);
    CHECK_EQUAL(em_store_throttle(store, 1), 0);
    CHECK_EQUAL(em_store_submit(store, 1, &key, &dst, 0), 0);
    em_store_close(store);  // does not wait for it
  }
}
