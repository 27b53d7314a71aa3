#include "uring.h"

#include <cerrno>

#include "platform.h"

#if defined(__linux__) && defined(__has_include)
#if __has_include(<linux/io_uring.h>)
#define EM_URING 1
#endif
#endif

#if defined(EM_URING)
#include <linux/io_uring.h>
#include <poll.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <cstring>

namespace em {
namespace {

constexpr int kMaxAttempts = 50;  // a millisecond each, where the system is short of memory

// The same on every architecture (alpha apart); older headers do not name them.
constexpr long kSetup = 425, kEnter = 426;

int enter(int ring, uint32_t num_submit, uint32_t num_wait) {
  const uint32_t flags = num_wait ? IORING_ENTER_GETEVENTS : 0;
  return static_cast<int>(::syscall(kEnter, ring, num_submit, num_wait, flags, nullptr, 0));
}

// The rings are shared with the kernel.
uint32_t load(const uint32_t *word) { return __atomic_load_n(word, __ATOMIC_ACQUIRE); }
void store(uint32_t *word, uint32_t value) { __atomic_store_n(word, value, __ATOMIC_RELEASE); }

void *map(int ring, uint64_t num_bytes, uint64_t what) {
  void *memory = ::mmap(nullptr, num_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, ring,
                        static_cast<off_t>(what));
  return memory == MAP_FAILED ? nullptr : memory;
}

}  // namespace

Uring::~Uring() {
  if (entries_) ::munmap(entries_, entries_bytes_);
  if (rings_) ::munmap(rings_, rings_bytes_);
  if (ring_ >= 0) ::close(ring_);
}

int32_t Uring::open(int32_t num_reads) {
  io_uring_params params;
  std::memset(&params, 0, sizeof(params));
  // One more for the nop. The completion ring has twice the room: it cannot overflow.
  uint32_t num_entries = 1;
  while (num_entries < static_cast<uint32_t>(num_reads) + 1) num_entries *= 2;
  const int ring = static_cast<int>(::syscall(kSetup, num_entries, &params));
  if (ring < 0) return -errno;
  // Kernels without it (before 5.4) have no plain read either.
  const bool is_one_mapping = (params.features & IORING_FEAT_SINGLE_MMAP) != 0;
  const uint64_t sq_bytes = params.sq_off.array + params.sq_entries * sizeof(uint32_t);
  const uint64_t cq_bytes = params.cq_off.cqes + params.cq_entries * sizeof(io_uring_cqe);
  rings_bytes_ = sq_bytes > cq_bytes ? sq_bytes : cq_bytes;
  entries_bytes_ = params.sq_entries * sizeof(io_uring_sqe);
  if (is_one_mapping) {
    rings_ = static_cast<char *>(map(ring, rings_bytes_, IORING_OFF_SQ_RING));
    entries_ = map(ring, entries_bytes_, IORING_OFF_SQES);
  }
  if (!rings_ || !entries_) {
    ::close(ring);
    return is_one_mapping ? -ENOMEM : -ENOSYS;
  }
  const auto word = [this](uint32_t offset) {
    return reinterpret_cast<uint32_t *>(rings_ + offset);
  };
  sq_head_ = word(params.sq_off.head);
  sq_tail_ = word(params.sq_off.tail);
  sq_mask_ = *word(params.sq_off.ring_mask);
  cq_head_ = word(params.cq_off.head);
  cq_tail_ = word(params.cq_off.tail);
  cq_mask_ = *word(params.cq_off.ring_mask);
  completions_ = rings_ + params.cq_off.cqes;
  uint32_t *slots = word(params.sq_off.array);
  for (uint32_t i = 0; i < params.sq_entries; ++i) slots[i] = i;  // entry i lies at place i
  ring_ = ring;
  return 0;
}

void *Uring::push() {
  const uint32_t tail = *sq_tail_;
  io_uring_sqe *entry = static_cast<io_uring_sqe *>(entries_) + (tail & sq_mask_);
  std::memset(entry, 0, sizeof(*entry));
  return entry;
}

void Uring::push_read(const File &file, void *dst, int64_t num_bytes, int64_t offset,
                      uint64_t tag) {
  io_uring_sqe *entry = static_cast<io_uring_sqe *>(push());
  entry->opcode = IORING_OP_READ;
  entry->fd = static_cast<int32_t>(file.handle());
  entry->addr = reinterpret_cast<uintptr_t>(dst);
  entry->len = static_cast<uint32_t>(num_bytes);
  entry->off = static_cast<uint64_t>(offset);
  entry->user_data = tag;
  store(sq_tail_, *sq_tail_ + 1);
}

void Uring::push_nop(uint64_t tag) {
  io_uring_sqe *entry = static_cast<io_uring_sqe *>(push());
  entry->opcode = IORING_OP_NOP;
  entry->user_data = tag;
  store(sq_tail_, *sq_tail_ + 1);
}

uint32_t Uring::num_pushed() const { return *sq_tail_ - load(sq_head_); }

int32_t Uring::submit() {
  for (int attempt = 0; num_pushed() > 0;) {
    const int num_taken = enter(ring_, num_pushed(), 0);
    if (num_taken > 0 || (num_taken < 0 && errno == EINTR)) continue;
    if (num_taken < 0 && errno != EAGAIN && errno != EBUSY) return -errno;
    if (++attempt == kMaxAttempts) return -EAGAIN;
    const timespec pause = {0, 1000000};
    ::nanosleep(&pause, nullptr);
  }
  return 0;
}

bool Uring::take_back(uint64_t *tag) {
  if (num_pushed() == 0) return false;
  const uint32_t last = *sq_tail_ - 1;
  *tag = static_cast<const io_uring_sqe *>(entries_)[last & sq_mask_].user_data;
  store(sq_tail_, last);
  return true;
}

bool Uring::has_completion() const { return load(cq_tail_) != load(cq_head_); }

bool Uring::pop(uint64_t *tag, int32_t *result) {
  if (!has_completion()) return false;
  const uint32_t head = *cq_head_;
  const io_uring_cqe &completion =
      static_cast<const io_uring_cqe *>(completions_)[head & cq_mask_];
  *tag = completion.user_data;
  *result = completion.res;
  store(cq_head_, head + 1);
  return true;
}

void Uring::wait() {
  while (enter(ring_, 0, 1) < 0 && errno == EINTR) {
  }
}

void Uring::wait_until(int64_t due_ns) {
  const SharpTimer sharp;
  pollfd ring = {ring_, POLLIN, 0};
  for (int64_t left; !has_completion() && (left = due_ns - monotonic_ns()) > 0;) {
    const timespec pause = {static_cast<time_t>(left / 1000000000),
                            static_cast<long>(left % 1000000000)};
    ::ppoll(&ring, 1, &pause, nullptr);
  }
}

}  // namespace em

#else

namespace em {

Uring::~Uring() {}
int32_t Uring::open(int32_t) { return -ENOSYS; }
void Uring::push_read(const File &, void *, int64_t, int64_t, uint64_t) {}
void Uring::push_nop(uint64_t) {}
int32_t Uring::submit() { return -ENOSYS; }
bool Uring::take_back(uint64_t *) { return false; }
bool Uring::has_completion() const { return false; }
bool Uring::pop(uint64_t *, int32_t *) { return false; }
void Uring::wait() {}
void Uring::wait_until(int64_t) {}

}  // namespace em
#endif
