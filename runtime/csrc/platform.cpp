#include "platform.h"

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstring>

#if defined(_WIN32)
#define WIN32_LEAN_AND_MEAN
#if !defined(NOMINMAX)
#define NOMINMAX
#endif
#include <windows.h>

#include <string>
#else
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/types.h>
#include <time.h>
#include <unistd.h>
#if defined(__linux__)
#include <sched.h>
#include <sys/prctl.h>
#endif
#endif

namespace em {

namespace {
constexpr int64_t kPage = 4096;
constexpr int64_t kHugePage = int64_t{2} << 20;
constexpr int64_t kMaxRead = int64_t{1} << 30;  // one call: 32-bit lengths (Windows, macOS) hold it

int64_t pages(int64_t num_bytes) { return (num_bytes + kPage - 1) / kPage * kPage; }
}  // namespace

int64_t monotonic_ns() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

#if defined(_WIN32)

namespace {
int32_t error_code(DWORD error) {
  switch (error) {
    case ERROR_FILE_NOT_FOUND:
    case ERROR_PATH_NOT_FOUND:
      return -ENOENT;
    case ERROR_ACCESS_DENIED:
    case ERROR_SHARING_VIOLATION:
      return -EACCES;
    case ERROR_INVALID_PARAMETER:
      return -EINVAL;
    case ERROR_NOT_ENOUGH_MEMORY:
    case ERROR_OUTOFMEMORY:
      return -ENOMEM;
    default:
      return -EIO;
  }
}

// One event per thread: with a shared one, one thread could take the completion of another.
struct Event {
  HANDLE handle = CreateEventW(nullptr, TRUE, FALSE, nullptr);
  ~Event() {
    if (handle) CloseHandle(handle);
  }
};
}  // namespace

int32_t File::open(const char *path, bool direct) {
  close();
  const int length = MultiByteToWideChar(CP_UTF8, 0, path, -1, nullptr, 0);
  if (length <= 0) return -EINVAL;
  std::wstring wide(static_cast<size_t>(length), L'\0');
  MultiByteToWideChar(CP_UTF8, 0, path, -1, &wide[0], length);
  // Overlapped, since a synchronous handle would let one thread read at a time.
  const DWORD flags = FILE_FLAG_OVERLAPPED | (direct ? FILE_FLAG_NO_BUFFERING : 0);
  HANDLE handle = CreateFileW(wide.c_str(), GENERIC_READ,
                              FILE_SHARE_READ | FILE_SHARE_WRITE | FILE_SHARE_DELETE, nullptr,
                              OPEN_EXISTING, flags, nullptr);
  if (handle == INVALID_HANDLE_VALUE) return error_code(GetLastError());
  handle_ = reinterpret_cast<intptr_t>(handle);
  return 0;
}

void File::close() {
  if (handle_ != -1) CloseHandle(reinterpret_cast<HANDLE>(handle_));
  handle_ = -1;
}

int64_t File::read_at(void *dst, int64_t num_bytes, int64_t offset) const {
  static thread_local Event event;
  if (!event.handle) return -ENOMEM;
  OVERLAPPED request = {};
  request.Offset = static_cast<DWORD>(offset);
  request.OffsetHigh = static_cast<DWORD>(offset >> 32);
  request.hEvent = event.handle;
  HANDLE handle = reinterpret_cast<HANDLE>(handle_);
  const DWORD length = static_cast<DWORD>(num_bytes < kMaxRead ? num_bytes : kMaxRead);
  DWORD got = 0;
  if (!ReadFile(handle, dst, length, nullptr, &request)) {
    const DWORD error = GetLastError();
    if (error == ERROR_HANDLE_EOF) return 0;
    if (error != ERROR_IO_PENDING) return error_code(error);
  }
  if (!GetOverlappedResult(handle, &request, &got, TRUE)) {
    const DWORD error = GetLastError();
    return error == ERROR_HANDLE_EOF ? 0 : error_code(error);
  }
  return got;
}

void File::expect_random() const {}
void File::forget(int64_t, int64_t) const {}
int32_t File::is_cached(int64_t) const { return -ENOSYS; }

void *map_memory(int64_t num_bytes) {
  if (num_bytes <= 0) return nullptr;
  const SIZE_T size = static_cast<SIZE_T>(pages(num_bytes));
  // Addresses are reserved at 64 KiB steps: find room for an aligned block, then take that place.
  // Another thread may take it first, hence the few attempts.
  for (int attempt = 0; attempt < 16; ++attempt) {
    void *room = VirtualAlloc(nullptr, size + kHugePage, MEM_RESERVE, PAGE_NOACCESS);
    if (!room) return nullptr;
    const uintptr_t mask = static_cast<uintptr_t>(kHugePage - 1);
    const uintptr_t aligned = (reinterpret_cast<uintptr_t>(room) + mask) & ~mask;
    VirtualFree(room, 0, MEM_RELEASE);
    void *memory = VirtualAlloc(reinterpret_cast<void *>(aligned), size, MEM_RESERVE | MEM_COMMIT,
                                PAGE_READWRITE);
    if (memory) return memory;
  }
  return nullptr;
}

void unmap_memory(void *memory, int64_t) {
  if (memory) VirtualFree(memory, 0, MEM_RELEASE);
}

void discard_memory(void *, int64_t) {}

int64_t thread_cpu_ns() {
  FILETIME created, ended, kernel, user;
  if (!GetThreadTimes(GetCurrentThread(), &created, &ended, &kernel, &user)) return 0;
  const auto ticks = [](const FILETIME &time) {
    return (static_cast<int64_t>(time.dwHighDateTime) << 32) | time.dwLowDateTime;
  };
  return (ticks(kernel) + ticks(user)) * 100;
}

int64_t last_cache_bytes() { return 0; }

std::vector<int> allowed_cores() {
  std::vector<int> cores;
  DWORD_PTR process = 0, system = 0;
  if (GetProcessAffinityMask(GetCurrentProcess(), &process, &system)) {
    for (int core = 0; core < static_cast<int>(sizeof(process) * 8); ++core) {
      if (process >> core & 1) cores.push_back(core);
    }
  }
  return cores;
}

bool pin_thread(int core) {
  return SetThreadAffinityMask(GetCurrentThread(), static_cast<DWORD_PTR>(1) << core) != 0;
}

Pinned::Pinned(int core) {
  if (core < 0) return;
  const DWORD_PTR mask = static_cast<DWORD_PTR>(1) << core;
  const DWORD_PTR before = SetThreadAffinityMask(GetCurrentThread(), mask);
  std::memcpy(before_, &before, sizeof(before));
  is_pinned_ = before != 0;
}

Pinned::~Pinned() {
  DWORD_PTR before;
  std::memcpy(&before, before_, sizeof(before));
  if (is_pinned_) SetThreadAffinityMask(GetCurrentThread(), before);
}

SharpTimer::SharpTimer() {}
SharpTimer::~SharpTimer() {}

void block_signals() {}

#else  // POSIX

int32_t File::open(const char *path, bool direct) {
  close();
  int flags = O_RDONLY | O_CLOEXEC;
#if defined(__linux__)
  if (direct) flags |= O_DIRECT;
#endif
  int handle;
  do {
    handle = ::open(path, flags);
  } while (handle < 0 && errno == EINTR);
  if (handle < 0) return -errno;
#if defined(__APPLE__)
  if (direct && ::fcntl(handle, F_NOCACHE, 1) != 0) {
    const int32_t error = -errno;
    ::close(handle);
    return error;
  }
#elif !defined(__linux__)
  if (direct) {
    ::close(handle);
    return -EINVAL;
  }
#endif
  handle_ = handle;
  return 0;
}

void File::close() {
  if (handle_ != -1) ::close(static_cast<int>(handle_));
  handle_ = -1;
}

int64_t File::read_at(void *dst, int64_t num_bytes, int64_t offset) const {
  const size_t length = static_cast<size_t>(num_bytes < kMaxRead ? num_bytes : kMaxRead);
  ssize_t got;
  do {
    got = ::pread(static_cast<int>(handle_), dst, length, static_cast<off_t>(offset));
  } while (got < 0 && errno == EINTR);
  return got < 0 ? -errno : got;
}

void File::expect_random() const {
#if defined(__APPLE__)
  ::fcntl(static_cast<int>(handle_), F_RDAHEAD, 0);
#else
  ::posix_fadvise(static_cast<int>(handle_), 0, 0, POSIX_FADV_RANDOM);
#endif
}

void File::forget(int64_t offset, int64_t num_bytes) const {
#if defined(__APPLE__)
  (void)offset, (void)num_bytes;  // no such call; a direct File never fills the cache
#else
  ::posix_fadvise(static_cast<int>(handle_), static_cast<off_t>(offset),
                  static_cast<off_t>(num_bytes), POSIX_FADV_DONTNEED);
#endif
}

int32_t File::is_cached(int64_t offset) const {
#if defined(__linux__)
  void *page = ::mmap(nullptr, kPage, PROT_READ, MAP_SHARED, static_cast<int>(handle_),
                      static_cast<off_t>(offset / kPage * kPage));
  if (page == MAP_FAILED) return -errno;
  unsigned char resident = 0;  // mincore does not touch the page
  const int32_t result = ::mincore(page, kPage, &resident) == 0 ? (resident & 1) : -errno;
  ::munmap(page, kPage);
  return result;
#else
  (void)offset;
  return -ENOSYS;
#endif
}

void *map_memory(int64_t num_bytes) {
  if (num_bytes <= 0 || num_bytes > INT64_MAX / 2) return nullptr;
  const size_t size = static_cast<size_t>(pages(num_bytes));
  // Take 2 MiB more and give back what lies before and after the aligned part.
  void *room = ::mmap(nullptr, size + kHugePage, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (room == MAP_FAILED) return nullptr;
  char *begin = static_cast<char *>(room);
  const size_t before =
      static_cast<size_t>(-reinterpret_cast<intptr_t>(begin) & (kHugePage - 1));
  if (before) ::munmap(begin, before);
  char *memory = begin + before;
  if (before < static_cast<size_t>(kHugePage)) ::munmap(memory + size, kHugePage - before);
#if defined(MADV_HUGEPAGE)
  ::madvise(memory, size, MADV_HUGEPAGE);  // refused where huge pages are off: slower, still right
#endif
  return memory;
}

void unmap_memory(void *memory, int64_t num_bytes) {
  if (memory) ::munmap(memory, static_cast<size_t>(pages(num_bytes)));
}

void discard_memory(void *memory, int64_t num_bytes) {
#if defined(__linux__)
  const intptr_t page = ::sysconf(_SC_PAGESIZE), begin = reinterpret_cast<intptr_t>(memory);
  const intptr_t first = (begin + page - 1) / page * page;
  const intptr_t end = (begin + num_bytes) / page * page;
  if (end > first) ::madvise(reinterpret_cast<void *>(first), end - first, MADV_DONTNEED);
#else
  (void)memory, (void)num_bytes;
#endif
}

int64_t thread_cpu_ns() {
  timespec time;
  if (::clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time) != 0) return 0;
  return static_cast<int64_t>(time.tv_sec) * 1000000000 + time.tv_nsec;
}

int64_t last_cache_bytes() {
#if defined(_SC_LEVEL3_CACHE_SIZE)
  return std::max(0L, ::sysconf(_SC_LEVEL3_CACHE_SIZE));
#else
  return 0;
#endif
}

std::vector<int> allowed_cores() {
  std::vector<int> cores;
#if defined(__linux__)
  cpu_set_t set;  // 1024 cores; a larger machine gets an empty list, which is allowed
  if (::sched_getaffinity(0, sizeof(set), &set) == 0) {
    for (int core = 0; core < CPU_SETSIZE; ++core) {
      if (CPU_ISSET(core, &set)) cores.push_back(core);
    }
  }
#endif
  return cores;
}

bool pin_thread(int core) {
#if defined(__linux__)
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(core, &set);
  return ::sched_setaffinity(0, sizeof(set), &set) == 0;
#else
  (void)core;
  return false;
#endif
}

Pinned::Pinned(int core) {
#if defined(__linux__)
  static_assert(sizeof(cpu_set_t) == sizeof(before_), "the room for a set of cores");
  if (core < 0 || ::sched_getaffinity(0, sizeof(before_), reinterpret_cast<cpu_set_t *>(before_))) {
    return;
  }
  is_pinned_ = pin_thread(core);
#else
  (void)core;
#endif
}

Pinned::~Pinned() {
#if defined(__linux__)
  if (is_pinned_) {
    ::sched_setaffinity(0, sizeof(before_), reinterpret_cast<cpu_set_t *>(before_));
  }
#endif
}

SharpTimer::SharpTimer() {
#if defined(__linux__)
  before_ = ::prctl(PR_GET_TIMERSLACK);
  if (before_ > 0) ::prctl(PR_SET_TIMERSLACK, 1UL);
#endif
}

SharpTimer::~SharpTimer() {
#if defined(__linux__)
  if (before_ > 0) ::prctl(PR_SET_TIMERSLACK, static_cast<unsigned long>(before_));
#endif
}

void block_signals() {
  sigset_t all;
  sigfillset(&all);
  ::pthread_sigmask(SIG_BLOCK, &all, nullptr);
}

#endif

}  // namespace em
