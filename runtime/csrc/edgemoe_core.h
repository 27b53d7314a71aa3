/* edgemoe native core: the plain C interface.
 *
 * Memory layout: runtime/format.py. Shape letters: T tokens, D hidden, F expert width, H heads,
 * KV key/value heads, hd head dimension. All arrays are row-major and dense. Nothing here throws;
 * functions that can fail return 0 or a negative code. Unless said, functions may be called from
 * any thread; a pool serves one call at a time.
 */
#ifndef EDGEMOE_CORE_H
#define EDGEMOE_CORE_H

#include <stdint.h>

#if defined(_WIN32)
#define EM_API __declspec(dllexport)
#else
#define EM_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

#define EM_ABI_VERSION 6

enum { EM_MODE_SYM = 0, EM_MODE_ASYM = 1, EM_MODE_BF16 = 2, EM_MODE_FP16 = 3, EM_MODE_NF4 = 4 };

/* Status of a record; see em_store_status. Negative values are errors. */
enum {
  EM_ABSENT = 0,
  EM_READING = 1,
  EM_READY = 2,
  EM_ERR_CRC = -10001,   /* bytes read, checksum differs */
  EM_ERR_SHORT = -10002, /* the file ends inside the record */
  EM_ERR_ARG = -10003,   /* other negative values are -errno */
  EM_ERR_ROOM = -10004,   /* the records do not fit into the expert cache together */
  EM_ERR_STOPPED = -10005 /* em_decode: `stop` was set */
};

/* How a matrix is stored. group_size is 0 for the 16-bit modes. */
typedef struct em_format {
  int32_t bits, group_size, mode;
} em_format;

/* One expert record of the store's index. down_offset counts from the start of the record; both
 * sections run to the next section or the end of the record, and their crc32c covers the padding.
 * rank > 0: all neurons behind the first `dense` are products of that rank; see runtime/format.py. */
typedef struct em_record {
  int64_t offset, num_bytes, down_offset;
  em_format gate_up, down;
  uint32_t crc_gate_up, crc_down;
  int32_t file;      /* which of the files of em_store_open_files it lies in */
  em_format factors; /* of U_g, U_u and V_d */
  int32_t dense, rank;
} em_record;

/* ---- library ------------------------------------------------------------------------------- */
/* EM_ABI_VERSION of the header that the library was built from. */
EM_API int32_t em_abi_version(void);
/* Layout constants, compared with runtime/format.py when the library is loaded. */
EM_API extern const int32_t em_format_version, em_page_bytes, em_tile_rows, em_line_bytes, em_act_group;
/* Instruction set in use: "amx", "avx512vnni", "avxvnni", "avx2", "neon-i8mm", "neon-dotprod" or
 * "scalar". Chosen once; EDGEMOE_ISA overrides. */
EM_API const char *em_isa(void);
/* crc32c of num_bytes >= 0 bytes of any alignment; seed 0, or the result for the bytes before them. */
EM_API uint32_t em_crc32c(uint32_t seed, const void *data, int64_t num_bytes);

/* ---- threads ------------------------------------------------------------------------------- */
typedef struct em_pool em_pool;
/* num_threads, 1 .. 1024, includes the caller: num_threads - 1 threads are made, which block all
 * signals and, where there are cores enough, stay on one core each. Returns NULL where they cannot be
 * made. Wherever a pool is taken, NULL means the caller alone. Two callers of one pool take turns;
 * from inside a call nothing may use its pool again. */
EM_API em_pool *em_pool_create(int32_t num_threads);
/* Ends the threads. No call may be using the pool; NULL is allowed. */
EM_API void em_pool_destroy(em_pool *pool);

/* ---- packed matrices ----------------------------------------------------------------------- */
/* Bytes of a packed matrix [rows, cols], its last tile padded to 16 rows; EM_ERR_ARG for a format that
 * does not exist, columns that are no multiple of its group (16-bit: of 2), or a side outside
 * 1 .. 2^30. Packed bytes may lie at any address; on 64 bytes they are read fastest. */
EM_API int64_t em_matrix_bytes(int64_t rows, int64_t cols, em_format format);
/* codes u8 [rows, cols], below 2^bits; scales, mins fp16 [rows, cols / G] (mins NULL unless the mode
 * is EM_MODE_ASYM) -> dst [em_matrix_bytes]. Returns 0 or EM_ERR_ARG. */
EM_API int32_t em_pack_codes(const uint8_t *codes, const uint16_t *scales, const uint16_t *mins,
                             int64_t rows, int64_t cols, em_format format, uint8_t *dst);
/* weights bf16/fp16 [rows, cols] as 16-bit words -> 16-bit tiles in dst [em_matrix_bytes], bits
 * unchanged. Returns 0 or EM_ERR_ARG. */
