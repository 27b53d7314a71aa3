// NEON lanes: four registers of 4 floats. Every 64-bit Arm processor has them.
#include "attention.h"

#if defined(__aarch64__) && defined(__GNUC__)
#include <arm_neon.h>

#define EM_INLINE static inline __attribute__((always_inline))
#if defined(__clang__)
#define EM_UNROLL _Pragma("unroll")
#else
#define EM_UNROLL _Pragma("GCC unroll 8")
#endif
#define EM_FMA __builtin_fmaf

namespace em {
namespace {

constexpr int kMaxRows = 4;
constexpr int kMaxAccumulators = 4;
constexpr int kMaxScores = 4;  // chains of products side by side

struct F {
  float32x4_t v[4];
};

#define EM_EACH_REGISTER \
  EM_UNROLL              \
  for (int i = 0; i < 4; ++i)

EM_INLINE F broadcast(float x) {
  F r;
  EM_EACH_REGISTER r.v[i] = vdupq_n_f32(x);
  return r;
}
EM_INLINE F fma(F x, F y, F z) {
  EM_EACH_REGISTER z.v[i] = vfmaq_f32(z.v[i], x.v[i], y.v[i]);
  return z;
}
EM_INLINE F load(const float *p) {
  F r;
  EM_EACH_REGISTER r.v[i] = vld1q_f32(p + 4 * i);
  return r;
}
EM_INLINE F load(const uint16_t *p) {
  F r;
  EM_EACH_REGISTER r.v[i] = vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p + 4 * i), 16));
  return r;
}
EM_INLINE F load(const int8_t *p) {
  F r;
  EM_EACH_REGISTER {
    int8_t bytes[8] = {};
    __builtin_memcpy(bytes, p + 4 * i, 4);
    r.v[i] = vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(vld1_s8(bytes)))));
  }
  return r;
}
EM_INLINE void store(float *p, F x) { EM_EACH_REGISTER vst1q_f32(p + 4 * i, x.v[i]); }

// Lanes 0 + 2 and 1 + 3 of two rows, after the halves and quarters of their 16 were added.
EM_INLINE float32x4_t two_rows(const float *p) {
  float32x4_t sum[2];
  EM_UNROLL
  for (int r = 0; r < 2; ++r, p += 16) {
    sum[r] = vaddq_f32(vaddq_f32(vld1q_f32(p), vld1q_f32(p + 8)),
                       vaddq_f32(vld1q_f32(p + 4), vld1q_f32(p + 12)));
  }
  return vaddq_f32(vcombine_f32(vget_low_f32(sum[0]), vget_low_f32(sum[1])),
                   vcombine_f32(vget_high_f32(sum[0]), vget_high_f32(sum[1])));
}
// Sums of the 16 rows of [16, 16].
EM_INLINE F row_sums(const float *p) {
  F r;
  EM_EACH_REGISTER r.v[i] = vpaddq_f32(two_rows(p + 64 * i), two_rows(p + 64 * i + 32));
  return r;
}

#include "attention_impl.h"

}  // namespace

const RowKernels *rows_neon() { return &kRowTable; }

}  // namespace em
#else
namespace em {
const RowKernels *rows_neon() { return nullptr; }
}  // namespace em
#endif
