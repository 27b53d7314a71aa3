// The reads of a store: by reader threads, or by whoever submits, pumps or waits, through a ring.
#pragma once
#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "edgemoe_core.h"
#include "platform.h"
#include "read_queue.h"
#include "store.h"
#include "throttle.h"
#include "uring.h"

namespace em {

constexpr int64_t kPage = 4096;
constexpr uint64_t kNop = ~uint64_t{0};  // tag of what wakes the waiter
constexpr int32_t kMaxRepeats = 100;     // of a read that the system says to try again

// A request that the ring is reading, or has read and the throttle holds back.
struct Flight {
  Request request;
  int64_t num_bytes = 0, begin_ns = 0;  // landed; when it was handed over
  int32_t num_repeats = 0, error = 0;
  bool is_used = false, is_read = false, is_served = false;
};

}  // namespace em

struct em_store {
  std::unique_ptr<em::File[]> files;
  bool direct = false;
  int32_t uring_error = 0;  // why there is no ring, 0: not wanted
  std::vector<em_record> records;
  std::unique_ptr<std::atomic<int32_t>[]> status;
  std::unique_ptr<std::atomic<bool>[]> has_gate_up;  // while the record is being read

  std::mutex mutex;  // of everything below
  std::condition_variable work, changed, paced;
  em::ReadQueue queue;
  std::vector<uint8_t> verified;  // by key: bit of each section whose checksum was right
  std::vector<int64_t> landed_ns;
  em_store_stats stats = {};
  bool is_idle = true;  // nothing is queued or being read, since:
  int64_t idle_since_ns = em::monotonic_ns();
  bool closing = false;
  std::vector<std::thread> readers;

  // With a ring there are no reader threads: whoever submits, pumps or waits does it all.
  std::unique_ptr<em::Uring> ring;
  int32_t depth = 0;
  std::vector<em::Flight> flights;  // by tag
  int32_t num_demands = 0, num_flights = 0;
  bool has_waiter = false;  // a thread sleeps in the ring: only it may pop completions
  bool is_nop_under_way = false;

  // A request is handed over when the drive has read it and the throttle, where one is on, is done
  // with it. With reader threads a tag counts requests, with a ring it is the flight's.
  em::Throttle throttle;
  uint64_t num_throttled = 0;
  std::atomic<int64_t> due_ns{em::kNever};  // when `reap` finds something, readable without the lock

  using Lock = std::unique_lock<std::mutex>;

  ~em_store() {
    {
      Lock lock(mutex);
      closing = true;
      set_throttle(0);
      for (size_t key = 0; key < records.size(); ++key) cancel(static_cast<int32_t>(key));
      while (ring && num_flights > 0) block(lock);
    }
    work.notify_all();
    changed.notify_all();
    for (std::thread &reader : readers) reader.join();
  }

  void set_throttle(int64_t bytes_per_s) {
    throttle.set_rate(bytes_per_s, em::monotonic_ns());
    note_due();
    paced.notify_all();
    notify();
  }

  bool is_valid(int32_t key) const {
    return key >= 0 && static_cast<size_t>(key) < records.size();
  }

  const em::File &file_of(int32_t key) const { return files[records[key].file]; }

  int32_t arrival(int32_t key) const {
    const int32_t now = status[key].load(std::memory_order_acquire);
    if (now != EM_READING) return now;
    return has_gate_up[key].load(std::memory_order_acquire) ? em::kGateUpReady : EM_READING;
  }

  void cancel(int32_t key) {
    if (status[key].load(std::memory_order_relaxed) != EM_READING) return;
    if (queue.cancel(key) && queue.is_idle(key)) publish(key, EM_ABSENT);
    note_idle();
  }

  // The queue has become shorter.
  void note_idle() {
    if (is_idle || queue.backlog_bytes() > 0) return;
    is_idle = true;
    idle_since_ns = em::monotonic_ns();
  }

  // It is about to become longer.
  void note_work() {
    if (is_idle) stats.idle_ns += em::monotonic_ns() - idle_since_ns;
    is_idle = false;
  }

  // The record is no longer being read. Waiters are told by the caller.
  void publish(int32_t key, int32_t result) {
    if (result == EM_ABSENT) {
      stats.cancelled_bytes += queue.landed_bytes(key);
    } else {
      ++stats.num_reads;
    }
    landed_ns[key] = em::monotonic_ns();
    status[key].store(result, std::memory_order_release);
  }

  // Something was published or has come further.
  void notify() {
    changed.notify_all();
    if (!has_waiter || is_nop_under_way) return;
    is_nop_under_way = true;
    ring->push_nop(em::kNop);
    ring->submit();
  }

