#include "store.h"

#include <atomic>
#include <cerrno>
#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

#include "platform.h"

namespace {

constexpr int64_t kPage = 4096;

struct Request {
  int32_t key;
  void *dst;
};

bool is_aligned(const void *memory) { return reinterpret_cast<uintptr_t>(memory) % kPage == 0; }

// Direct I/O is what a real read of a page says it is: file systems take the flag and then refuse
// the read, or serve it through the page cache.
int32_t try_direct(em::File &file, const char *path, int64_t offset) {
  int32_t error = file.open(path, true);
  if (error) return error;
  std::unique_ptr<char[]> memory(new (std::nothrow) char[2 * kPage]);
  if (!memory) return -ENOMEM;
  char *page = memory.get() + (-reinterpret_cast<intptr_t>(memory.get()) & (kPage - 1));
  file.forget(offset, kPage);
  const int32_t before = file.is_cached(offset);
  const int64_t got = file.read_at(page, kPage, offset);
  if (got < 0) return static_cast<int32_t>(got);
  if (before == 0 && file.is_cached(offset) == 1) return -ENOTSUP;
  return 0;
}

}  // namespace

struct em_store {
  em::File file;
  bool direct = false;
  std::vector<em_record> records;
  std::unique_ptr<std::atomic<int32_t>[]> status;
  std::unique_ptr<std::atomic<bool>[]> verified;

  std::mutex mutex;
  std::condition_variable work, done;
  std::deque<Request> queue;
  bool closing = false;
  std::vector<std::thread> readers;

  std::atomic<int64_t> num_reads{0}, num_bytes{0}, read_ns{0}, cpu_ns{0};

  ~em_store() {
    {
      std::lock_guard<std::mutex> lock(mutex);
      closing = true;
      for (const Request &request : queue) status[request.key].store(EM_ABSENT);
      queue.clear();
    }
    work.notify_all();
    done.notify_all();
    for (std::thread &reader : readers) reader.join();
  }

  int32_t read(const em_record &record, char *dst) {
    int64_t done_bytes = 0;
    while (done_bytes < record.num_bytes) {
      const int64_t offset = record.offset + done_bytes;
      const int64_t got = file.read_at(dst + done_bytes, record.num_bytes - done_bytes, offset);
      if (got < 0) return static_cast<int32_t>(got);
      if (!direct && got > 0) file.forget(offset, got);
      done_bytes += got;
      // A direct read that ends inside a page has met the end of the file; to go on from there
      // would be refused.
      if (got == 0 || (direct && got % kPage)) break;
    }
    num_bytes.fetch_add(done_bytes, std::memory_order_relaxed);
    return done_bytes == record.num_bytes ? EM_READY : EM_ERR_SHORT;
  }

  int32_t read_and_check(const Request &request) {
    const em_record &record = records[request.key];
    char *dst = static_cast<char *>(request.dst);
    const int64_t begin = em::monotonic_ns();
    int32_t result = read(record, dst);
    read_ns.fetch_add(em::monotonic_ns() - begin, std::memory_order_relaxed);
    num_reads.fetch_add(1, std::memory_order_relaxed);
    if (result == EM_READY && !verified[request.key].load(std::memory_order_relaxed)) {
      if (em_crc32c(0, dst, record.down_offset) == record.crc_gate_up &&
          em_crc32c(0, dst + record.down_offset, record.num_bytes - record.down_offset) ==
              record.crc_down) {
        verified[request.key].store(true, std::memory_order_relaxed);
      } else {
        result = EM_ERR_CRC;
      }
    }
    return result;
  }

  void run_reader() {
    em::block_signals();
    int64_t cpu_before = em::thread_cpu_ns();
    for (;;) {
      std::unique_lock<std::mutex> lock(mutex);
      work.wait(lock, [this] { return closing || !queue.empty(); });
      if (closing) return;
      const Request request = queue.front();
      queue.pop_front();
      lock.unlock();
      const int32_t result = read_and_check(request);
      const int64_t cpu_now = em::thread_cpu_ns();
      cpu_ns.fetch_add(cpu_now - cpu_before, std::memory_order_relaxed);
      cpu_before = cpu_now;
      lock.lock();  // a waiter looks at the status under this lock before it sleeps
      status[request.key].store(result, std::memory_order_release);
      lock.unlock();
      done.notify_all();
    }
  }
};

