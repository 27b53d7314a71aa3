// Where each resident record lies in the arena: gives memory, takes it back, moves. Twin of
// runtime/slots.py. Knows nothing of demand: who goes or moves is decided by the cache.
#pragma once
#include <cstdint>
#include <vector>

#include "edgemoe_core.h"
#include "extents.h"
#include "platform.h"

namespace em {

class Slots {
 public:
  // `capacity_bytes` of the arena, in extents of whole pages, for the records of the store.
  Slots(em_store *store, void *arena, int64_t capacity_bytes);

  const Extents &extents() const { return extents_; }
  int64_t num_resident() const { return num_resident_; }
  int64_t moved_bytes() const { return moved_bytes_; }
  uint64_t address(int32_t key) const { return address_[key]; }  // 0: absent
  const uint64_t *addresses() const { return address_.data(); }
  int64_t num_bytes_of(int32_t key) const { return num_bytes_[key]; }
  void fetch_ahead(int64_t first, int64_t end) const {
    em::fetch_ahead(address_.data(), first, end);
    em::fetch_ahead(num_bytes_.data(), first, end);
  }

  bool place(int32_t key);  // false where no single extent is large enough
  // Give the memory of one record to another of the same size. Neither is being read.
  void take_over(int32_t victim, int32_t key);
  void drop(int32_t key);  // not while it is being read
  // Move records so that one free extent holds `num_bytes`, for at most `max_moved_bytes`. Neither
  // the records for which is_fixed is true nor those being read move.
  template <class IsFixed>
  bool join(int64_t num_bytes, double max_moved_bytes, const IsFixed &is_fixed) {
    if (extents_.free_bytes() < num_bytes) return false;
    std::vector<Placed> records = placed();
    for (Placed &record : records) record.is_fixed = record.is_fixed || is_fixed(record.key);
    return join(num_bytes, max_moved_bytes, records);
  }
  // Move records below a new end; the keys of those that found no place there. No record may be
  // being read. The caller drops the returned ones, then resizes.
  std::vector<int32_t> shrink(int64_t capacity_bytes);
  // Move the end; memory beyond it goes back to the system.
  void resize(int64_t capacity_bytes, bool keeps_memory);

 private:
  std::vector<Placed> placed() const;  // in address order; fixed are those being read
  bool join(int64_t num_bytes, double max_moved_bytes, const std::vector<Placed> &records);
  void move(const Move &move);

  em_store *store_;
  uint8_t *arena_;
  Extents extents_;
  std::vector<uint64_t> address_;  // by key
  std::vector<int64_t> num_bytes_;
  int64_t num_resident_ = 0, moved_bytes_ = 0;
};

}  // namespace em