EM_API int32_t em_pack_16bit(const uint16_t *weights, int64_t rows, int64_t cols, uint8_t *dst);
/* Dequantize rows row_begin .. row_begin + num_rows of a packed matrix into fp32 [num_rows, cols].
 * Returns 0 or EM_ERR_ARG. */
EM_API int32_t em_unpack_rows(const uint8_t *packed, int64_t rows, int64_t cols, em_format format,
                              int64_t row_begin, int64_t num_rows, float *dst);
/* y [T, rows] = x [T, cols] . W^T (+ bias [rows], may be NULL). Quantized modes quantize x to int8
 * in groups of 32 columns; 16-bit modes use fp32 x. A row of y has the same bits for every T, every
 * number of threads and every position in the batch. x and y must not overlap.
 * Returns 0, EM_ERR_ARG or -ENOMEM. */
EM_API int32_t em_linear(em_pool *pool, const uint8_t *packed, int64_t rows, int64_t cols,
                         em_format format, const float *x, int64_t num_tokens, const float *bias,
                         float *y);

/* ---- attention and norms ------------------------------------------------------------------- */
/* y[t] = x[t] / sqrt(mean(x[t]^2) + eps) * weight; x, y [T, cols], weight [cols]; in place allowed.
 * The caller alone computes. */
EM_API void em_rms_norm(const float *x, const float *weight, int64_t num_tokens, int64_t cols,
                        float eps, float *y);
/* Causal attention of T new tokens at positions position .. position + T - 1, whose keys and values
 * are already stored. q, out [T, H, hd]; keys, values [KV, capacity, hd] of fp32 (kv_bits 32), bf16
 * (16) or int8 (8); key_scales, value_scales [KV, capacity] stand for int8 only: a number is its int8
 * times the scale of its token and head. window > 0: token p sees keys p - window + 1 .. p. sinks
 * are not supported. A row of out depends on neither T nor the number of threads.
 * Returns 0, EM_ERR_ARG or -ENOMEM. */
EM_API int32_t em_attention(em_pool *pool, const float *q, const void *keys, const void *values,
                            const float *key_scales, const float *value_scales, int32_t kv_bits,
                            int64_t num_tokens, int64_t num_heads, int64_t num_kv_heads,
                            int64_t head_dim, int64_t capacity, int64_t position, int64_t window,
                            float scale, float *out);

/* ---- memory for records -------------------------------------------------------------------- */
/* Anonymous memory, 2 MiB aligned, huge pages asked for, not touched: it counts as used when it is
 * first written. NULL where there is none, or for num_bytes < 1. */
EM_API void *em_arena_create(int64_t num_bytes);
/* With the num_bytes of its creation; NULL is allowed. No store may still be reading into it. */
EM_API void em_arena_destroy(void *arena, int64_t num_bytes);
/* Read num_bytes (a multiple of 64) once with the widest loads of the instruction set, split among
 * the threads: the memory roof beside a kernel. Returns the union of its 64-bit words. */
EM_API uint64_t em_memory_sweep(em_pool *pool, const void *data, int64_t num_bytes);

/* ---- index --------------------------------------------------------------------------------- */
/* A layer that has experts; their records are keys first_key .. first_key + num_experts - 1. */
typedef struct em_layer {
  int64_t layer, num_experts, width, first_key; /* layer: its number in the model */
  int64_t num_rows;      /* of its router; more than experts where several were merged into one */
  const int32_t *bodies; /* [num_rows]: the expert of each row, as em_decoder_set_bodies takes them;
                            NULL: row e is expert e */
} em_layer;
/* What a store folder holds; memory of the index, valid until em_index_close. */
typedef struct em_index {
  int64_t hidden, num_layers, num_records, max_record_bytes;
  const em_layer *layers;   /* [num_layers], ascending */
  const em_record *records; /* [num_records] in (layer, expert) order, as em_store_open takes them */
  const char *experts_path; /* UTF-8, as em_store_open takes it */
} em_index;
/* Read store.json and the header of experts.safetensors in `folder` (UTF-8), and check that they
 * agree: every offset, size, format and checksum field, for any bytes whatever. Reads no weights.
 * On failure returns NULL and writes what is wrong into error[error_bytes] (may be NULL). */
EM_API const em_index *em_index_open(const char *folder, char *error, int64_t error_bytes);
EM_API void em_index_close(const em_index *index); /* NULL is allowed */
/* The key of a record, or EM_ERR_ARG where there is none. */
EM_API int32_t em_index_key(const em_index *index, int64_t layer, int64_t expert);

/* ---- store --------------------------------------------------------------------------------- */
typedef struct em_store em_store;
/* Open an experts.safetensors. records[num_records] is copied; a key is an index into it.
 * depth: requests that are being read at a time, 1 .. 256; a record is two. Guesses get half of it.
 * io: 0 direct where the file system takes it, else buffered; 1 direct or fail; 2 buffered.
 * method: direct reads go through io_uring where there is one and it is allowed; else, and buffered
 * ones always, through `depth` reader threads.
 * On failure returns NULL and sets *error to -errno, or EM_ERR_ARG for a record off its pages. */
