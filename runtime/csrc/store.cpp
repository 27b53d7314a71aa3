// Expert records on storage: what is being read, what has arrived. Which bytes come next is decided
// in read_queue.cpp.
#include "store.h"

#include <atomic>
#include <cerrno>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "platform.h"
#include "read_queue.h"
#include "uring.h"

namespace {

constexpr int64_t kPage = 4096;
constexpr int32_t kMaxDepth = 256;
constexpr uint64_t kNop = ~uint64_t{0};  // tag of what wakes the waiter
constexpr int32_t kMaxRepeats = 100;     // of a read that the system says to try again

bool is_aligned(const void *memory) { return reinterpret_cast<uintptr_t>(memory) % kPage == 0; }

struct Page {
  std::unique_ptr<char[]> memory{new char[2 * kPage]};
  char *begin() const {
    return memory.get() + (-reinterpret_cast<intptr_t>(memory.get()) & (kPage - 1));
  }
};

// Direct I/O is what a real read of a page says it is: file systems take the flag and then refuse
// the read, or serve it through the page cache.
int32_t try_direct(em::File &file, const char *path, int64_t offset) {
  int32_t error = file.open(path, true);
  if (error) return error;
  const Page page;
  file.forget(offset, kPage);
  const int32_t before = file.is_cached(offset);
  const int64_t got = file.read_at(page.begin(), kPage, offset);
  if (got < 0) return static_cast<int32_t>(got);
  if (before == 0 && file.is_cached(offset) == 1) return -ENOTSUP;
  return 0;
}

// A container may allow the ring and deny its use: read a page.
int32_t try_uring(em::Uring &ring, const em::File &file, int32_t num_reads, int64_t offset) {
  int32_t error = ring.open(num_reads);
  if (error) return error;
  const Page page;
  uint64_t tag;
  int32_t result = 0;
  ring.push_read(file, page.begin(), kPage, offset, 0);
  error = ring.submit();
  if (error) return error;
  while (!ring.pop(&tag, &result)) ring.wait();
  return result < 0 ? result : 0;
}

// A request that the ring is reading.
struct Flight {
  em::Request request;
  int64_t num_bytes = 0, begin_ns = 0;  // landed; when it was handed over
  int32_t num_repeats = 0;
  bool is_used = false;
};

}  // namespace

struct em_store {
  em::File file;
  bool direct = false;
  int32_t uring_error = 0;  // why there is no ring, 0: not wanted
  std::vector<em_record> records;
  std::unique_ptr<std::atomic<int32_t>[]> status;
  std::unique_ptr<std::atomic<bool>[]> has_gate_up;  // while the record is being read

  std::mutex mutex;  // of everything below
  std::condition_variable work, changed;
  em::ReadQueue queue;
  std::vector<uint8_t> verified;  // by key: bit of each section whose checksum was right
  std::vector<int64_t> landed_ns;
  em_store_stats stats = {};
  bool closing = false;
  std::vector<std::thread> readers;

  // With a ring there are no reader threads: whoever submits, pumps or waits does it all.
  std::unique_ptr<em::Uring> ring;
  int32_t depth = 0;
  std::vector<Flight> flights;  // by tag
  int32_t num_demands = 0, num_flights = 0;
  bool has_waiter = false;  // a thread sleeps in the ring: only it may pop completions
  bool is_nop_under_way = false;

  using Lock = std::unique_lock<std::mutex>;

  ~em_store() {
    {
      Lock lock(mutex);
      closing = true;
      for (size_t key = 0; key < records.size(); ++key) cancel(static_cast<int32_t>(key));
      while (ring && num_flights > 0) block(lock);
    }
    work.notify_all();
    changed.notify_all();
    for (std::thread &reader : readers) reader.join();
  }

  bool is_valid(int32_t key) const {
    return key >= 0 && static_cast<size_t>(key) < records.size();
  }

  int32_t arrival(int32_t key) const {
    const int32_t now = status[key].load(std::memory_order_acquire);
    if (now != EM_READING) return now;
    return has_gate_up[key].load(std::memory_order_acquire) ? em::kGateUpReady : EM_READING;
  }