  // A request has ended with all its bytes or an error. Without the lock while it checks a section;
  // returns the CPU time of that.
  int64_t land(Lock &lock, const em::Request &request, int32_t error) {
    const int32_t key = request.key;
    int64_t crc_ns = 0;
    const uint8_t bit = static_cast<uint8_t>(1 << request.section);
    if (queue.land(request, error) && !(verified[key] & bit)) {
      const em_record &record = records[key];
      const bool is_down = request.section == em::kDown;
      const char *section = queue.memory(key) + (is_down ? record.down_offset : 0);
      const int64_t num_bytes = queue.section_bytes(key, request.section);
      lock.unlock();
      const int64_t before = em::thread_cpu_ns();
      const uint32_t crc = em_crc32c(0, section, num_bytes);
      crc_ns = em::thread_cpu_ns() - before;
      lock.lock();
      stats.crc_ns += crc_ns;
      if (crc == (is_down ? record.crc_down : record.crc_gate_up)) {
        verified[key] |= bit;
      } else {
        error = EM_ERR_CRC;
      }
    }
    const int32_t result = queue.settle(request, error);
    note_idle();
    if (result != EM_READING) {
      publish(key, result);
    } else if (queue.has_section(key, em::kGateUp)) {
      has_gate_up[key].store(true, std::memory_order_release);
    }
    notify();
    return crc_ns;
  }

  // All bytes of a request: 0 or a negative status.
  int32_t read(const em::Request &request, int64_t *num_bytes) const {
    const int64_t begin = records[request.key].offset + request.begin;
    const em::File &file = file_of(request.key);
    int64_t done = 0;
    while (done < request.num_bytes) {
      const int64_t got = file.read_at(request.dst + done, request.num_bytes - done, begin + done);
      if (got < 0) return static_cast<int32_t>(got);
      if (!direct && got > 0) file.forget(begin + done, got);
      *num_bytes = done += got;
      // A direct read that ends inside a page has met the end of the file; to go on from there
      // would be refused.
      if (got == 0 || (direct && got % em::kPage)) break;
    }
    return done == request.num_bytes ? 0 : EM_ERR_SHORT;
  }

  void run_reader() {
    em::block_signals();
    Lock lock(mutex);
    for (;;) {
      work.wait(lock, [this] { return closing || !queue.empty(); });
      if (closing) return;
      const em::Request request = queue.next();
      const int64_t cpu_before = em::thread_cpu_ns(), begin = em::monotonic_ns();
      const bool is_throttled = throttle.is_on();
      const uint64_t tag = num_throttled++;
      if (is_throttled) pass(tag, request, begin);
      lock.unlock();
      int64_t num_bytes = 0;
      const int32_t error = read(request, &num_bytes);
      const int64_t cpu_ns = em::thread_cpu_ns() - cpu_before;
      lock.lock();
      if (is_throttled) await(lock, tag);
      count(request, num_bytes, em::monotonic_ns() - begin);
      stats.cpu_ns += cpu_ns;
      land(lock, request, error);
    }
  }

  // Until the throttle is done with a request.
  void await(Lock &lock, uint64_t tag) {
    const em::SharpTimer sharp;
    for (;;) {
      const int64_t now = em::monotonic_ns();
      if (throttle.take(now, tag)) return;
      paced.wait_for(lock, std::chrono::nanoseconds(throttle.due() - now));
    }
  }

  void pass(uint64_t tag, const em::Request &request, int64_t now) {
    throttle.add(tag, request.key, request.priority, request.num_bytes, now);
    note_due();
  }

  void note_due() { due_ns = throttle.has_ended() ? 0 : throttle.due(); }

  // ---- with a ring; all under the lock ------------------------------------------------------

  void push(uint64_t tag) {
    const em::Flight &flight = flights[tag];
    const em::Request &request = flight.request;
    const int64_t landed = flight.num_bytes, begin = request.begin + landed;
    ring->push_read(file_of(request.key), request.dst + landed, request.num_bytes - landed,
                    records[request.key].offset + begin, tag);
  }

  // Whether the first task and what is under way are all that is demanded of one record.
  bool is_lone() const {
    if (!queue.is_lone()) return false;
    for (const em::Flight &flight : flights) {
      const em::Request &request = flight.request;
      if (flight.is_used && request.priority == 0 && request.key != queue.next_key()) return false;
    }
    return true;
  }