namespace em {

int64_t wait_any(em_store *store, const int32_t *keys, int64_t n) {
  if (!store || n <= 0) return -1;
  const int64_t count = num_records_of(store);
  for (int64_t i = 0; i < n; ++i) {
    if (keys[i] < 0 || keys[i] >= count) return -1;
  }
  const auto find = [&]() -> int64_t {
    for (int64_t i = 0; i < n; ++i) {
      if (store->status[keys[i]].load(std::memory_order_acquire) != EM_READING) return i;
    }
    return -1;
  };
  int64_t position = find();
  if (position >= 0) return position;
  std::unique_lock<std::mutex> lock(store->mutex);
  store->done.wait(lock, [&] { return (position = find()) >= 0; });
  return position;
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
                        int32_t num_threads, int32_t io, int32_t *error) {
  int32_t unused;
  int32_t &result = error ? *error : unused;
  result = EM_ERR_ARG;
  if (!path || num_records < 0 || num_records > INT32_MAX || (num_records && !records) ||
      num_threads < 1 || num_threads > 256 || io < 0 || io > 2) {
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
    store->status.reset(new std::atomic<int32_t>[num_records]);
    store->verified.reset(new std::atomic<bool>[num_records]);
    for (int64_t i = 0; i < num_records; ++i) {
      store->status[i].store(EM_ABSENT);
      store->verified[i].store(false);
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
    for (int32_t i = 0; i < num_threads; ++i) {
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

int32_t *em_store_status(em_store *store) {
  static_assert(sizeof(std::atomic<int32_t>) == sizeof(int32_t), "a status is one int32");
  return reinterpret_cast<int32_t *>(store->status.get());
}

int32_t em_store_submit(em_store *store, int64_t num, const int32_t *keys, void *const *dst) {
  const int64_t count = em::num_records_of(store);
  if (num < 0) return EM_ERR_ARG;
  for (int64_t i = 0; i < num; ++i) {
    if (keys[i] < 0 || keys[i] >= count || !dst[i] || !is_aligned(dst[i])) return EM_ERR_ARG;
  }
  try {
    std::vector<int32_t> before;
    before.reserve(static_cast<size_t>(num));
    std::lock_guard<std::mutex> lock(store->mutex);
    const size_t queued = store->queue.size();
    for (int64_t i = 0; i < num; ++i) store->queue.push_back({keys[i], dst[i]});
    for (int64_t i = 0; i < num; ++i) {
      std::atomic<int32_t> &status = store->status[keys[i]];
      before.push_back(status.load(std::memory_order_relaxed));
      if (before.back() == EM_READING) {  // in flight, or twice in this list: all or nothing
        store->queue.resize(queued, Request{});
        for (int64_t j = 0; j < i; ++j) store->status[keys[j]].store(before[j]);
        return EM_ERR_ARG;
      }
      status.store(EM_READING, std::memory_order_relaxed);
    }
  } catch (const std::bad_alloc &) {
    return -ENOMEM;
  }
  if (num == 1) {
    store->work.notify_one();
  } else {
    store->work.notify_all();
  }
  return 0;
}

int32_t em_store_wait(em_store *store, int32_t key) {
  if (key < 0 || key >= em::num_records_of(store)) return EM_ERR_ARG;
  em::wait_any(store, &key, 1);
  return em::status_of(store, key);
}

void em_store_get_stats(em_store *store, em_store_stats *stats) {
  stats->num_reads = store->num_reads.load(std::memory_order_relaxed);
  stats->num_bytes = store->num_bytes.load(std::memory_order_relaxed);
  stats->read_ns = store->read_ns.load(std::memory_order_relaxed);
  stats->cpu_ns = store->cpu_ns.load(std::memory_order_relaxed);
}
}
