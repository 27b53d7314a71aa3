// Portable lanes: plain loops, which the compiler may turn into vectors of any width.
#include <math.h>
#include <string.h>

#include "attention.h"

#define EM_INLINE static inline
#define EM_UNROLL
#if defined(__GNUC__)
#define EM_FMA __builtin_fmaf
#else
#define EM_FMA fmaf
#define __builtin_memcpy memcpy
#define __builtin_sqrt sqrt
#endif

namespace em {
namespace {

constexpr int kMaxRows = 4;
constexpr int kMaxAccumulators = 4;
constexpr int kMaxScores = 4;  // chains of products side by side

struct F {
  float v[kLanes];
};

EM_INLINE F broadcast(float x) {
  F r;
  for (int i = 0; i < kLanes; ++i) r.v[i] = x;
  return r;
}
EM_INLINE F fma(const F &x, const F &y, F z) {
  for (int i = 0; i < kLanes; ++i) z.v[i] = EM_FMA(x.v[i], y.v[i], z.v[i]);
  return z;
}
EM_INLINE F load(const float *p) {
  F r;
  memcpy(r.v, p, sizeof(r.v));
  return r;
}
EM_INLINE F load(const uint16_t *p) {
  uint32_t bits[kLanes];
  for (int i = 0; i < kLanes; ++i) bits[i] = static_cast<uint32_t>(p[i]) << 16;
  F r;
  memcpy(r.v, bits, sizeof(r.v));
  return r;
}
EM_INLINE F load(const int8_t *p) {
  F r;
  for (int i = 0; i < kLanes; ++i) r.v[i] = p[i];
  return r;
}
EM_INLINE void store(float *p, const F &x) { memcpy(p, x.v, sizeof(x.v)); }

// Sums of the 16 rows of [16, 16].
EM_INLINE F row_sums(const float *p) {
  F r;
  for (int j = 0; j < kLanes; ++j) {
    F row = load(p + kLanes * j);
    for (int half = kLanes / 2; half; half /= 2) {
      for (int i = 0; i < half; ++i) row.v[i] += row.v[i + half];
    }
    r.v[j] = row.v[0];
  }
  return r;
}

#include "attention_impl.h"

}  // namespace

const RowKernels *rows_scalar() { return &kRowTable; }

}  // namespace em