  // Start what the depth allows: half of it for guesses, and guesses under way do not keep a demand
  // waiting. A drive serves its requests side by side. So a lone record's gate|up section goes first, in
  // two requests, and the other section when the first of these has ended: it arrives while gate|up is
  // computed, and the drive is not idle in between. One request at a time gains nothing by that.
  void start() {
    while (!queue.empty()) {
      const bool is_demand = queue.top_priority() == 0;
      const bool is_alone = is_demand && depth > 1 && is_lone();
      const bool is_last = is_alone && queue.next_section() == em::kDown;
      const int32_t num_demanded = is_last ? 2 : depth;
      if (is_demand ? num_demands >= num_demanded : num_flights >= (depth + 1) / 2) return;
      uint64_t tag = 0;
      while (flights[tag].is_used) ++tag;
      em::Flight &flight = flights[tag];
      flight = em::Flight();
      flight.request = queue.next(is_alone ? em::kLoneBytes : em::kDemandBytes);
      flight.begin_ns = em::monotonic_ns();
      flight.is_used = true;
      ++num_flights;
      num_demands += flight.request.priority == 0;
      flight.is_served = !throttle.is_on();
      if (!flight.is_served) pass(tag, flight.request, flight.begin_ns);
      push(tag);
    }
  }

  em::Request take(uint64_t tag) {
    em::Flight &flight = flights[tag];
    count(flight.request, flight.num_bytes, em::monotonic_ns() - flight.begin_ns);
    flight.is_used = false;
    if (!flight.is_served) throttle.forget(tag);
    --num_flights;
    num_demands -= flight.request.priority == 0;
    return flight.request;
  }

  // Hand over what was pushed. What the system does not take has failed.
  void hand_over(Lock &lock) {
    while (const int32_t error = ring->submit()) {
      uint64_t tag;
      while (ring->take_back(&tag)) {
        if (tag == em::kNop) {
          is_nop_under_way = false;
        } else {
          land(lock, take(tag), error);
        }
      }
      if (num_flights > 0) return;  // their end starts what is left
      start();
    }
  }

  void start_now(Lock &lock) {
    const int64_t before = em::thread_cpu_ns();
    start();
    hand_over(lock);
    stats.cpu_ns += em::thread_cpu_ns() - before;
  }

  // Whether `reap` would find something.
  bool has_news() const {
    if (ring->has_completion()) return true;
    const int64_t due = due_ns.load(std::memory_order_relaxed);
    return due != em::kNever && em::monotonic_ns() >= due;
  }

  // Take note of what has landed, unless a waiter is going to.
  void reap(Lock &lock) {
    if (has_waiter || !has_news()) return;
    const int64_t before = em::thread_cpu_ns();
    int64_t crc_ns = 0;
    uint64_t tag;
    int32_t result;
    while (!has_waiter && ring->pop(&tag, &result)) {
      if (tag == em::kNop) {
        is_nop_under_way = false;
        continue;
      }
      em::Flight &flight = flights[tag];
      if (result > 0) flight.num_bytes += result;
      const int64_t left = flight.request.num_bytes - flight.num_bytes;
      const bool is_short = left > 0 && result > 0 && result % em::kPage == 0;
      const bool is_to_repeat = result == -EINTR || result == -EAGAIN;
      if (is_short || (is_to_repeat && ++flight.num_repeats < em::kMaxRepeats)) {
        push(tag);
        hand_over(lock);
        continue;
      }
      flight.is_read = true;
      flight.error = left == 0 ? 0 : result < 0 ? result : EM_ERR_SHORT;
      if (flight.is_served) crc_ns += finish(lock, tag);
    }
    while (!has_waiter && throttle.pop(em::monotonic_ns(), &tag)) {
      flights[tag].is_served = true;
      if (flights[tag].is_read) crc_ns += finish(lock, tag);
    }
    note_due();
    stats.cpu_ns += em::thread_cpu_ns() - before - crc_ns;
  }

  int64_t finish(Lock &lock, uint64_t tag) {
    const int32_t error = flights[tag].error;
    const em::Request request = take(tag);
    start();  // before a checksum keeps this thread
    hand_over(lock);
    return land(lock, request, error);
  }

  // Returns when something may have changed. One thread sleeps in the ring, others on `changed`.
  void block(Lock &lock) {
    if (!ring || has_waiter || num_flights == 0) return changed.wait(lock);
    const int64_t before = em::thread_cpu_ns();
    has_waiter = true;
    const int64_t due = due_ns;
    lock.unlock();
    if (due == em::kNever) {
      ring->wait();
    } else {
      ring->wait_until(due);
    }
    lock.lock();
    has_waiter = false;
    stats.cpu_ns += em::thread_cpu_ns() - before;
    changed.notify_all();  // another one may sleep there now
    reap(lock);
  }

  void count(const em::Request &request, int64_t num_bytes, int64_t read_ns) {
    ++stats.num_requests;
    stats.num_bytes += num_bytes;
    stats.priority_bytes[request.priority] += num_bytes;
    stats.read_ns += read_ns;
  }
};
