// NEON lanes: four registers of 4 rows. Included by the units of the NEON levels, inside em's
// unnamed namespace.

#define EM_INLINE static inline __attribute__((always_inline))
#if defined(__clang__)
#define EM_UNROLL _Pragma("unroll")
#else
#define EM_UNROLL _Pragma("GCC unroll 8")
#endif
#define EM_NOINLINE __attribute__((noinline))
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
// The bits of MASK from x, the others from y.
template <int MASK>
EM_INLINE B selected(B x, B y) {
  EM_EACH_REGISTER x.v[i] = vbslq_u8(vdupq_n_u8(MASK), x.v[i], y.v[i]);
  return x;
}
// Operands are signed: codes below 8 bits as they are, of others 128 is taken off.
EM_INLINE B byte_code(B x) {
  EM_EACH_REGISTER x.v[i] = veorq_u8(x.v[i], vdupq_n_u8(0x80));
  return x;
}
EM_INLINE B level_of(B code) {
  const int8x16_t levels = vld1q_s8(kNf4Levels);
  EM_EACH_REGISTER code.v[i] = vreinterpretq_u8_s8(vqtbl1q_s8(levels, code.v[i]));
  return code;
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

template <class C>
constexpr bool kSplits = C::kBits < 4;  // four bits up, a code of 4 bits is no signed byte

constexpr bool kHoldsUnit = true;  // the codes of 32 columns, beside what is summed: 32 registers

EM_INLINE Dot dot_zero() {
  Dot d;
  EM_EACH_REGISTER d.v[i] = vdupq_n_s32(0);
  return d;
}
template <class C, int PLACE>
EM_INLINE Dot dot_begin(int32_t negative_sum) {
  constexpr int32_t kZero = C::kZero - (C::kIsByte ? 128 : 0);
  Dot d;
  EM_EACH_REGISTER d.v[i] = vdupq_n_s32(negative_sum * kZero * (1 << PLACE));
  return d;
}
template <class C>
EM_INLINE Dot dot_add(Dot d, B code, const int8_t *q) {
  int32_t word;
  __builtin_memcpy(&word, q, 4);
  const int8x16_t a = vreinterpretq_s8_s32(vdupq_n_s32(word));
  EM_EACH_REGISTER d.v[i] = vdotq_s32(d.v[i], vreinterpretq_s8_u8(code.v[i]), a);
  return d;
}
template <int PLACE>
EM_INLINE Dot shifted_down(Dot d) {
  EM_EACH_REGISTER d.v[i] = vshrq_n_s32(d.v[i], PLACE);
  return d;
}
template <class C>
EM_INLINE F dot_end(Dot d, int32_t) {
  F r;
  EM_EACH_REGISTER r.v[i] = vcvtq_f32_s32(d.v[i]);
  return r;
}