enum { EM_METHOD_AUTO = 0, EM_METHOD_THREADS = 1 };
EM_API em_store *em_store_open(const char *path, const em_record *records, int64_t num_records,
                               int32_t depth, int32_t io, int32_t method, int32_t *error);
/* The same for records that lie in several files, 1 .. 16: record.file counts paths [num_files]. They
 * are read alike, all directly or all buffered. */
EM_API em_store *em_store_open_files(const char *const *paths, int32_t num_files,
                                     const em_record *records, int64_t num_records, int32_t depth,
                                     int32_t io, int32_t method, int32_t *error);
/* Drops queued reads and waits for those in flight; then the memory of records is the caller's again.
 * No call may be using the store; NULL is allowed. */
EM_API void em_store_close(em_store *store);
/* 1 where reads go past the page cache, else 0. */
EM_API int32_t em_store_is_direct(const em_store *store);
/* 1: io_uring reads; 0: reader threads, since nothing else was asked for; -errno: reader threads,
 * since io_uring was refused with it. */
EM_API int32_t em_store_uring(const em_store *store);
/* int32 [num_records], owned by the store. The store writes EM_READING, then EM_READY or an error;
 * the caller writes EM_ABSENT when it gives the memory to another record (never while EM_READING). */
EM_API int32_t *em_store_status(em_store *store);
/* int64 [num_records], owned by the store: em's monotonic clock (ns) when the last read of each
 * record ended; to be read after its status. */
EM_API const int64_t *em_store_landed_ns(const em_store *store);
/* Queue reads of whole records into dst[i] (4096-aligned, record-sized), in order of urgency.
 * priority: 0 demanded now, 1 a guess for the next layer, 2 speculation. A lower number goes first;
 * guesses are read in requests of at most 1 MiB, so that a demand never waits long behind them.
 * The checksum of a section is checked the first time it is read. All or nothing: EM_ERR_ARG for a
 * key out of range, memory that is not aligned, or a record that is being read. */
EM_API int32_t em_store_submit(em_store *store, int64_t num, const int32_t *keys, void *const *dst,
                               int32_t priority);
/* Make queued reads more urgent: behind what was already queued with this priority. Does nothing to
 * records that are not being read or are as urgent already. */
EM_API int32_t em_store_promote(em_store *store, int64_t num, const int32_t *keys,
                                int32_t priority);
/* Do not read what was not yet asked of the system. The status becomes EM_ABSENT when the memory
 * may be used again: at once, or when requests under way have ended. A record of which everything
 * is under way ends as if it had not been cancelled; others than those being read do not change. */
EM_API int32_t em_store_cancel(em_store *store, int64_t num, const int32_t *keys);
/* Block until the record is READY or failed; returns its status. */
EM_API int32_t em_store_wait(em_store *store, int32_t key);
/* Take note of reads that have ended and start queued ones; does not block. Where io_uring reads,
 * this happens only here, in em_store_submit, em_store_wait and em_moe_run. */
EM_API void em_store_pump(em_store *store);
/* Emulate a drive of this rate, 0: none any more. It serves one request at a time, n bytes in
 * n / rate seconds, of those under way the most urgent next, and no request ends before its service
 * has; a drive that is slower than that stays so. May be changed at any time. Returns 0, or
 * EM_ERR_ARG for a negative rate. */
EM_API int32_t em_store_throttle(em_store *store, int64_t bytes_per_s);
typedef struct em_store_stats {
  int64_t num_reads, num_requests; /* records read or failed; requests to the system */
  int64_t num_bytes, cancelled_bytes; /* read; those of them that belong to cancelled records */
  int64_t priority_bytes[3];          /* num_bytes by priority */
  int64_t read_ns;                    /* sum over requests, waiting in the system's queue included */
  int64_t cpu_ns, crc_ns;             /* CPU time of reading, and of checking what was read */
  int64_t throttle_bytes_per_s, throttle_busy_ns; /* its rate now; time for which it was serving */
  int64_t idle_ns;                    /* in which nothing was queued or being read */
} em_store_stats;
/* Sums since the store was opened. */
EM_API void em_store_get_stats(em_store *store, em_store_stats *stats);

/* ---- guesses ------------------------------------------------------------------------------- */
/* While em_decode runs, a predictor tells which records the next layers with experts may want. Those
 * absent are read while storage would idle, as long as a gate finds that they gain more than they
 * cost: it measures how often guesses of each rank are right (which takes no reading), how fast the
 * drive is, how long layers take and wait. When the router has spoken, what was right goes on as
 * demanded, and what was wrong is not read any further. No result depends on it. */