  void cancel(int32_t key) {
    if (status[key].load(std::memory_order_relaxed) != EM_READING) return;
    if (queue.cancel(key) && queue.is_idle(key)) publish(key, EM_ABSENT);
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
    ring->push_nop(kNop);
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
    int64_t done = 0;
    while (done < request.num_bytes) {
      const int64_t got = file.read_at(request.dst + done, request.num_bytes - done, begin + done);
      if (got < 0) return static_cast<int32_t>(got);
      if (!direct && got > 0) file.forget(begin + done, got);
      *num_bytes = done += got;
      // A direct read that ends inside a page has met the end of the file; to go on from there
      // would be refused.
      if (got == 0 || (direct && got % kPage)) break;
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
      lock.unlock();
      const int64_t cpu_before = em::thread_cpu_ns(), begin = em::monotonic_ns();
      int64_t num_bytes = 0;
      const int32_t error = read(request, &num_bytes);
      const int64_t read_ns = em::monotonic_ns() - begin;
      const int64_t cpu_ns = em::thread_cpu_ns() - cpu_before;
      lock.lock();
      count(request, num_bytes, read_ns);
      stats.cpu_ns += cpu_ns;
      land(lock, request, error);
    }
  }

  // ---- with a ring; all under the lock ------------------------------------------------------

  void push(uint64_t tag) {
    const Flight &flight = flights[tag];
    const em::Request &request = flight.request;
    ring->push_read(file, request.dst + flight.num_bytes, request.num_bytes - flight.num_bytes,
                    records[request.key].offset + request.begin + flight.num_bytes, tag);
  }

  // Start what the depth allows: half of it for guesses, and guesses under way do not keep a demand
  // waiting.
  void start() {
    while (!queue.empty() && (queue.top_priority() == 0 ? num_demands < depth
                                                        : num_flights < (depth + 1) / 2)) {
      uint64_t tag = 0;
      while (flights[tag].is_used) ++tag;
      Flight &flight = flights[tag];
      flight = Flight();
      flight.request = queue.next();
      flight.begin_ns = em::monotonic_ns();
      flight.is_used = true;
      ++num_flights;
      num_demands += flight.request.priority == 0;
      push(tag);
    }
  }

  em::Request take(uint64_t tag) {
    Flight &flight = flights[tag];
    count(flight.request, flight.num_bytes, em::monotonic_ns() - flight.begin_ns);
    flight.is_used = false;
    --num_flights;
    num_demands -= flight.request.priority == 0;
    return flight.request;
  }

