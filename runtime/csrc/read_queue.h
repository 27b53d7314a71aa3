// Which bytes to read next: the records being read, cut into requests, most urgent first.
// Keeps the books only: no lock, no I/O, no checksum.
#pragma once
#include <cstdint>
#include <set>
#include <vector>

#include "edgemoe_core.h"

namespace em {

constexpr int32_t kNumPriorities = 3;
constexpr int64_t kDemandBytes = int64_t{16} << 20;  // a demanded section is one request
constexpr int64_t kLoneBytes = int64_t{5} << 18;     // of the only demanded record: see em_store
constexpr int64_t kGuessBytes = int64_t{1} << 20;    // of a guess, at most: see set_guess_bytes

enum Section : int32_t { kGateUp = 0, kDown = 1 };

// One request: bytes [begin, begin + num_bytes) of a record, within one section.
struct Request {
  int32_t key, section, priority;
  int64_t begin, num_bytes;
  char *dst;  // of these bytes
};

class ReadQueue {
 public:
  void open(const std::vector<em_record> *records);

  // Throws std::bad_alloc, and then nothing has changed. The records are not in the queue.
  void add(int64_t num, const int32_t *keys, void *const *dst, int32_t priority);
  // Behind what already has this priority; a less urgent priority than before changes nothing.
  void promote(int32_t key, int32_t priority);
  // Forget what no request was made of; true where something was. `settle` then tells when the
  // memory is free.
  bool cancel(int32_t key);

  // A guess can be cancelled between two requests of so many bytes, whole pages.
  void set_guess_bytes(int64_t num_bytes) { guess_bytes_ = num_bytes; }

  // Bytes that are still to land, and those of them that were demanded and no request was made of.
  int64_t backlog_bytes() const { return backlog_bytes_; }
  int64_t waiting_bytes() const { return waiting_bytes_; }

  bool empty() const { return tasks_.empty(); }
  int32_t top_priority() const { return tasks_.begin()->priority; }
  // The first task, of a queue that is not empty: its record, its section, and whether all other
  // demands that wait are of the same record.
  int32_t next_key() const { return tasks_.begin()->key; }
  int32_t next_section() const { return tasks_.begin()->section; }
  bool is_lone() const;
  // A request of it: of a demand the rest of its section, but `most` bytes.
  Request next(int64_t most = kDemandBytes);

  // The bytes of a request are there, or `error` is negative: then the rest is not read. True where
  // they complete a section, whose checksum is now due.
  bool land(const Request &request, int32_t error);
  // After `land` and the checksum: EM_READING where more is to come, EM_READY, EM_ABSENT after a
  // cancel, or the first error. No request of the record is being read unless EM_READING.
  int32_t settle(const Request &request, int32_t error);

  bool is_idle(int32_t key) const { return reads_[key].num_in_flight == 0; }
  bool has_section(int32_t key, int32_t section) const { return reads_[key].is_done[section]; }
  const char *memory(int32_t key) const { return reads_[key].dst; }
  int64_t landed_bytes(int32_t key) const {
    return reads_[key].landed[kGateUp] + reads_[key].landed[kDown];
  }
  int64_t section_bytes(int32_t key, int32_t section) const;

 private:
  struct Read {
    char *dst = nullptr;
    uint64_t turn = 0;
    int64_t issued[2] = {0, 0}, landed[2] = {0, 0};
    int32_t num_in_flight = 0, error = 0, priority = 0;
    bool is_done[2] = {false, false}, is_cancelled = false;
  };
  struct Task {  // a section of which something is still to be requested
    int32_t priority;
    uint64_t order;
    int32_t section, key;
    bool operator<(const Task &other) const;
  };

  Task task(int32_t key, int32_t section) const;
  int64_t unissued_bytes(int32_t key, int32_t section) const;
  void drop(int32_t key);

  const std::vector<em_record> *records_ = nullptr;
  std::vector<Read> reads_;  // by key; meaningful while the record is being read
  std::set<Task> tasks_;
  uint64_t turn_ = 0;
  int64_t backlog_bytes_ = 0, waiting_bytes_ = 0, guess_bytes_ = kGuessBytes;
};

}  // namespace em