enum {
  EM_PREDICT_PREVIOUS = 1, /* the experts of the same layer at the token before */
  EM_PREDICT_PROFILE = 2,  /* statistical tables */
  EM_PREDICT_ROUTER = 3,   /* the next layer's router on the residual of this one */
  EM_PREDICT_GIVEN = 4     /* `guesses` of em_decode_args */
};

/* What followed states: row r is of the state key[r], which was seen total[r] times and followed
 * count[j] times by expert[j], for j from begin[r] to begin[r + 1]. */
typedef struct em_state_table {
  int64_t num_states;
  const uint64_t *key; /* [num_states], ascending */
  const float *total;  /* [num_states] */
  const int64_t *begin; /* [num_states + 1] */
  const int32_t *expert;
  const float *count;
} em_state_table;
/* Tables of one layer of E experts behind one of E'; runtime/transitions.py. */
typedef struct em_place_tables {
  const float *popularity; /* [E] */
  const float *pairwise;   /* [E', E] */
  em_state_table paths, tokens; /* by the choices of the two layers before; by token id */
} em_place_tables;
/* scores [num_experts] of a layer after the choices active [num_active] of the layer before and
 * before [num_before] of the one before that, ascending each, 0 of them: not known; for this token,
 * -1: not known. */
EM_API void em_profile_scores(const em_place_tables *tables, float back_off, int64_t num_experts,
                              const int32_t *before, int64_t num_before, const int32_t *active,
                              int64_t num_active, int64_t token_id, float *scores);

typedef struct em_prefetch_options {
  int32_t predictor; /* EM_PREDICT_... */
  int32_t depth;     /* layers ahead, 1 or 2 */
  int32_t is_forced; /* 1: every guess is read, whatever it costs */
  float back_off;    /* of the tables */
  int64_t num_places;            /* of the tables: layers with experts */
  const em_place_tables *tables; /* [num_places], the caller's for good, or NULL */
} em_prefetch_options;
typedef struct em_prefetch em_prefetch;
/* One serves one decoder and one cache. NULL for options that cannot be, or where memory is short. */
EM_API em_prefetch *em_prefetch_create(const em_prefetch_options *options);
EM_API void em_prefetch_destroy(em_prefetch *prefetch); /* NULL is allowed */

/* Sums since creation. A guess is a record of which reading was begun. */
typedef struct em_prefetch_stats {
  int64_t num_layers, num_open; /* layers of which some predicted record was absent; of these, those of
                                   which a guess was read */
  int64_t num_guesses, guess_bytes;  /* their records, whole */
  int64_t num_in_time, num_late; /* demanded afterwards: whole by then; still being read */
  int64_t num_dropped, num_failed; /* not wanted and not read to the end; not readable */
  int64_t wasted_bytes; /* read, and dropped or evicted before anybody wanted them */
} em_prefetch_stats;
EM_API void em_prefetch_get_stats(const em_prefetch *prefetch, em_prefetch_stats *stats);

/* ---- expert cache -------------------------------------------------------------------------- */
/* Which records of a store are in memory, and where: one arena for all layers, accounted to the byte
 * (records of different sizes share it). A hint takes the records that a router has just demanded: it
 * counts hits and misses, pins the records, evicts by the policy to make room, and starts the reads;
 * a release unpins them. An address is good from hint to release. A cache serves one thread at a time.
 * Records of its store must be read, and its memory be used, through the cache alone. */
typedef struct em_cache em_cache;
typedef struct em_cache_config {
  void *arena;                         /* 4096-aligned, the caller's, outlives the store's reads */
  int64_t arena_bytes, capacity_bytes; /* capacity: a multiple of 4096, at most the arena */
  const int64_t *first_keys; /* [num_places + 1]: records first_keys[p] .. first_keys[p + 1] - 1 are
                                those of the p-th layer that has experts; all records, from 0 on */
  int64_t num_places;
  const char *policy; /* "forecast", "cycle", "lru", "lfu", "fifo": see runtime/policy.py */
  double half_life;   /* of "cycle", in tokens */
  double max_moved_per_byte; /* bytes moved to join free memory, per byte needed, rather than evict */
} em_cache_config;
/* Copies the configuration. NULL for one that cannot be, or where memory is short. */
EM_API em_cache *em_cache_create(em_store *store, const em_cache_config *config);
/* Does not touch the store, whose reads go on: the arena must stay until em_store_close. NULL is
 * allowed. */
EM_API void em_cache_destroy(em_cache *cache);
/* The next hints belong to this place, through which num_tokens go; a place that is not behind the
 * last one begins the next tokens. wanted [n] (NULL where n is 0): all records that the place will
 * need, in the order of use, where they come in more than one hint: those resident are kept for their
 * turn as long as there is other room. Returns 0 or EM_ERR_ARG. */
