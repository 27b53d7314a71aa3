// What the native step needs of a store beside the C interface.
#pragma once
#include "edgemoe_core.h"

namespace em {

// Block until one of keys[n] is no longer EM_READING; its position, or -1 for an empty list or a
// key out of range.
int64_t wait_any(em_store *store, const int32_t *keys, int64_t n);

const em_record *records_of(const em_store *store);  // as given to em_store_open
int64_t num_records_of(const em_store *store);
int32_t status_of(const em_store *store, int32_t key);  // acquires the bytes of a READY record

}  // namespace em
