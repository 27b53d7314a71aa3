// The record reader: bytes and checksums, order, cancellation, files that end too early.
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <thread>

#include "check.h"
#include "read_queue.h"
#include "store.h"
#include "store_folder.h"

namespace {

struct Way {
  int32_t io, method;
};
// Direct where it can be, with io_uring where it is allowed, and with threads; buffered.
constexpr Way kWays[] = {{0, EM_METHOD_AUTO}, {0, EM_METHOD_THREADS}, {2, EM_METHOD_AUTO}};

StoreFolder make() { return make_store("store", 128, 96, {0, 1}, 6, {{4, 32, EM_MODE_SYM}, {8, 32, EM_MODE_ASYM}}); }

struct Open {
  Open(const StoreFolder &folder, Way way, int32_t depth = 2) {
    int32_t error = 1;
    store = em_store_open(folder.experts_path().c_str(), folder.records.data(),
                          static_cast<int64_t>(folder.records.size()), depth, way.io, way.method,
                          &error);
    CHECK_EQUAL(error, 0);
    CHECK(store != nullptr);
  }
  ~Open() { em_store_close(store); }
  int32_t submit(int32_t key, void *dst, int32_t priority = 0) const {
    return em_store_submit(store, 1, &key, &dst, priority);
  }
  em_store *store;
};

}  // namespace

TEST(records_of_two_files_arrive_side_by_side) {
  const StoreFolder first = make();
  const StoreFolder second = make_store("second", 128, 96, {0, 1}, 6, {{2, 32, EM_MODE_SYM}});
  const int64_t num = static_cast<int64_t>(first.records.size());
  std::vector<em_record> records;  // by turns
  std::vector<const std::vector<uint8_t> *> right;
  for (int64_t i = 0; i < num; ++i) {
    for (const StoreFolder *folder : {&second, &first}) {
      records.push_back(folder->records[i]);
      records.back().file = folder == &second;
      right.push_back(&folder->experts[i].record);
    }
  }
  const std::string names[] = {first.experts_path(), second.experts_path()};
  const std::string absent = names[1] + ".absent";
  const char *const paths[] = {names[0].c_str(), names[1].c_str()};
  const char *const wrong[] = {paths[0], absent.c_str()};
  for (const Way way : kWays) {
    const Slots slots(2 * num, first.max_record_bytes());
    const auto open = [&](const char *const *files, int32_t num_files, int32_t *error) {
      return em_store_open_files(files, num_files, records.data(), 2 * num, 2, way.io, way.method,
                                 error);
    };
    int32_t error = 1;
    em_store *store = open(paths, 2, &error);
    CHECK_EQUAL(error, 0);
    CHECK(store != nullptr);
    std::vector<int32_t> keys;
    std::vector<void *> dst;
    for (int64_t key = 2 * num; key-- > 0;) {
      keys.push_back(static_cast<int32_t>(key));
      dst.push_back(slots.at(key));
    }
    CHECK_EQUAL(em_store_submit(store, 2 * num, keys.data(), dst.data(), 0), 0);
    for (int64_t key = 0; key < 2 * num; ++key) {
      CHECK_EQUAL(em_store_wait(store, static_cast<int32_t>(key)), EM_READY);
      CHECK(std::memcmp(slots.at(key), right[key]->data(), right[key]->size()) == 0);
    }
    em_store_close(store);
    CHECK(open(wrong, 2, &error) == nullptr);
    CHECK_EQUAL(error, -ENOENT);
    CHECK(open(paths, 1, &error) == nullptr);  // a record names the file that is not given
    CHECK_EQUAL(error, EM_ERR_ARG);
    CHECK(open(paths, 0, &error) == nullptr);
    CHECK_EQUAL(error, EM_ERR_ARG);
  }
}

