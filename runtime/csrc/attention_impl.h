// The template source of every instruction set. Included inside that set's own namespace, after its
// lanes: type F (16 floats), kMax.., and the functions on them. Nothing of the standard
// library may be used here: the linker might keep the copy of an inline function that was compiled
// for a newer instruction set than the machine has.
//
// One order of float operations for all levels, and for a row whatever rows run beside it:
//   score  = lanes summed as i + (i+8), i + (i+4), i + (i+2), i + (i+1), where lane i holds the
//            fma chain over the columns i, i+16, ... of (q * scale) . key
//   weight = exp(score - largest score); their sum runs over 16 lanes counted from the row's first
//            key, then as above
//   out    = (fma chain over keys ascending of weight . value) / sum
// With int8, a score is multiplied with its key's scale, then a weight with its value's scale, which
// the sum of the weights has not seen.

// One row alone reads memory faster than the hardware runs ahead of it, and keys, values and the keys
// of the next head are short streams: each would begin with nothing under way. So a row fetches ahead
// along all of them. It may look past the end, which is harmless.
#if defined(__GNUC__)
#define EM_PREFETCH(p, level) __builtin_prefetch(p, 0, level)
#else
#define EM_PREFETCH(p, level)
#endif
constexpr int64_t kNear = 2048, kFar = 6144;  // bytes, into the first and the second cache

// Bytes that are read up to `end`, and where reading goes on then; null: nobody knows.
struct Stream {
  const char *end, *next;
  const char *ahead(const void *p, int64_t num_bytes) const {
    const char *at = static_cast<const char *>(p) + num_bytes;
    return at < end || next == nullptr ? at : next + (at - end);
  }
};

EM_INLINE void fetch(const char *near, const char *far, int64_t first, int64_t num_bytes) {
  for (int64_t i = first; i < first + num_bytes; i += 64) {
    EM_PREFETCH(near + i, 3);
    EM_PREFETCH(far + i, 2);
  }
}

template <class T>
EM_INLINE F load_part(const T *p, int64_t n) {
  alignas(64) T part[kLanes] = {};
  for (int64_t i = 0; i < n; ++i) part[i] = p[i];
  return load(part);
}

