#include "slots.h"

#include <algorithm>
#include <cstring>

#include "platform.h"
#include "store.h"

namespace em {

Slots::Slots(em_store *store, void *arena, int64_t capacity_bytes)
    : store_(store),
      arena_(static_cast<uint8_t *>(arena)),
      extents_(capacity_bytes),
      address_(static_cast<size_t>(num_records_of(store)) + 1, 0) {  // never a null pointer
  const em_record *records = records_of(store);
  for (int64_t key = 0; key < num_records_of(store); ++key) {
    num_bytes_.push_back(records[key].num_bytes);
  }
}

bool Slots::place(int32_t key) {
  const int64_t offset = extents_.allocate(num_bytes_of(key));
  if (offset < 0) return false;
  address_[key] = reinterpret_cast<uint64_t>(arena_ + offset);
  ++num_resident_;
  return true;
}

void Slots::take_over(int32_t victim, int32_t key) {
  address_[key] = address_[victim];
  address_[victim] = 0;
  set_absent(store_, victim);
}

void Slots::drop(int32_t key) {
  const uint8_t *memory = reinterpret_cast<const uint8_t *>(address_[key]);
  extents_.free(memory - arena_, num_bytes_of(key));
  address_[key] = 0;
  --num_resident_;
  set_absent(store_, key);
}

std::vector<Placed> Slots::placed() const {
  std::vector<Placed> records;
  records.reserve(static_cast<size_t>(num_resident_));
  for (int32_t key = 0; key < static_cast<int32_t>(address_.size()); ++key) {
    if (address_[key] == 0) continue;
    const int64_t offset = reinterpret_cast<const uint8_t *>(address_[key]) - arena_;
    records.push_back({offset, num_bytes_of(key), key, status_of(store_, key) == EM_READING});
  }
  std::sort(records.begin(), records.end(),
            [](const Placed &a, const Placed &b) { return a.offset < b.offset; });
  return records;
}

bool Slots::join(int64_t num_bytes, double max_moved_bytes, const std::vector<Placed> &records) {
  std::vector<Move> moves;
  int64_t moved_bytes = 0;
  if (!extents_.plan(num_bytes, records, &moves, &moved_bytes)) return false;
  if (static_cast<double>(moved_bytes) > max_moved_bytes) return false;
  for (const Move &each : moves) {
    const uint8_t *memory = reinterpret_cast<const uint8_t *>(address_[each.key]);
    extents_.free(memory - arena_, num_bytes_of(each.key));
    extents_.take(each.target, num_bytes_of(each.key));
    move(each);
  }
  return true;
}

std::vector<int32_t> Slots::shrink(int64_t capacity_bytes) {
  std::vector<int32_t> homeless;
  for (const Placed &record : placed()) {
    if (record.offset + record.num_bytes <= capacity_bytes) continue;
    const int64_t target = extents_.allocate(record.num_bytes, capacity_bytes);
    if (target < 0) {
      homeless.push_back(record.key);
    } else {
      move({record.key, target});
      extents_.free(record.offset, record.num_bytes);
    }
  }
  return homeless;
}

void Slots::resize(int64_t capacity_bytes, bool keeps_memory) {
  const int64_t old = extents_.num_bytes();
  extents_.resize(capacity_bytes);
  if (capacity_bytes < old && !keeps_memory) discard_memory(arena_ + capacity_bytes, old - capacity_bytes);
}

void Slots::move(const Move &move) {
  if (status_of(store_, move.key) == EM_READY) {  // else its bytes are still to be read
    const void *source = reinterpret_cast<const void *>(address_[move.key]);
    std::memmove(arena_ + move.target, source, static_cast<size_t>(num_bytes_of(move.key)));
    moved_bytes_ += num_bytes_of(move.key);
  }
  address_[move.key] = reinterpret_cast<uint64_t>(arena_ + move.target);
}

}  // namespace em