TEST(records_arrive_as_they_are_on_storage) {
  const StoreFolder folder = make();
  const int64_t num = static_cast<int64_t>(folder.records.size());
  for (const Way way : kWays) {
    const Slots slots(num, folder.max_record_bytes());
    const Open open(folder, way);
    std::vector<int32_t> keys;
    std::vector<void *> dst;
    for (int64_t key = num; key-- > 0;) {
      keys.push_back(static_cast<int32_t>(key));
      dst.push_back(slots.at(key));
    }
    for (int round = 0; round < 3; ++round) {
      CHECK_EQUAL(em_store_submit(open.store, num, keys.data(), dst.data(), round), 0);
      for (int64_t key = 0; key < num; ++key) {
        CHECK_EQUAL(em_store_wait(open.store, static_cast<int32_t>(key)), EM_READY);
        const std::vector<uint8_t> &right = folder.experts[key].record;
        CHECK(std::memcmp(slots.at(key), right.data(), right.size()) == 0);
        std::memset(slots.at(key), 0, right.size());
      }
    }
    em_store_stats stats;
    em_store_get_stats(open.store, &stats);
    CHECK_EQUAL(stats.num_reads, 3 * num);
    int64_t expected = 0;
    for (const em_record &record : folder.records) expected += 3 * record.num_bytes;
    CHECK_EQUAL(stats.num_bytes, expected);
    CHECK_EQUAL(stats.cancelled_bytes, 0);
    CHECK_EQUAL(stats.priority_bytes[0], expected / 3);
  }
}

TEST(damage_is_seen_in_either_section) {
  StoreFolder folder = make();
  const std::string whole = folder.experts_bytes();
  for (const bool in_down : {false, true}) {
    const em_record &record = folder.records[4];
    std::string bytes = whole;
    bytes[record.offset + (in_down ? record.num_bytes - 1 : 17)] ^= 1;
    write_file(folder.experts_path(), bytes);
    const Slots slots(1, folder.max_record_bytes());
    for (const Way way : kWays) {
      const Open open(folder, way);
      for (int times = 0; times < 2; ++times) {
        CHECK_EQUAL(open.submit(4, slots.at(0)), 0);
        CHECK_EQUAL(em_store_wait(open.store, 4), EM_ERR_CRC);
      }
      CHECK_EQUAL(open.submit(5, slots.at(0)), 0);
      CHECK_EQUAL(em_store_wait(open.store, 5), EM_READY);
    }
  }
}

TEST(a_file_that_ends_inside_a_record_is_told_from_damage) {
  const StoreFolder folder = make();
  const std::string whole = folder.experts_bytes();
  const int32_t last = static_cast<int32_t>(folder.records.size()) - 1;
  for (const int64_t missing : {1, 4095, 4096, 5000}) {
    write_file(folder.experts_path(), whole.substr(0, whole.size() - missing));
    const Slots slots(1, folder.max_record_bytes());
    for (const Way way : kWays) {
      const Open open(folder, way);
      CHECK_EQUAL(open.submit(last, slots.at(0)), 0);
      CHECK_EQUAL(em_store_wait(open.store, last), EM_ERR_SHORT);
      CHECK_EQUAL(open.submit(0, slots.at(0)), 0);
      CHECK_EQUAL(em_store_wait(open.store, 0), EM_READY);
    }
  }
}

