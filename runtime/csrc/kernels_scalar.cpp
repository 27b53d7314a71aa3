// Portable lanes: plain loops over 16 rows.
#include <math.h>
#include <string.h>

#include "kernels.h"

#define EM_INLINE static inline
#define EM_UNROLL
#define EM_NOINLINE
#if defined(__GNUC__)
#define EM_FMA __builtin_fmaf
#else
#define EM_FMA fmaf
#define __builtin_memcpy memcpy
#define __builtin_prefetch(...)
#endif

namespace em {
namespace {

constexpr const char *kName = "scalar";
constexpr int kMaxCodesBlock = 4;
constexpr int kMax16bitBlock = 4;

struct F {
  float v[16];
};
struct B {
  uint8_t v[64];
};
struct Dot {
  int32_t v[16];
};

EM_INLINE B load_bytes(const uint8_t *p) {
  B b;
  memcpy(b.v, p, 64);
  return b;
}
template <int MASK>
EM_INLINE B masked(B b) {
  for (int i = 0; i < 64; ++i) b.v[i] &= MASK;
  return b;
}
template <int N>
EM_INLINE B shifted_right(B b) {
  for (int i = 0; i < 64; ++i) b.v[i] = static_cast<uint8_t>(b.v[i] >> N);
  return b;
}
template <int N>
EM_INLINE B shifted_left(B b) {
  for (int i = 0; i < 64; ++i) b.v[i] = static_cast<uint8_t>(b.v[i] << N);
  return b;
}
EM_INLINE B either(B a, const B &b) {
  for (int i = 0; i < 64; ++i) a.v[i] |= b.v[i];
  return a;
}
// The bits of MASK from x, the others from y.
template <int MASK>
EM_INLINE B selected(B x, B y) {
  for (int i = 0; i < 64; ++i) x.v[i] = static_cast<uint8_t>((x.v[i] & MASK) | (y.v[i] & ~MASK));
  return x;
}
EM_INLINE B byte_code(B x) { return x; }
EM_INLINE B level_of(B code) {
  for (int i = 0; i < 64; ++i) code.v[i] = static_cast<uint8_t>(kNf4Levels[code.v[i]] + 128);
  return code;
}

EM_INLINE F broadcast(float x) {
  F r;
  for (int i = 0; i < 16; ++i) r.v[i] = x;
  return r;
}
EM_INLINE F mul(F a, F b) {
  for (int i = 0; i < 16; ++i) a.v[i] *= b.v[i];
  return a;
}
EM_INLINE F add(F a, F b) {
  for (int i = 0; i < 16; ++i) a.v[i] += b.v[i];
  return a;
}
EM_INLINE F fma(F a, F b, F c) {
  for (int i = 0; i < 16; ++i) c.v[i] = EM_FMA(a.v[i], b.v[i], c.v[i]);
  return c;
}
EM_INLINE void store(float *p, F a) { memcpy(p, a.v, sizeof(a.v)); }

EM_INLINE float half_to_float(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(half & 0x7fff) << 13;
  float value;
  if (magnitude >= 0x0f800000) {  // infinity or NaN, made quiet as the hardware does
    const uint32_t bits = sign | 0x7f800000 | magnitude | (magnitude & 0x7fffff ? 0x400000 : 0);
    memcpy(&value, &bits, 4);
    return value;
  }
  memcpy(&value, &magnitude, 4);
  value *= 0x1p112f;  // exact, and normalizes what was subnormal
  return sign ? -value : value;
}
EM_INLINE uint16_t word_at(const uint8_t *p) {
  return static_cast<uint16_t>(p[0] | p[1] << 8);
}
EM_INLINE F load_half(const uint8_t *p) {
  F r;
  for (int i = 0; i < 16; ++i) r.v[i] = half_to_float(word_at(p + 2 * i));
  return r;
}
EM_INLINE float widen(uint16_t word, bool fp16) {
  if (fp16) return half_to_float(word);
  const uint32_t bits = static_cast<uint32_t>(word) << 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
template <bool FP16>
EM_INLINE F low_half(const B &b) {
  F r;
  for (int i = 0; i < 16; ++i) r.v[i] = widen(word_at(b.v + 4 * i), FP16);
  return r;
}
template <bool FP16>
EM_INLINE F high_half(const B &b) {
  F r;
  for (int i = 0; i < 16; ++i) r.v[i] = widen(word_at(b.v + 4 * i + 2), FP16);
  return r;
}

template <class C>
constexpr bool kSplits = false;

constexpr bool kHoldsUnit = false;  // of no account: kSplits

EM_INLINE Dot dot_zero() { return {}; }
template <class C, int>
EM_INLINE Dot dot_begin(int32_t negative_sum) {
  Dot d;
  for (int i = 0; i < 16; ++i) d.v[i] = negative_sum * C::kZero;
  return d;
}
template <class C>
EM_INLINE Dot dot_add(Dot d, const B &code, const int8_t *q) {
  for (int i = 0; i < 16; ++i) {
    for (int j = 0; j < 4; ++j) d.v[i] += code.v[4 * i + j] * q[j];
  }
  return d;
}
template <int PLACE>
EM_INLINE Dot shifted_down(Dot d) {
  for (int i = 0; i < 16; ++i) d.v[i] >>= PLACE;
  return d;
}
template <class C>
EM_INLINE F dot_end(const Dot &d, int32_t) {
  F r;
  for (int i = 0; i < 16; ++i) r.v[i] = static_cast<float>(d.v[i]);
  return r;
}

#include "kernels_impl.h"

}  // namespace

const Kernels *kernels_scalar() { return &kTable; }

}  // namespace em