EM_API int32_t em_cache_begin_layer(em_cache *cache, int64_t place, int64_t num_tokens, int64_t n,
                                    const int32_t *wanted);
/* What the hints that follow will sum up: experts [num_tokens, top_k] of the place that has begun, by
 * number in the layer, -1: none; token after token. Returns 0 or EM_ERR_ARG. */
EM_API int32_t em_cache_route(em_cache *cache, int64_t num_tokens, int64_t top_k,
                              const int32_t *experts);
typedef struct em_cache_demand {
  int64_t num_hits, num_misses, num_bytes; /* records; bytes of misses and of guesses that came true */
  int64_t num_guessed; /* records that a guess has brought, which are neither */
} em_cache_demand;
/* Demand keys [n], each once, most urgent first; counts [n]: how many tokens want each (NULL: one
 * token's demand). Returns 1: pinned, *demand (may be NULL) says what was found; 0: they do not fit
 * beside what is pinned, and nothing changed but evictions; EM_ERR_ARG; what em_store_submit returned. */
EM_API int32_t em_cache_hint(em_cache *cache, int64_t n, const int32_t *keys, const double *counts,
                             em_cache_demand *demand);
/* Unpin what one hint pinned. A record whose read failed loses its memory. Returns 0 or EM_ERR_ARG. */
EM_API int32_t em_cache_release(em_cache *cache, int64_t n, const int32_t *keys);
/* What will be demanded for certain, in the order of use: absent ones begin to be read behind all
 * demand, resident ones stay until they are demanded, as long as both together take no more than
 * most_bytes and there is room. Demand that has no other room takes theirs. Neither a hit nor a miss;
 * when they are demanded they count as guessed. Returns how many of keys [n] that goes for, from the
 * first on, or a negative status; n 0: nothing is certain any more. */
EM_API int64_t em_cache_foresee(em_cache *cache, int64_t n, const int32_t *keys, int64_t most_bytes);
/* Let the policy start as if each of keys [n], each once, had been wanted counts [n] times just now.
 * Returns 0 or EM_ERR_ARG. */
EM_API int32_t em_cache_seed(em_cache *cache, int64_t n, const int32_t *keys, const double *counts);
/* Start reading those of keys [n] that are absent and fit without an eviction, in this order; counts
 * neither as demand nor as use. Writes their keys into placed [n] and returns their number, or a
 * negative status. em_store_wait tells of each how it went; em_cache_settle ends it. */
EM_API int64_t em_cache_preload(em_cache *cache, int64_t n, const int32_t *keys, int32_t *placed);
/* Wait for all reads whose records nobody has pinned; those that failed lose their memory. */
EM_API void em_cache_settle(em_cache *cache);
/* Another capacity, up or down within the arena. What no longer fits is evicted, and memory beyond
 * it goes back to the system, or with keeps_memory is the caller's, to write into. Returns 0, or
 * EM_ERR_ARG while records are pinned. */
EM_API int32_t em_cache_resize(em_cache *cache, int64_t capacity_bytes, int32_t keeps_memory);
/* [num_records]: where each record is or will be, 0: absent. Memory of the cache. */
EM_API const uint64_t *em_cache_addresses(const em_cache *cache);
/* Sums since the cache was made, by place; memory of the cache, read and written at any time between
 * calls. Times are those of em_decode; who runs layers otherwise may add its own. */
typedef struct em_place_stats {
  int64_t num_hits, num_misses, num_bytes; /* records; bytes read for demand, guesses that came true
                                              included */
  int64_t stall_ns, compute_ns; /* waiting when nothing could be computed; in routed experts else */
  int64_t num_guessed; /* records, neither hits nor misses: a guess has brought them, or a read of
                          certain demand */
} em_place_stats;
EM_API em_place_stats *em_cache_place_stats(em_cache *cache); /* [num_places] */
typedef struct em_cache_stats {
  int64_t capacity_bytes, resident_bytes, pinned_bytes, num_resident; /* now */
  int64_t num_evictions, moved_bytes; /* since the cache was made */
  int64_t native_ns; /* in em_decode, waiting included, without decisions of the cache */
  int64_t decide_ns; /* in em_decode: those decisions, without handing reads over; made beside
                        computing threads by the share of one, not where all wait for reads anyway */
  int64_t guess_ns;  /* part of native_ns: making guesses and dropping wrong ones, likewise */
  int64_t submit_ns; /* handing reads over, whoever asked for them; reading costs this time */
  int64_t num_foreseen, num_foreseen_in_time; /* reads that em_cache_foresee or em_decode began of
                                                 certain demand; those whole when it came */
} em_cache_stats;
EM_API void em_cache_get_stats(const em_cache *cache, em_cache_stats *stats);