TEST(what_cannot_be_read_is_refused) {
  const StoreFolder folder = make();
  int32_t error = 0;
  const auto open = [&](const char *path, std::vector<em_record> records, int32_t depth = 1,
                        int32_t io = 0, int32_t method = EM_METHOD_AUTO) {
    error = 0;
    em_store *store = em_store_open(path, records.data(), static_cast<int64_t>(records.size()),
                                    depth, io, method, &error);
    em_store_close(store);
    return store != nullptr;
  };
  const std::string path = folder.experts_path();
  CHECK(open(path.c_str(), folder.records));
  CHECK(open(path.c_str(), {}));
  CHECK(!open((path + "x").c_str(), folder.records) && error < 0);
  CHECK(!open(nullptr, folder.records) && error == EM_ERR_ARG);
  CHECK(!open(path.c_str(), folder.records, 0) && error == EM_ERR_ARG);
  CHECK(!open(path.c_str(), folder.records, 1, 3) && error == EM_ERR_ARG);
  CHECK(!open(path.c_str(), folder.records, 1, 0, 2) && error == EM_ERR_ARG);
  const auto with = [&](int64_t em_record::*field, int64_t value) {
    std::vector<em_record> records = folder.records;
    records[3].*field = value;
    return records;
  };
  for (const int64_t value : {int64_t{-4096}, int64_t{100}, INT64_MIN, INT64_MAX}) {
    CHECK(!open(path.c_str(), with(&em_record::offset, value)));
    CHECK(!open(path.c_str(), with(&em_record::num_bytes, value)));
    CHECK(!open(path.c_str(), with(&em_record::down_offset, value)));
  }
  CHECK(!open(path.c_str(), with(&em_record::num_bytes, 0)));
  CHECK(!open(path.c_str(), with(&em_record::down_offset, folder.records[3].num_bytes)));

  const Open whole(folder, kWays[0]);
  const Slots slots(2, folder.max_record_bytes());
  CHECK_EQUAL(whole.submit(-1, slots.at(0)), EM_ERR_ARG);
  CHECK_EQUAL(whole.submit(12, slots.at(0)), EM_ERR_ARG);
  CHECK_EQUAL(whole.submit(0, nullptr), EM_ERR_ARG);
  CHECK_EQUAL(whole.submit(0, slots.at(0) + 64), EM_ERR_ARG);
  CHECK_EQUAL(whole.submit(0, slots.at(0), 3), EM_ERR_ARG);
  const int32_t twice[] = {2, 2};
  void *dst[] = {slots.at(0), slots.at(1)};
  CHECK_EQUAL(em_store_submit(whole.store, 2, twice, dst, 0), EM_ERR_ARG);
  CHECK_EQUAL(em_store_status(whole.store)[2], EM_ABSENT);
  CHECK_EQUAL(em_store_wait(whole.store, 12), EM_ERR_ARG);
  CHECK_EQUAL(em_store_wait(whole.store, 2), EM_ABSENT);  // never asked for: no wait
}

TEST(cancelled_reads_leave_their_memory_alone) {
  const StoreFolder folder = make();
  const int64_t num = static_cast<int64_t>(folder.records.size());
  const Slots slots(num, folder.max_record_bytes());
  check::Random random(41);
  for (const Way way : kWays) {
    const Open open(folder, way, 1);
    for (int round = 0; round < 60; ++round) {
      std::vector<int32_t> keys;
      std::vector<void *> dst;
      for (int64_t key = 0; key < num; ++key) {
        keys.push_back(static_cast<int32_t>(key));
        dst.push_back(slots.at(key));
      }
      CHECK_EQUAL(em_store_submit(open.store, num, keys.data(), dst.data(), 2), 0);
      const int32_t urgent = static_cast<int32_t>(random.below(num));
      CHECK_EQUAL(em_store_promote(open.store, 1, &urgent, 0), 0);
      if (round % 3 == 0) em_store_pump(open.store);
      CHECK_EQUAL(em_store_cancel(open.store, num, keys.data()), 0);
      for (int32_t key = 0; key < num; ++key) {
        const int32_t status = em_store_wait(open.store, key);
        CHECK(status == EM_ABSENT || status == EM_READY);
        const std::vector<uint8_t> &right = folder.experts[key].record;
        if (status == EM_READY) CHECK(std::memcmp(slots.at(key), right.data(), right.size()) == 0);
        std::memset(slots.at(key), 0x5a, right.size());  // ours again
      }
      for (int32_t key = 0; key < num; ++key) CHECK_EQUAL(slots.at(key)[0], 0x5a);
    }
    CHECK_EQUAL(open.submit(3, slots.at(3)), 0);
    CHECK_EQUAL(em_store_wait(open.store, 3), EM_READY);
  }
}

