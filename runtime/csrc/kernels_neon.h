// NEON lanes: four registers of 4 rows. Included by the units of the NEON levels, inside em's
// unnamed namespace.

#define EM_INLINE static inline __attribute__((always_inline))
#if defined(__clang__)
#define EM_UNROLL _Pragma("unroll")
#else
#define EM_UNROLL _Pragma("GCC unroll 8")
#endif
#define EM_FMA __builtin_fmaf

constexpr int kMaxCodesBlock = 4;
constexpr int kMax16bitBlock = 2;

struct F {
  float32x4_t v[4];
};
struct B {
  uint8x16_t v[4];
};
struct Dot {
  int32x4_t v[4];
};

#define EM_EACH_REGISTER \
  EM_UNROLL              \
  for (int i = 0; i < 4; ++i)

EM_INLINE B load_bytes(const uint8_t *p) {
  B r;
  EM_EACH_REGISTER r.v[i] = vld1q_u8(p + 16 * i);
  return r;
}
template <int MASK>
EM_INLINE B masked(B x) {
  EM_EACH_REGISTER x.v[i] = vandq_u8(x.v[i], vdupq_n_u8(MASK));
  return x;
}
template <int N>
EM_INLINE B shifted_right(B x) {
  if constexpr (N > 0) {
    EM_EACH_REGISTER x.v[i] = vshrq_n_u8(x.v[i], N);
  }
  return x;
}
template <int N>
EM_INLINE B shifted_left(B x) {
  EM_EACH_REGISTER x.v[i] = vshlq_n_u8(x.v[i], N);
  return x;
}
EM_INLINE B either(B x, B y) {
  EM_EACH_REGISTER x.v[i] = vorrq_u8(x.v[i], y.v[i]);
  return x;
}

EM_INLINE F broadcast(float x) {
  F r;
  EM_EACH_REGISTER r.v[i] = vdupq_n_f32(x);
  return r;
}
EM_INLINE F mul(F x, F y) {
  EM_EACH_REGISTER x.v[i] = vmulq_f32(x.v[i], y.v[i]);
  return x;
}
EM_INLINE F add(F x, F y) {
  EM_EACH_REGISTER x.v[i] = vaddq_f32(x.v[i], y.v[i]);
  return x;
}
EM_INLINE F fma(F x, F y, F z) {
  EM_EACH_REGISTER z.v[i] = vfmaq_f32(z.v[i], x.v[i], y.v[i]);
  return z;
}
EM_INLINE void store(float *p, F x) { EM_EACH_REGISTER vst1q_f32(p + 4 * i, x.v[i]); }

EM_INLINE float32x4_t from_half(uint16x4_t words) {
  return vcvt_f32_f16(vreinterpret_f16_u16(words));
}
EM_INLINE F load_half(const uint8_t *p) {
  F r;
  EM_EACH_REGISTER r.v[i] = from_half(vreinterpret_u16_u8(vld1_u8(p + 8 * i)));
  return r;
}
template <bool FP16>
EM_INLINE F low_half(B x) {
  F r;
  EM_EACH_REGISTER {
    const uint32x4_t words = vreinterpretq_u32_u8(x.v[i]);
    r.v[i] = FP16 ? from_half(vmovn_u32(words)) : vreinterpretq_f32_u32(vshlq_n_u32(words, 16));
  }
  return r;
}
template <bool FP16>
EM_INLINE F high_half(B x) {
  F r;
  EM_EACH_REGISTER {
    const uint32x4_t words = vreinterpretq_u32_u8(x.v[i]);
    r.v[i] = FP16 ? from_half(vshrn_n_u32(words, 16))
                  : vreinterpretq_f32_u32(vandq_u32(words, vdupq_n_u32(0xffff0000)));
  }
  return r;
}

// Codes below 8 bits are their own signed value; of 8-bit codes, 128 is taken off.
template <int BITS>
EM_INLINE int8x16_t signed_code(uint8x16_t code) {
  if constexpr (BITS == 8) code = veorq_u8(code, vdupq_n_u8(0x80));
  return vreinterpretq_s8_u8(code);
}
// What the sum of code . q starts from, so that it ends at the sum of (code - zero point) . q.
template <int BITS, bool ASYM>
EM_INLINE int32_t dot_start(int32_t negative_sum) {
  if constexpr (BITS == 8) return ASYM ? -negative_sum * 128 : 0;
  return ASYM ? 0 : negative_sum * (1 << (BITS - 1));
}
template <int BITS, bool ASYM>
EM_INLINE Dot dot_begin(int32_t negative_sum) {
  Dot d;
  EM_EACH_REGISTER d.v[i] = vdupq_n_s32(dot_start<BITS, ASYM>(negative_sum));
  return d;
}
template <int BITS>
EM_INLINE Dot dot_add(Dot d, B code, const int8_t *q) {
  int32_t word;
  __builtin_memcpy(&word, q, 4);
  const int8x16_t a = vreinterpretq_s8_s32(vdupq_n_s32(word));
  EM_EACH_REGISTER d.v[i] = vdotq_s32(d.v[i], signed_code<BITS>(code.v[i]), a);
  return d;
}
template <int BITS, bool ASYM>
EM_INLINE F dot_end(Dot d, int32_t) {
  F r;
  EM_EACH_REGISTER r.v[i] = vcvtq_f32_s32(d.v[i]);
  return r;
}