/* ---- the experts of one layer -------------------------------------------------------------- */
/* For n experts in ascending id, whose records are resident or being read:
 *   y[t] += w * down( silu(gate x[t]) * (up x[t]) )   for each of the expert's (token t, w) pairs,
 * added in the order of the list whatever the order of arrival. Resident experts are computed
 * while the others are read; gate and up of an expert as soon as their section has landed, down when
 * the record is whole. Bits of y depend on neither T, the number of threads, nor what was resident. */
typedef struct em_moe_args {
  int64_t num_tokens, hidden, width, num_experts;
  const float *x;             /* [T, D] */
  float *y;                   /* [T, D], accumulated into */
  const int32_t *keys;        /* [n] */
  const uint8_t *const *data; /* [n] where each record is or will be */
  const int64_t *pair_begin;  /* [n + 1] into the pairs, pair_begin[0] = 0 */
  const int32_t *pair_token;  /* [pairs] */
  const float *pair_weight;   /* [pairs] routing weights */
  float *workspace;           /* em_moe_workspace_floats(...) floats */
  /* What calibration collects; NULL: nothing is done. Neither changes y. */
  float *pair_norm;     /* out [pairs] L2 norm of the expert's output, without the weight */
  float *hidden_square; /* [n, F] += squares of what goes into the down projection, over the pairs;
                           an expert then has no more than max(T, 256) of them */
  int64_t stall_ns;           /* out: time in which nothing could be computed */
  int64_t failed;             /* out: position of the expert that failed, or -1 */
} em_moe_args;
/* Floats of workspace (any alignment of float) for calls of at most so many tokens and pairs.
 * row_floats: the width of the experts, and three times the largest rank among factored ones. */
EM_API int64_t em_moe_workspace_floats(int64_t num_tokens, int64_t num_pairs, int64_t hidden,
                                       int64_t row_floats);
/* Returns 0, or the negative status of the record that failed (y is then undefined); all reads of
 * the list have ended when it returns. store may be NULL where every record is resident: then
 * formats come from `records` (same order as a store's index, NULL otherwise). */
EM_API int32_t em_moe_run(em_pool *pool, em_store *store, const em_record *records,
                          em_moe_args *args);

/* ---- the decoder --------------------------------------------------------------------------- */
/* The layers of a model that is a stack of: x += attention(norm x), x += mlp(norm x), where the mlp
 * is dense or a mixture of experts. One path for one token and for many: a row of every result has
 * the same bits for every T, number of threads and position in the batch. All pointers of these
 * descriptions stay the caller's and must outlive the decoder; packed bytes are 64-byte aligned. */

/* A matrix [rows, cols] in tiles. num_parts 1: packed[0]. num_parts 3: the sum of three matrices of
 * this format, y = p0 x + (p1 x + p2 x), as which an fp32 matrix is kept in three bf16 ones without
 * loss. rows 0: there is none. */
typedef struct em_matrix {
  int64_t rows, cols;
  em_format format;
  int32_t num_parts;
  const uint8_t *packed[3];
} em_matrix;

enum { EM_QK_NORM_NONE = 0, EM_QK_NORM_HEAD = 1, EM_QK_NORM_WHOLE = 2 };

/* One layer. Norms and biases are fp32; a bias is NULL where there is none. */
typedef struct em_block {
  const float *input_norm, *post_norm; /* [D] */
  em_matrix qkv[3];                    /* query, key, value rows stacked in qkv[0], or one each */
  const float *qkv_bias;               /* [(H + 2 KV) hd] */
  const float *q_norm, *k_norm;        /* [hd] each (HEAD), [H hd] and [KV hd] (WHOLE), or NULL */
  em_matrix output;                    /* [D, H hd] */
  const float *output_bias;            /* [D] */
  int64_t window;                      /* 0: every earlier token is seen */
  em_matrix router;                    /* [E, D]; rows 0: the layer is dense */
  int64_t first_key, expert_width;     /* expert e is record first_key + e, of this F */
  int64_t first_stand_in;              /* its stand-in is record first_stand_in + e, of the same place;
                                          0: there are none. See em_routing */
  const int32_t *experts_of_token;     /* [vocab, K]: a hash-routed layer (2106.04426). A token goes
                                          through these rows of the router, distinct and ascending,
                                          whatever it scores; their weights are as ever. Neither masks
                                          nor gains of 0 go with it. NULL: the largest scores */
  em_matrix gate_up[2], down;          /* the dense mlp or the shared expert: gate and up rows stacked
                                          in gate_up[0] or one each, [W, D]; down [D, W] */
  em_matrix shared_weight;             /* [1, D]: the shared expert counts sigmoid(shared_weight x) */
} em_block;