  // Hand over what was pushed. What the system does not take has failed.
  void hand_over(Lock &lock) {
    while (const int32_t error = ring->submit()) {
      uint64_t tag;
      while (ring->take_back(&tag)) {
        if (tag == kNop) {
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

  // Take note of what has landed, unless a waiter is going to.
  void reap(Lock &lock) {
    if (has_waiter || !ring->has_completion()) return;
    const int64_t before = em::thread_cpu_ns();
    int64_t crc_ns = 0;
    uint64_t tag;
    int32_t result;
    while (!has_waiter && ring->pop(&tag, &result)) {
      if (tag == kNop) {
        is_nop_under_way = false;
        continue;
      }
      Flight &flight = flights[tag];
      if (result > 0) flight.num_bytes += result;
      const int64_t left = flight.request.num_bytes - flight.num_bytes;
      const bool is_short = left > 0 && result > 0 && result % kPage == 0;
      const bool is_to_repeat = result == -EINTR || result == -EAGAIN;
      if (is_short || (is_to_repeat && ++flight.num_repeats < kMaxRepeats)) {
        push(tag);
        hand_over(lock);
        continue;
      }
      const em::Request request = take(tag);
      start();  // before a checksum keeps this thread
      hand_over(lock);
      crc_ns += land(lock, request, left == 0 ? 0 : result < 0 ? result : EM_ERR_SHORT);
    }
    stats.cpu_ns += em::thread_cpu_ns() - before - crc_ns;
  }

  // Returns when something may have changed. One thread sleeps in the ring, others on `changed`.
  void block(Lock &lock) {
    if (!ring || has_waiter || num_flights == 0) return changed.wait(lock);
    const int64_t before = em::thread_cpu_ns();
    has_waiter = true;
    lock.unlock();
    ring->wait();
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

namespace em {

int32_t arrival_of(const em_store *store, int32_t key) { return store->arrival(key); }

void pump(em_store *store) {
  if (!store->ring || !store->ring->has_completion()) return;
  em_store::Lock lock(store->mutex, std::try_to_lock);
  if (lock) store->reap(lock);  // else somebody is at it
}

int64_t wait_any(em_store *store, const int32_t *keys, const int32_t *seen, int64_t n) {
  if (!store || n <= 0) return -1;
  for (int64_t i = 0; i < n; ++i) {
    if (!store->is_valid(keys[i])) return -1;
  }
  const auto find = [&]() -> int64_t {
    for (int64_t i = 0; i < n; ++i) {
      if (store->arrival(keys[i]) != seen[i]) return i;
    }
    return -1;
  };
  int64_t position = find();
  if (position >= 0) return position;
  em_store::Lock lock(store->mutex);
  for (;;) {
    if (store->ring) store->reap(lock);
    if ((position = find()) >= 0) return position;
    store->block(lock);
  }
}

const em_record *records_of(const em_store *store) { return store->records.data(); }

int64_t num_records_of(const em_store *store) {
  return static_cast<int64_t>(store->records.size());
}

int32_t status_of(const em_store *store, int32_t key) {
  return store->status[key].load(std::memory_order_acquire);
}

}  // namespace em

extern "C" {

em_store *em_store_open(const char *path, const em_record *records, int64_t num_records,
                        int32_t depth, int32_t io, int32_t method, int32_t *error) {
  int32_t unused;
  int32_t &result = error ? *error : unused;
  result = EM_ERR_ARG;
  if (!path || num_records < 0 || num_records > INT32_MAX || (num_records && !records) ||
      depth < 1 || depth > kMaxDepth || io < 0 || io > 2 || method < 0 || method > 1) {
    return nullptr;
  }
  for (int64_t i = 0; i < num_records; ++i) {
    const em_record &record = records[i];
    if (record.offset < 0 || record.offset % kPage || record.num_bytes <= 0 ||
        record.num_bytes % kPage || record.down_offset <= 0 || record.down_offset % kPage ||
        record.down_offset >= record.num_bytes) {
      return nullptr;
    }
  }
  try {
    std::unique_ptr<em_store> store(new em_store);
    store->records.assign(records, records + num_records);
    store->queue.open(&store->records);
    store->verified.assign(static_cast<size_t>(num_records), 0);
    store->landed_ns.assign(static_cast<size_t>(num_records) + 1, 0);  // never a null pointer
    store->status.reset(new std::atomic<int32_t>[num_records]);
    store->has_gate_up.reset(new std::atomic<bool>[num_records]);
    for (int64_t i = 0; i < num_records; ++i) {
      store->status[i].store(EM_ABSENT);
      store->has_gate_up[i].store(false);
    }
    if (io != 2) {
      result = try_direct(store->file, path, num_records ? records[0].offset : 0);
      store->direct = result == 0;
      if (result && io == 1) return nullptr;
    }
    if (!store->direct) {
      result = store->file.open(path, false);
      if (result) return nullptr;
      store->file.expect_random();
    }
    store->depth = depth;
    if (method == EM_METHOD_AUTO && store->direct) {
      std::unique_ptr<em::Uring> ring(new em::Uring);
      const int32_t num_reads = 2 * depth;  // demands, and guesses that were under way before them
      store->uring_error =
          try_uring(*ring, store->file, num_reads, num_records ? records[0].offset : 0);
      if (store->uring_error == 0) {
        store->flights.resize(static_cast<size_t>(num_reads));
        store->ring = std::move(ring);
      }
    }
    for (int32_t i = 0; i < depth && !store->ring; ++i) {
      store->readers.emplace_back([raw = store.get()] { raw->run_reader(); });
    }
    result = 0;
    return store.release();
  } catch (const std::bad_alloc &) {
    result = -ENOMEM;
  } catch (const std::system_error &) {
    result = -EAGAIN;
  }
  return nullptr;
}

void em_store_close(em_store *store) { delete store; }

int32_t em_store_is_direct(const em_store *store) { return store->direct; }

int32_t em_store_uring(const em_store *store) {
  return store->ring ? 1 : store->uring_error;
}

int32_t *em_store_status(em_store *store) {
  static_assert(sizeof(std::atomic<int32_t>) == sizeof(int32_t), "a status is one int32");
  return reinterpret_cast<int32_t *>(store->status.get());
}

const int64_t *em_store_landed_ns(const em_store *store) { return store->landed_ns.data(); }

int32_t em_store_submit(em_store *store, int64_t num, const int32_t *keys, void *const *dst,
                        int32_t priority) {
  if (num < 0 || priority < 0 || priority >= em::kNumPriorities) return EM_ERR_ARG;
  for (int64_t i = 0; i < num; ++i) {
    if (!store->is_valid(keys[i]) || !dst[i] || !is_aligned(dst[i])) return EM_ERR_ARG;
  }
  try {
    std::vector<int32_t> before;
    before.reserve(static_cast<size_t>(num));
    em_store::Lock lock(store->mutex);
    const auto restore = [&] {
      for (size_t j = 0; j < before.size(); ++j) store->status[keys[j]].store(before[j]);
    };
    for (int64_t i = 0; i < num; ++i) {
      std::atomic<int32_t> &status = store->status[keys[i]];
      if (status.load(std::memory_order_relaxed) == EM_READING) {  // in flight, or twice in this
        restore();                                                 // list: all or nothing
        return EM_ERR_ARG;
      }
      before.push_back(status.load(std::memory_order_relaxed));
      store->has_gate_up[keys[i]].store(false, std::memory_order_relaxed);
      status.store(EM_READING, std::memory_order_release);
    }
    try {
      store->queue.add(num, keys, dst, priority);
    } catch (...) {
      restore();
      throw;
    }
    if (store->ring) {
      store->start_now(lock);
      return 0;
    }
  } catch (const std::bad_alloc &) {
    return -ENOMEM;
  }
  store->work.notify_all();
  return 0;
}

int32_t em_store_promote(em_store *store, int64_t num, const int32_t *keys, int32_t priority) {
  if (num < 0 || priority < 0 || priority >= em::kNumPriorities) return EM_ERR_ARG;
  for (int64_t i = 0; i < num; ++i) {
    if (!store->is_valid(keys[i])) return EM_ERR_ARG;
  }
  em_store::Lock lock(store->mutex);
  for (int64_t i = 0; i < num; ++i) {
    if (em::status_of(store, keys[i]) == EM_READING) store->queue.promote(keys[i], priority);
  }
  if (store->ring) store->start_now(lock);  // a demand does not wait for guesses under way
  return 0;
}

int32_t em_store_cancel(em_store *store, int64_t num, const int32_t *keys) {
  for (int64_t i = 0; i < num; ++i) {
    if (!store->is_valid(keys[i])) return EM_ERR_ARG;
  }
  em_store::Lock lock(store->mutex);
  for (int64_t i = 0; i < num; ++i) store->cancel(keys[i]);
  store->notify();
  return 0;
}

int32_t em_store_wait(em_store *store, int32_t key) {
  if (!store->is_valid(key)) return EM_ERR_ARG;
  for (;;) {
    const int32_t seen = store->arrival(key);
    if (seen != EM_READING && seen != em::kGateUpReady) return seen;
    em::wait_any(store, &key, &seen, 1);
  }
}

void em_store_pump(em_store *store) { em::pump(store); }

void em_store_get_stats(em_store *store, em_store_stats *stats) {
  em_store::Lock lock(store->mutex);
  *stats = store->stats;
}
}
