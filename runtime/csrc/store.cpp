// Expert records on storage: opening, the C interface, waiting. How they are read is in
// store_reads.h, which bytes come next in read_queue.cpp.
#include "store.h"

#include <algorithm>
#include <cerrno>
#include <memory>
#include <new>
#include <system_error>
#include <utility>
#include <vector>

#include "store_reads.h"

namespace {

using em::kPage;
constexpr int32_t kMaxDepth = 256, kMaxFiles = 16;

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

}  // namespace

namespace em {

void fetch_ahead(const em_store *store, int64_t first, int64_t end) {
  fetch_ahead(store->status.get(), first, end);
  fetch_ahead(store->has_gate_up.get(), first, end);
}

int32_t arrival_of(const em_store *store, int32_t key) { return store->arrival(key); }

void pump(em_store *store) {
  if (!store->ring || !store->has_news()) return;
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

Load load_of(em_store *store) {
  em_store::Lock lock(store->mutex);
  return {store->queue.waiting_bytes(), store->queue.backlog_bytes()};
}

void set_guess_bytes(em_store *store, int64_t num_bytes) {
  em_store::Lock lock(store->mutex);
  store->queue.set_guess_bytes(num_bytes);
}

const em_record *records_of(const em_store *store) { return store->records.data(); }

int64_t num_records_of(const em_store *store) {
  return static_cast<int64_t>(store->records.size());
}

int32_t status_of(const em_store *store, int32_t key) {
  return store->status[key].load(std::memory_order_acquire);
}

void set_absent(em_store *store, int32_t key) {
  store->status[key].store(EM_ABSENT, std::memory_order_release);
}

}  // namespace em

extern "C" {

em_store *em_store_open(const char *path, const em_record *records, int64_t num_records,
                        int32_t depth, int32_t io, int32_t method, int32_t *error) {
  return em_store_open_files(&path, 1, records, num_records, depth, io, method, error);
}

em_store *em_store_open_files(const char *const *paths, int32_t num_files, const em_record *records,
                              int64_t num_records, int32_t depth, int32_t io, int32_t method,
                              int32_t *error) {
  int32_t unused;
  int32_t &result = error ? *error : unused;
  result = EM_ERR_ARG;
  if (!paths || num_files < 1 || num_files > kMaxFiles || num_records < 0 ||
      num_records > INT32_MAX || (num_records && !records) || depth < 1 || depth > kMaxDepth ||
      io < 0 || io > 2 || method < 0 || method > 1) {
    return nullptr;
  }
  for (int32_t i = 0; i < num_files; ++i) {
    if (!paths[i]) return nullptr;
  }
  for (int64_t i = 0; i < num_records; ++i) {
    const em_record &record = records[i];
    if (record.file < 0 || record.file >= num_files || record.offset < 0 ||
        record.offset % kPage || record.num_bytes <= 0 || record.num_bytes % kPage ||
        record.down_offset <= 0 || record.down_offset % kPage ||
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
    store->files.reset(new em::File[num_files]);
    const auto first_page = [&](int32_t file) -> int64_t {
      const em_record *const end = records + num_records;
      const em_record *const found = std::find_if(
          records, end, [file](const em_record &record) { return record.file == file; });
      return found == end ? 0 : found->offset;
    };
    if (io != 2) {
      result = 0;
      for (int32_t i = 0; i < num_files && result == 0; ++i) {
        result = try_direct(store->files[i], paths[i], first_page(i));
      }
      store->direct = result == 0;
      if (result && io == 1) return nullptr;
    }
    for (int32_t i = 0; i < num_files && !store->direct; ++i) {
      result = store->files[i].open(paths[i], false);
      if (result) return nullptr;
      store->files[i].expect_random();
    }
    store->depth = depth;
    store->throttle.reserve(2 * depth);
    if (method == EM_METHOD_AUTO && store->direct) {
      std::unique_ptr<em::Uring> ring(new em::Uring);
      const int32_t num_reads = 2 * depth;  // demands, and guesses that were under way before them
      store->uring_error = try_uring(*ring, store->files[0], num_reads, first_page(0));
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
      if (num > 0) store->note_work();
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
    if (em::status_of(store, keys[i]) != EM_READING) continue;
    store->queue.promote(keys[i], priority);
    if (store->throttle.is_on()) store->throttle.promote(keys[i], priority, em::monotonic_ns());
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

int32_t em_store_throttle(em_store *store, int64_t bytes_per_s) {
  if (bytes_per_s < 0) return EM_ERR_ARG;
  em_store::Lock lock(store->mutex);
  store->set_throttle(bytes_per_s);
  return 0;
}

void em_store_get_stats(em_store *store, em_store_stats *stats) {
  em_store::Lock lock(store->mutex);
  *stats = store->stats;
  if (store->is_idle) stats->idle_ns += em::monotonic_ns() - store->idle_since_ns;
  stats->throttle_bytes_per_s = store->throttle.rate();
  stats->throttle_busy_ns = store->throttle.busy_ns();
}
}