typedef struct em_model {
  int64_t num_layers, hidden, num_heads, num_kv_heads, head_dim, rotary_dim, top_k;
  int32_t qk_norm;     /* EM_QK_NORM_...; HEAD comes after the clip, WHOLE before it */
  int32_t renormalise; /* routing weights of a token add up to 1 */
  float rms_eps, clip; /* clip > 0: queries, keys, values are kept within -clip .. clip */
  em_matrix embedding, lm_head; /* [vocab, D] */
  const float *norm;            /* [D] */
  const em_block *layers;       /* [num_layers] */
} em_model;

/* Keys and values of all layers, [L, 2, KV, capacity, hd] of fp32, bf16 or int8 (kv_bits 32, 16, 8);
 * scales fp32 [L, 2, KV, capacity] for int8, else NULL. `position` tokens are stored. */
typedef struct em_kv_cache {
  void *data;
  float *scales;
  int64_t capacity, position, kv_bits;
} em_kv_cache;

typedef struct em_decoder em_decoder;
/* Copies the description, not the weights. The pool may be NULL (one thread) and must outlive the
 * decoder. Returns NULL where the sizes do not go together or memory is short. A decoder serves one
 * call at a time; its scratch grows to the largest call and stays. */
EM_API em_decoder *em_decoder_create(const em_model *model, em_pool *pool);
EM_API void em_decoder_destroy(em_decoder *decoder); /* NULL is allowed */
/* Gives the scratch back; from the next call on it lies, as far as it fits, in memory [num_bytes], the
 * caller's, 64-byte aligned, until this is called again; NULL: it is the decoder's. 0 or EM_ERR_ARG. */
EM_API int32_t em_decoder_use_memory(em_decoder *decoder, void *memory, int64_t num_bytes);
/* The functions below return 0, EM_ERR_ARG or -ENOMEM.
 * Take experts out of the choice of a layer's router, from the next call on: mask u8 [E], copied, 0 is
 * out, at least K are not; NULL: all are in again. The softmax runs over those that are in, with the
 * bits of a router that has only their rows. For a token of which an expert that is out has a share
 * of at least `threshold` (>= 0) in the softmax over all, it is in; above 1 there is no such token. */
EM_API int32_t em_decoder_set_mask(em_decoder *decoder, int64_t layer, const uint8_t *mask,
                                   float threshold);
/* Let row e of a layer's router stand for body[e]: i32 [E], copied, NULL: row e is body e. Bodies are
 * the experts that have records; everywhere but in the router's own rows (masks and gains are of rows)
 * expert ids are theirs. Rows of one body that a token has chosen count as one, with the sum of their
 * weights, in ascending order of rows. -1: a null expert. It takes part in the softmax and the choice
 * and is then left out, also of the sum that weights are divided by (AdaMoE, 2406.13233). */
EM_API int32_t em_decoder_set_bodies(em_decoder *decoder, int64_t layer, const int32_t *body);
/* Multiply the routing weights of a layer by gains [E] >= 0, copied; NULL: 1 each. An expert with gain
 * 0 is out of the choice, as by a mask but for good; then a token may have fewer than K. */
EM_API int32_t em_decoder_set_gains(em_decoder *decoder, int64_t layer, const float *gains);
/* How many of the K experts that a router chooses a token goes through; from the next call on, in all
 * layers. NULL: all of them. */
typedef struct em_routing {
  int32_t active_experts; /* the largest 1 .. K (SEER-MoE, 2404.05089); 0: K */
  int32_t num_auxiliary;  /* the next largest so many, K together at most, stand in the input of those
                             with their theta alone; see em_decoder_set_theta */
  float top_p; /* of the active, largest first, no more than it takes for shares of the softmax that add
                  up to more than top_p, one at least; weights stay as they are without it, so that they
                  may add up to less (2403.07652). Up to 1; 0 and 1: all */
  /* em_decode alone: an absent record whose share of the token's routing weights is below cold_share
   * (0: none) is neither read nor computed, the others' weights staying as they are, as long as no
   * more than max_dropped of all records are left out so; the largest stays. What the output then is
   * depends on what was in memory. */
  float cold_share, max_dropped;
  /* em_decode alone, with stand_ins 1, in layers that have them: of the experts that a token goes
   * through, most weight first, an absent one before which more than stand_in_after of their weights
   * has gone is read and computed as its stand-in, where that is smaller: a second record of the same
   * expert (HOBBIT, 2411.01433, T1). Never the one with the largest weight. It depends on what was in
   * memory, too. With cold_share nothing is left out whose stand-in is in memory. */
  int32_t stand_ins;
  float stand_in_after;
} em_routing;
EM_API int32_t em_decoder_set_routing(em_decoder *decoder, const em_routing *routing);
/* Compressed experts (2503.00634): with auxiliary experts, those that a token goes through take x * sum
 * over its auxiliary ones of a theta, element by element, where a is the share of each among them.
 * theta fp32 [E, D], the caller's; NULL: none. */