TEST(a_store_closes_while_it_reads) {
  const StoreFolder folder = make();
  const int64_t num = static_cast<int64_t>(folder.records.size());
  for (const Way way : kWays) {
    for (int round = 0; round < 20; ++round) {
      const Slots slots(num, folder.max_record_bytes());
      const Open open(folder, way, 1 + round % 3);
      for (int32_t key = 0; key < num; ++key) CHECK_EQUAL(open.submit(key, slots.at(key)), 0);
    }
  }
}

TEST(arrivals_are_told_to_who_waits) {
  const StoreFolder folder = make();
  const int64_t num = static_cast<int64_t>(folder.records.size());
  const Slots slots(num, folder.max_record_bytes());
  for (const Way way : kWays) {
    const Open open(folder, way);
    std::vector<int32_t> keys, seen;
    for (int32_t key = 0; key < num; ++key) {
      CHECK_EQUAL(open.submit(key, slots.at(key)), 0);
      keys.push_back(key);
      seen.push_back(EM_READING);
    }
    int num_ready = 0;
    while (num_ready < num) {
      const int64_t at = em::wait_any(open.store, keys.data(), seen.data(), num);
      REQUIRE(at >= 0 && at < num);
      const int32_t now = em::arrival_of(open.store, keys[at]);
      CHECK(now == em::kGateUpReady || now == EM_READY);
      const std::vector<uint8_t> &right = folder.experts[at].record;
      const size_t have = now == EM_READY ? right.size() : folder.records[at].down_offset;
      CHECK(std::memcmp(slots.at(at), right.data(), have) == 0);
      seen[at] = now;
      num_ready += now == EM_READY;
    }
    CHECK_EQUAL(em::wait_any(open.store, keys.data(), seen.data(), 0), -1);
    const int32_t beyond = 12, any = 0;
    CHECK_EQUAL(em::wait_any(open.store, &beyond, &any, 1), -1);
  }
}

TEST(checksums_are_those_of_crc32c) {
  CHECK_EQUAL(em_crc32c(0, "123456789", 9), 0xe3069283u);
  CHECK_EQUAL(em_crc32c(0, nullptr, 0), 0u);
  const std::vector<uint8_t> zeros(32);
  CHECK_EQUAL(em_crc32c(0, zeros.data(), 32), 0x8a9136aau);
  check::Random random(42);
  std::vector<uint8_t> bytes(5000);
  for (uint8_t &byte : bytes) byte = static_cast<uint8_t>(random.next());
  const uint32_t whole = em_crc32c(0, bytes.data(), 5000);
  for (const int64_t at : {1, 7, 8, 100, 4095, 4999}) {  // in two parts, not aligned
    CHECK_EQUAL(em_crc32c(em_crc32c(0, bytes.data(), at), bytes.data() + at, 5000 - at), whole);
  }
}

TEST(a_lone_record_is_known_as_such) {
  std::vector<em_record> records(3);
  for (em_record &record : records) {
    record.down_offset = 2 * em::kLoneBytes - 4096;
    record.num_bytes = 3 * em::kLoneBytes;
  }
  em::ReadQueue queue;
  queue.open(&records);
  const int32_t keys[] = {0, 1, 2};
  char memory[1];
  void *const dst[] = {memory, memory, memory};
  queue.add(1, keys, dst, 0);
  queue.add(1, keys + 2, dst + 2, 1);  // a guess is no demand
  CHECK(queue.is_lone());
  CHECK_EQUAL(queue.next(em::kLoneBytes).num_bytes, em::kLoneBytes);
  CHECK_EQUAL(queue.next(em::kLoneBytes).num_bytes, em::kLoneBytes - 4096);
  CHECK(queue.is_lone() && queue.next_key() == 0 && queue.next_section() == em::kDown);
  queue.add(1, keys + 1, dst + 1, 0);
  CHECK(!queue.is_lone());
  CHECK_EQUAL(queue.next().key, 1);  // its gate|up goes before the other's down, in one piece
  CHECK_EQUAL(queue.next().num_bytes, records[0].num_bytes - records[0].down_offset);
  CHECK(queue.is_lone() && queue.next_key() == 1);
}
