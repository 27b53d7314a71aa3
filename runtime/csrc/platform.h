// Everything that differs between operating systems. Failures are -errno, on Windows too.
#pragma once
#include <cstdint>
#include <vector>

namespace em {

// Ask for the cache lines of elements first .. end - 1, which are wanted soon.
template <class T>
void fetch_ahead(const T *data, int64_t first, int64_t end) {
#if defined(__GNUC__)
  constexpr uintptr_t kLine = 64;
  const uintptr_t stop = reinterpret_cast<uintptr_t>(data + end);
  for (uintptr_t line = reinterpret_cast<uintptr_t>(data + first) / kLine * kLine; line < stop;
       line += kLine) {
    __builtin_prefetch(reinterpret_cast<const void *>(line));
  }
#else
  (void)data, (void)first, (void)end;
#endif
}


// A file opened for reading. Reads carry their offset, so threads may share it.
class File {
 public:
  File() = default;
  File(const File &) = delete;
  File &operator=(const File &) = delete;
  ~File() { close(); }

  // direct: past the page cache (O_DIRECT, F_NOCACHE, FILE_FLAG_NO_BUFFERING); offset, length and
  // memory must then be multiples of 4096. Returns 0 or -errno.
  int32_t open(const char *path, bool direct);
  void close();
  // One read call: bytes read (0 at the end of the file, may be fewer than asked) or -errno.
  int64_t read_at(void *dst, int64_t num_bytes, int64_t offset) const;
  // Random reads to come: no read-ahead.
  void expect_random() const;
  // Let the page cache forget a range that was read.
  void forget(int64_t offset, int64_t num_bytes) const;
  // 1 if the page at `offset` is in the page cache, 0 if not, negative where nobody can tell.
  int32_t is_cached(int64_t offset) const;
  intptr_t handle() const { return handle_; }  // of the operating system, -1: not open

 private:
  intptr_t handle_ = -1;
};

// Anonymous memory: 2 MiB aligned, huge pages asked for, not touched. Null where there is none.
void *map_memory(int64_t num_bytes);
void unmap_memory(void *memory, int64_t num_bytes);
// Give whole pages back to the system; they read as zeros afterwards. Does nothing where the system
// has no such call.
void discard_memory(void *memory, int64_t num_bytes);

int64_t monotonic_ns();
int64_t thread_cpu_ns();  // CPU time of the calling thread

// Cores this process may run on, ascending; empty where the system does not tell.
std::vector<int> allowed_cores();
// Keep the calling thread on one core; false where that is not possible.
bool pin_thread(int core);
// Keeps the calling thread on one core (negative: on none) until it goes out of scope, in the same
// thread; then the thread may run where it might before. Does nothing where that is not possible.
class Pinned {
 public:
  explicit Pinned(int core);
  Pinned(const Pinned &) = delete;
  Pinned &operator=(const Pinned &) = delete;
  ~Pinned();

 private:
  alignas(8) unsigned char before_[128];  // the system's set of cores
  bool is_pinned_ = false;
};
// Lets the calling thread sleep as precisely as the system can, until it goes out of scope: the usual
// slack of a timer is half of what a fast drive takes for a small record.
class SharpTimer {
 public:
  SharpTimer();
  SharpTimer(const SharpTimer &) = delete;
  SharpTimer &operator=(const SharpTimer &) = delete;
  ~SharpTimer();

 private:
  int before_ = -1;
};
// Of the last cache before memory; 0 where the system does not tell.
int64_t last_cache_bytes();
// Leave signals to the threads of the caller of the library.
void block_signals();

}  // namespace em