EM_API int32_t em_decoder_set_theta(em_decoder *decoder, int64_t layer, const float *theta);
/* x [T, D] = what the experts take of normed [T, D], for the layer and the tokens that
 * em_decoder_attend has just routed: where thetas are used, else a copy. */
EM_API int32_t em_decoder_expert_inputs(em_decoder *decoder, int64_t num_tokens, const float *normed,
                                        float *x);
/* Sums since the decoder was made, while anything but plain top-k was set: tokens times layers; the
 * experts that they went through; records that were left out as cold; those of the experts whose
 * stand-in was computed. */
typedef struct em_routing_stats {
  int64_t num_routed, num_active, num_dropped, num_stand_ins;
} em_routing_stats;
EM_API void em_decoder_get_routing_stats(const em_decoder *decoder, em_routing_stats *stats);
/* x [T, D] = the embedding rows of ids [T]. */
EM_API int32_t em_decoder_embed(em_decoder *decoder, int64_t num_tokens, const int32_t *ids, float *x);
/* The attention half of a layer, in place of x [T, D], for T tokens at kv->position on: x += attention
 * (norm x), whose keys and values are stored in the cache (kv->position itself is left alone); then
 * normed [T, D] = post norm of x, and where the layer has a router expert_ids, routing_weights
 * [T, K]: the K largest of softmax(router normed), by ascending id; of equal ones the lowest ids.
 * Routes of a token that has fewer end with ids of -1, whose weight is 0 (here and everywhere).
 * cos, sin [T, rotary_dim / 2] of the positions. token_ids [T]: NULL but for hash-routed layers. */
EM_API int32_t em_decoder_attend(em_decoder *decoder, int64_t layer, const em_kv_cache *kv,
                                 const float *cos, const float *sin, int64_t num_tokens,
                                 const int32_t *token_ids, float *x, float *normed,
                                 int32_t *expert_ids, float *routing_weights);
/* The other half: a dense layer adds mlp(normed) to x [T, D]; a layer with experts adds y (what
 * em_moe_run made of normed, overwritten) and the shared expert. y is NULL for dense layers. */
EM_API int32_t em_decoder_finish(em_decoder *decoder, int64_t layer, int64_t num_tokens,
                                 const float *normed, float *y, float *x);
/* logits [T, vocab] = lm_head(norm x). */
EM_API int32_t em_decoder_logits(em_decoder *decoder, int64_t num_tokens, const float *x,
                                 float *logits);

typedef struct em_decode_args {
  int64_t token_id;
  em_kv_cache kv;         /* the token is stored at kv.position */
  const float *cos, *sin; /* [rotary_dim / 2] of that position */
  int32_t *stop; /* may be NULL. Not 0: em_decode ends before the next layer, and writes 0 */
  int32_t on_sigint; /* 1: SIGINT writes 1 to *stop while em_decode runs, before it goes to the handler
                        that it has; where it has none, it keeps its effect. POSIX; for one thread */
  int32_t *routes;        /* out [layers with experts, K]: expert ids, ascending, then -1 */
  float *routing_weights; /* out [layers with experts, K] */
  /* Recorded routes in the place of the router's, [layers with experts, num_forced] of 1 .. K
   * distinct ids, ascending, then -1; `routes` and `routing_weights` then have num_forced columns.
   * The routers run all the same, so that a token costs as much. NULL: the router's routes. */
  const int32_t *forced_ids;
  const float *forced_weights;
  int64_t num_forced;
  em_prefetch *prefetch;  /* NULL: only what is demanded is read */
  const int32_t *guesses; /* EM_PREDICT_GIVEN: [layers with experts, num_guesses] expert ids, the
                             likeliest first, -1: none; of each layer at most 2 K are looked at */
  int64_t num_guesses;
  float *logits;          /* out [vocab], or NULL */
  int64_t best_id;        /* out, with logits: the largest of them, of equal ones the lowest id; -1
                             where it is not finite */
  int64_t num_places;     /* out: layers whose routes are known */
  int64_t failed_key;     /* out: the record that failed, or -1 */
} em_decode_args;
/* One token through all layers, whose records come through the cache: each layer's are demanded as
 * its router has spoken, and released when it is computed. What hash-routed layers will demand is
 * read from the start on (as by em_cache_foresee), unless a rule leaves some of it out. The cache has
 * a place for every layer with experts. Returns 0; EM_ERR_STOPPED; EM_ERR_ROOM; the negative status
 * of the record failed_key; EM_ERR_ARG; -ENOMEM. After a failure nothing is pinned, the token is not
 * part of the context and can be decoded again; no read of it is still being waited for. */
EM_API int32_t em_decode(em_decoder *decoder, em_cache *cache, em_decode_args *args);

#ifdef __cplusplus
}
#endif
#endif
