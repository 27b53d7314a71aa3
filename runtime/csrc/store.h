// What the native step needs of a store beside the C interface.
#pragma once
#include "edgemoe_core.h"

namespace em {

// Of a record that is being read: its gate|up section has landed and was checked.
constexpr int32_t kGateUpReady = 3;

// EM_ABSENT, EM_READING, kGateUpReady, EM_READY, or the negative status of a failure. Acquires the
// bytes it speaks of. The public status stays EM_READING until the whole record is there.
void fetch_ahead(const em_store *store, int64_t first, int64_t end);  // what arrival_of reads
int32_t arrival_of(const em_store *store, int32_t key);

// Take note of what has landed and start what is queued. Nobody else does where there are no reader
// threads: call it between two pieces of work. A load where nothing has happened.
void pump(em_store *store);

// Block until arrival_of(keys[i]) != seen[i] for some i: that position, or -1 for an empty list or
// a key out of range.
int64_t wait_any(em_store *store, const int32_t *keys, const int32_t *seen, int64_t n);

// What is still to land: demanded bytes that nobody asked the system for yet, and all bytes.
struct Load {
  int64_t waiting_bytes, backlog_bytes;
};
Load load_of(em_store *store);
// Size of the requests that reads without demand are cut into: whole pages.
void set_guess_bytes(em_store *store, int64_t num_bytes);

const em_record *records_of(const em_store *store);  // as given to em_store_open
int64_t num_records_of(const em_store *store);
int32_t status_of(const em_store *store, int32_t key);  // acquires the bytes of a READY record
void set_absent(em_store *store, int32_t key);  // not while it is being read

}  // namespace em