EM_INLINE float tree_sum(float *lanes) {
  for (int half = kLanes / 2; half; half /= 2) {
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

// The lanes of R queries [R, padded] with N keys, to products [R, 16, 16] from column `first` on.
// Side by side, since one fma chain alone would wait for its own results.
template <int R, int N, class T>
EM_INLINE void multiply_keys(const float *q, int64_t padded, const T *key, int64_t head_dim,
                             const Stream &stream, float *products, int first) {
  const int64_t whole = head_dim / kLanes * kLanes;
  constexpr int64_t kStep = N * kLanes * static_cast<int64_t>(sizeof(T));  // bytes of 16 columns
  const char *near = stream.ahead(key, kNear), *far = stream.ahead(key, kFar);
  F sum[R][N];
  EM_UNROLL
  for (int r = 0; r < R; ++r) {
    EM_UNROLL
    for (int n = 0; n < N; ++n) sum[r][n] = broadcast(0.0f);
  }
  for (int64_t c = 0; c < whole; c += kLanes) {
    F k[N];
    if constexpr (R == 1) fetch(near, far, c / kLanes * kStep, kStep);  // in the order of memory
    EM_UNROLL
    for (int n = 0; n < N; ++n) k[n] = load(key + n * head_dim + c);
    EM_UNROLL
    for (int r = 0; r < R; ++r) {
      const F x = load(q + r * padded + c);
      EM_UNROLL
      for (int n = 0; n < N; ++n) sum[r][n] = fma(x, k[n], sum[r][n]);
    }
  }
  if (whole < head_dim) {
    for (int n = 0; n < N; ++n) {
      const F k = load_part(key + n * head_dim + whole, head_dim - whole);
      for (int r = 0; r < R; ++r) sum[r][n] = fma(load(q + r * padded + whole), k, sum[r][n]);
    }
  }
  EM_UNROLL
  for (int r = 0; r < R; ++r) {
    EM_UNROLL
    for (int n = 0; n < N; ++n) store(products + (r * kLanes + first + n) * kLanes, sum[r][n]);
  }
}

// scores[r][0 .. end - begin) of keys begin .. end; the 16 beyond may be overwritten.
// q [R, padded]; products [R, 16, 16] is scratch.
template <int R, class T>
void score_keys(const float *q, int64_t padded, const T *keys, int64_t head_dim, int64_t begin,
                int64_t end, const Stream &stream, float *const *scores, float *products) {
  constexpr int kKeys = kMaxScores / R > 1 ? kMaxScores / R : 1;
  for (int64_t first = begin; first < end; first += kLanes) {
    const int num = end - first < kLanes ? static_cast<int>(end - first) : kLanes;
    const T *key = keys + first * head_dim;
    int j = 0;
    for (; j + kKeys <= num; j += kKeys) {
      multiply_keys<R, kKeys>(q, padded, key + j * head_dim, head_dim, stream, products, j);
    }
    for (; j < num; ++j) {
      multiply_keys<R, 1>(q, padded, key + j * head_dim, head_dim, stream, products, j);
    }
    for (int r = 0; r < R; ++r) {
      store(scores[r] + (first - begin), row_sums(products + r * kLanes * kLanes));
    }
  }
}

// acc [R, padded] += weights[r][0 .. end - begin) . values of keys begin .. end, C chunks of columns.
template <int R, int C, class T>
EM_INLINE void weigh_chunks(const float *const *weights, const T *values, int64_t head_dim,
                            int64_t num, const Stream &stream, float *acc, int64_t padded) {
  F sum[R][C];
  EM_UNROLL
  for (int r = 0; r < R; ++r) {
    EM_UNROLL
    for (int c = 0; c < C; ++c) sum[r][c] = load(acc + r * padded + c * kLanes);
  }
  for (int64_t j = 0; j < num; ++j, values += head_dim) {
    F value[C];
    if constexpr (R == 1) {
      fetch(stream.ahead(values, kNear), stream.ahead(values, kFar), 0, C * kLanes * sizeof(T));
    }
    EM_UNROLL
    for (int c = 0; c < C; ++c) value[c] = load(values + c * kLanes);
    EM_UNROLL
    for (int r = 0; r < R; ++r) {
      const F weight = broadcast(weights[r][j]);
      EM_UNROLL
      for (int c = 0; c < C; ++c) sum[r][c] = fma(weight, value[c], sum[r][c]);
    }
  }
  EM_UNROLL
  for (int r = 0; r < R; ++r) {
    EM_UNROLL
    for (int c = 0; c < C; ++c) store(acc + r * padded + c * kLanes, sum[r][c]);
  }
}

template <int R, class T>
void weigh_values(const float *const *weights, const T *values, int64_t head_dim, int64_t num,
                  const Stream &stream, float *acc, int64_t padded) {
  constexpr int kFit = kMaxAccumulators / R > 1 ? kMaxAccumulators / R : 1;
  constexpr int kChunks = kFit < 8 ? kFit : 8;
  constexpr int64_t kBlock = 32;  // keys whose values stay in the first cache over the chunks
  const int64_t whole = head_dim / kLanes * kLanes;
  for (int64_t first = 0; first < num; first += kBlock) {
    const int64_t size = num - first < kBlock ? num - first : kBlock;
    const T *block = values + first * head_dim;
    const float *from[R];
    for (int r = 0; r < R; ++r) from[r] = weights[r] + first;
    int64_t c = 0;
    for (; c + kChunks * kLanes <= whole; c += kChunks * kLanes) {
      weigh_chunks<R, kChunks>(from, block + c, head_dim, size, stream, acc + c, padded);
    }
    if constexpr (kChunks > 4) {
      for (; c + 4 * kLanes <= whole; c += 4 * kLanes) {
        weigh_chunks<R, 4>(from, block + c, head_dim, size, stream, acc + c, padded);
      }
    }
    for (; c < whole; c += kLanes) {
      weigh_chunks<R, 1>(from, block + c, head_dim, size, stream, acc + c, padded);
    }
    if (c < head_dim) {
      for (int r = 0; r < R; ++r) {
        F sum = load(acc + r * padded + c);
        for (int64_t j = 0; j < size; ++j) {
          const F value = load_part(block + j * head_dim + c, head_dim - c);
          sum = fma(broadcast(from[r][j]), value, sum);
        }
        store(acc + r * padded + c, sum);
      }
    }
  }
}

// exp(x) for -87 <= x <= 0 within 2 units in the last place, 1.6e-38 below; NaN stays NaN.
EM_INLINE float exp_of(float x) {
  constexpr float kRound = 12582912.0f;  // adding it leaves the nearest integer in the low bits
  constexpr int32_t kRoundBits = 0x4b400000;
  x = -87.0f > x ? -87.0f : x;
  const float shifted = EM_FMA(x, 1.44269504f, kRound);
  const float n = shifted - kRound;
  float r = EM_FMA(n, -0.693359375f, x);
  r = EM_FMA(n, 2.12194440e-4f, r);
  float p = 1.9875691500e-4f;
  p = EM_FMA(p, r, 1.3981999507e-3f);
  p = EM_FMA(p, r, 8.3334519073e-3f);
  p = EM_FMA(p, r, 4.1665795894e-2f);
  p = EM_FMA(p, r, 1.6666665459e-1f);
  p = EM_FMA(p, r, 5.0000001201e-1f);
  p = EM_FMA(p, r * r, r) + 1.0f;
  int32_t bits;
  __builtin_memcpy(&bits, &shifted, 4);
  const uint32_t power = static_cast<uint32_t>(bits - kRoundBits + 127) << 23;
  float factor;
  __builtin_memcpy(&factor, &power, 4);
  return p * factor;
}

// Scores become weights exp(score - largest); returns their sum.
EM_INLINE float softmax_weights(float *scores, int64_t num) {
  alignas(64) float lanes[kLanes];
  const int64_t whole = num / kLanes * kLanes;
  for (int i = 0; i < kLanes; ++i) lanes[i] = scores[0];
  for (int64_t j = 0; j < whole; j += kLanes) {
    for (int i = 0; i < kLanes; ++i) {
      const float score = scores[j + i];
      lanes[i] = score > lanes[i] ? score : lanes[i];
    }
  }
  float largest = lanes[0];
  for (int i = 1; i < kLanes; ++i) largest = lanes[i] > largest ? lanes[i] : largest;
  for (int64_t j = whole; j < num; ++j) largest = scores[j] > largest ? scores[j] : largest;
  for (int i = 0; i < kLanes; ++i) lanes[i] = 0.0f;
  for (int64_t j = 0; j < whole; j += kLanes) {
    for (int i = 0; i < kLanes; ++i) {
      const float weight = exp_of(scores[j + i] - largest);
      scores[j + i] = weight;
      lanes[i] += weight;
    }
  }
  for (int64_t j = whole; j < num; ++j) {
    scores[j] = exp_of(scores[j] - largest);
    lanes[j - whole] += scores[j];
  }
  return tree_sum(lanes);
}

// Numbers of int8 stand for themselves times the scale of their key.
EM_INLINE void apply_scales(float *scores, const float *scales, int64_t num) {
  for (int64_t j = 0; j < num; ++j) scores[j] *= scales[j];
}

template <int R, class T>
void attend_rows(const AttentionRows &rows, int first_row, float *scratch) {
  const int64_t head_dim = rows.head_dim;
  const int64_t padded = (head_dim + kLanes - 1) / kLanes * kLanes;
  const T *keys = static_cast<const T *>(rows.keys);
  const T *values = static_cast<const T *>(rows.values);
  float *q = scratch;
  float *acc = q + R * padded;
  float *products = acc + R * padded;
  float *rest = products + R * kLanes * kLanes;
  float *scores[R], *from[R];
  int64_t begin[R], end[R];
  // Keys that all rows see are read once for all of them, the others once per row.
  int64_t shared_begin = 0, shared_end = INT64_MAX;
  for (int r = 0; r < R; ++r) {
    const float *query = rows.q[first_row + r];
    for (int64_t c = 0; c < padded; ++c) {
      q[r * padded + c] = c < head_dim ? query[c] * rows.scale : 0.0f;
      acc[r * padded + c] = 0.0f;
    }
    begin[r] = rows.begin[first_row + r];
    end[r] = rows.end[first_row + r];
    scores[r] = rest;
    rest += end[r] - begin[r] + 2 * kLanes;
    shared_begin = begin[r] > shared_begin ? begin[r] : shared_begin;
    shared_end = end[r] < shared_end ? end[r] : shared_end;
  }
  for (int i = 0; i < R * kLanes * kLanes; ++i) products[i] = 0.0f;
  if (shared_end < shared_begin) shared_end = shared_begin;
  const auto bytes_of = [head_dim](const T *part, int64_t row) {
    return reinterpret_cast<const char *>(part + row * head_dim);
  };
  const int64_t last = end[R - 1];  // of one row: where its keys end
  const Stream of_keys = {bytes_of(keys, last), bytes_of(values, begin[0])};
  const Stream of_values = {bytes_of(values, last), static_cast<const char *>(rows.next_keys)};
  // A call overwrites up to 16 scores beyond its last, so a row is filled from left to right.
  for (int r = 0; r < R; ++r) {
    const int64_t stop = shared_begin < end[r] ? shared_begin : end[r];
    score_keys<1>(q + r * padded, padded, keys, head_dim, begin[r], stop, of_keys, scores + r,
                  products);
    from[r] = scores[r] + (shared_begin - begin[r]);
  }
  score_keys<R>(q, padded, keys, head_dim, shared_begin, shared_end, of_keys, from, products);
  for (int r = 0; r < R; ++r) {
    float *after = scores[r] + (shared_end - begin[r]);
    score_keys<1>(q + r * padded, padded, keys, head_dim, shared_end, end[r], of_keys, &after,
                  products);
  }
  float sum[R];
  for (int r = 0; r < R; ++r) {
    const int64_t num = end[r] - begin[r];
    if constexpr (sizeof(T) == 1) apply_scales(scores[r], rows.key_scales + begin[r], num);
    sum[r] = softmax_weights(scores[r], num);
    if constexpr (sizeof(T) == 1) apply_scales(scores[r], rows.value_scales + begin[r], num);
  }
  for (int r = 0; r < R; ++r) {
    const int64_t stop = shared_begin < end[r] ? shared_begin : end[r];
    weigh_values<1>(scores + r, values + begin[r] * head_dim, head_dim, stop - begin[r],
                    of_values, acc + r * padded, padded);
  }
  weigh_values<R>(from, values + shared_begin * head_dim, head_dim, shared_end - shared_begin,
                  of_values, acc, padded);
  for (int r = 0; r < R; ++r) {
    const float *after = scores[r] + (shared_end - begin[r]);
    weigh_values<1>(&after, values + shared_end * head_dim, head_dim, end[r] - shared_end,
                    of_values, acc + r * padded, padded);
    float *out = rows.out[first_row + r];
    for (int64_t c = 0; c < head_dim; ++c) out[c] = acc[r * padded + c] / sum[r];
  }
}

template <class T>
void attend_as(const AttentionRows &rows, float *scratch) {
  for (int row = 0; row < rows.num_rows;) {
    const int left = rows.num_rows - row;
    if constexpr (kMaxRows >= 8) {
      if (left >= 8) {
        attend_rows<8, T>(rows, row, scratch);
        row += 8;
        continue;
      }
    }
    if (left >= 4) {
      attend_rows<4, T>(rows, row, scratch);
      row += 4;
    } else if (left >= 2) {
      attend_rows<2, T>(rows, row, scratch);
      row += 2;
    } else {
      attend_rows<1, T>(rows, row, scratch);
      row += 1;
    }
  }
}

void attend(const AttentionRows &rows, float *scratch) {
  if (rows.kv_bits == 8) {
    attend_as<int8_t>(rows, scratch);
  } else if (rows.kv_bits == 16) {
    attend_as<uint16_t>(rows, scratch);
  } else {
    attend_as<float>(rows, scratch);
  }
}

#include "rows_impl.h"
