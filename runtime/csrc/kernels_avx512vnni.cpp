// AVX-512 VNNI lanes: one register of 16 rows.
#include "kernels.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512VNNI__)
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // gcc 12's own _mm512_undefined
#endif
#include <immintrin.h>

#define EM_INLINE static inline __attribute__((always_inline))
#if defined(__clang__)
#define EM_UNROLL _Pragma("unroll")
#define EM_NOINLINE __attribute__((noinline))
#else
#define EM_UNROLL _Pragma("GCC unroll 8")
#define EM_NOINLINE __attribute__((noinline, noclone))
#endif
#define EM_FMA __builtin_fmaf

namespace em {
namespace {

constexpr const char *kName = "avx512vnni";
constexpr int kMaxCodesBlock = 8;
constexpr int kMax16bitBlock = 4;

using F = __m512;
using B = __m512i;
using Dot = __m512i;

EM_INLINE B load_bytes(const uint8_t *p) { return _mm512_loadu_si512(p); }
template <int MASK>
EM_INLINE B masked(B x) {
  return _mm512_and_si512(x, _mm512_set1_epi8(MASK));
}
template <int N>
EM_INLINE B shifted_right(B x) {
  return _mm512_srli_epi32(x, N);
}
template <int N>
EM_INLINE B shifted_left(B x) {
  return _mm512_slli_epi32(x, N);
}
EM_INLINE B either(B x, B y) { return _mm512_or_si512(x, y); }
// The bits of MASK from x, the others from y.
template <int MASK>
EM_INLINE B selected(B x, B y) {
  return _mm512_ternarylogic_epi32(_mm512_set1_epi8(MASK), x, y, 0xca);
}
EM_INLINE B byte_code(B x) { return x; }
EM_INLINE B level_of(B code) {
  const __m128i levels = _mm_loadu_si128(reinterpret_cast<const __m128i *>(kNf4Levels));
  const __m128i table = _mm_xor_si128(levels, _mm_set1_epi8(static_cast<char>(0x80)));
  return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(table), code);
}

EM_INLINE F broadcast(float x) { return _mm512_set1_ps(x); }
EM_INLINE F mul(F x, F y) { return _mm512_mul_ps(x, y); }
EM_INLINE F add(F x, F y) { return _mm512_add_ps(x, y); }
EM_INLINE F fma(F x, F y, F z) { return _mm512_fmadd_ps(x, y, z); }
EM_INLINE void store(float *p, F x) { _mm512_storeu_ps(p, x); }
EM_INLINE F load_half(const uint8_t *p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)));
}
template <bool FP16>
EM_INLINE F low_half(B x) {
  if constexpr (FP16) return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(x));
  return _mm512_castsi512_ps(_mm512_slli_epi32(x, 16));
}
template <bool FP16>
EM_INLINE F high_half(B x) {
  if constexpr (FP16) return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(x, 16)));
  return _mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32(static_cast<int>(0xffff0000))));
}

template <class C>
constexpr bool kSplits = !C::kIsByte;

constexpr bool kHoldsUnit = true;  // the codes of 32 columns, beside what is summed: 32 registers

EM_INLINE Dot dot_zero() { return _mm512_setzero_si512(); }
template <class C, int PLACE>
EM_INLINE Dot dot_begin(const int32_t &negative_sum) {
  if constexpr (C::kZero == 0) return _mm512_setzero_si512();
  return _mm512_slli_epi32(_mm512_set1_epi32(negative_sum), C::kZeroShift + PLACE);
}
template <class C>
EM_INLINE Dot dot_add(Dot d, B code, const int8_t *q) {
  int32_t word;
  __builtin_memcpy(&word, q, 4);
  return _mm512_dpbusd_epi32(d, code, _mm512_set1_epi32(word));
}
template <int PLACE>
EM_INLINE Dot shifted_down(Dot d) {
  return _mm512_srai_epi32(d, PLACE);
}
template <class C>
EM_INLINE F dot_end(Dot d, int32_t) {
  return _mm512_cvtepi32_ps(d);
}

#include "kernels_impl.h"

}  // namespace

const Kernels *kernels_avx512vnni() { return &kTable; }

}  // namespace em
#else
namespace em {
const Kernels *kernels_avx512vnni() { return nullptr; }
}  // namespace em
#endif
