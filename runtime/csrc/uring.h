// io_uring by its system calls: reads of one process, handed over and taken back in batches.
#pragma once
#include <cstdint>

namespace em {

class File;

// One ring. The caller serialises everything but `has_completion`, and `wait`: one thread at a time
// may be in it while others push and submit. They must not pop then: a waiter counts completions
// from where the ring stood when it entered.
class Uring {
 public:
  Uring() = default;
  Uring(const Uring &) = delete;
  Uring &operator=(const Uring &) = delete;
  ~Uring();

  // Room for `num_reads` at a time. 0, or -errno where there is no io_uring or none is allowed.
  int32_t open(int32_t num_reads);
  bool is_open() const { return ring_ >= 0; }

  void push_read(const File &file, void *dst, int64_t num_bytes, int64_t offset, uint64_t tag);
  void push_nop(uint64_t tag);  // completes at once: wakes the waiter
  // Hand over what was pushed. After -errno, `take_back` gives the tags of what was not taken.
  int32_t submit();
  bool take_back(uint64_t *tag);

  bool has_completion() const;
  bool pop(uint64_t *tag, int32_t *result);  // result: bytes read or -errno
  void wait();                               // until there is a completion
  void wait_until(int64_t due_ns);           // or until then, on the monotonic clock

 private:
  void *push();  // an empty submission, given to the system by the next `submit`
  uint32_t num_pushed() const;

  int ring_ = -1;
  char *rings_ = nullptr;  // submission and completion rings, one mapping
  void *entries_ = nullptr;
  uint64_t rings_bytes_ = 0, entries_bytes_ = 0;
  uint32_t *sq_head_ = nullptr, *sq_tail_ = nullptr, *cq_head_ = nullptr, *cq_tail_ = nullptr;
  uint32_t sq_mask_ = 0, cq_mask_ = 0;
  const void *completions_ = nullptr;
};

}  // namespace em
