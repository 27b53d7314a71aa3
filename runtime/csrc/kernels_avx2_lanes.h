// Lanes of 256 bits, two registers of 8 rows: what AVX2 and AVX-VNNI share. A unit that includes this
// file names itself first (kName) and says with its compiler flags which dot product it has.
#pragma once
#include <immintrin.h>

#include "kernels.h"

#define EM_INLINE static inline __attribute__((always_inline))
#if defined(__clang__)
#define EM_UNROLL _Pragma("unroll")
#else
#define EM_UNROLL _Pragma("GCC unroll 8")
#endif
#define EM_NOINLINE __attribute__((noinline))
#define EM_FMA __builtin_fmaf

namespace em {
namespace {

constexpr int kMaxCodesBlock = 4;
constexpr int kMax16bitBlock = 2;

struct F {
  __m256 a, b;
};
struct B {
  __m256i a, b;
};
struct Dot {
  __m256i a, b;
};

EM_INLINE B load_bytes(const uint8_t *p) {
  return {_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)),
          _mm256_loadu_si256(reinterpret_cast<const __m256i *>(p + 32))};
}
template <int MASK>
EM_INLINE B masked(B x) {
  const __m256i mask = _mm256_set1_epi8(MASK);
  return {_mm256_and_si256(x.a, mask), _mm256_and_si256(x.b, mask)};
}
template <int N>
EM_INLINE B shifted_right(B x) {
  return {_mm256_srli_epi32(x.a, N), _mm256_srli_epi32(x.b, N)};
}
template <int N>
EM_INLINE B shifted_left(B x) {
  return {_mm256_slli_epi32(x.a, N), _mm256_slli_epi32(x.b, N)};
}
EM_INLINE B either(B x, B y) { return {_mm256_or_si256(x.a, y.a), _mm256_or_si256(x.b, y.b)}; }
// The bits of MASK from x, the others from y.
EM_INLINE __m256i selected(__m256i mask, __m256i x, __m256i y) {
  return _mm256_or_si256(_mm256_and_si256(mask, x), _mm256_andnot_si256(mask, y));
}
template <int MASK>
EM_INLINE B selected(B x, B y) {
  const __m256i mask = _mm256_set1_epi8(MASK);
  return {selected(mask, x.a, y.a), selected(mask, x.b, y.b)};
}

EM_INLINE F broadcast(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
EM_INLINE F mul(F x, F y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
EM_INLINE F add(F x, F y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
EM_INLINE F fma(F x, F y, F z) {
  return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
}
EM_INLINE void store(float *p, F x) {
  _mm256_storeu_ps(p, x.a);
  _mm256_storeu_ps(p + 8, x.b);
}
EM_INLINE F load_half(const uint8_t *p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p))),
          _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p + 16)))};
}

// fp16 words of the even (HIGH false) or odd (HIGH true) positions.
template <bool HIGH>
EM_INLINE __m256 half_of(__m256i x) {
  const __m256i order = _mm256_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15,  //
                                         0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15);
  const __m256i words = _mm256_permute4x64_epi64(_mm256_shuffle_epi8(x, order), 0xd8);
  return _mm256_cvtph_ps(HIGH ? _mm256_extracti128_si256(words, 1) : _mm256_castsi256_si128(words));
}
template <bool FP16>
EM_INLINE F low_half(B x) {
  if constexpr (FP16) return {half_of<false>(x.a), half_of<false>(x.b)};
  return {_mm256_castsi256_ps(_mm256_slli_epi32(x.a, 16)),
          _mm256_castsi256_ps(_mm256_slli_epi32(x.b, 16))};
}
template <bool FP16>
EM_INLINE F high_half(B x) {
  if constexpr (FP16) return {half_of<true>(x.a), half_of<true>(x.b)};
  const __m256i mask = _mm256_set1_epi32(static_cast<int>(0xffff0000));
  return {_mm256_castsi256_ps(_mm256_and_si256(x.a, mask)),
          _mm256_castsi256_ps(_mm256_and_si256(x.b, mask))};
}

EM_INLINE __m256i plus_128(__m256i x) {
  return _mm256_xor_si256(x, _mm256_set1_epi8(static_cast<char>(0x80)));
}
EM_INLINE __m256i levels() {
  return _mm256_broadcastsi128_si256(
      _mm_loadu_si128(reinterpret_cast<const __m128i *>(kNf4Levels)));
}
EM_INLINE __m256i word_of(const int8_t *q) {
  int32_t word;
  __builtin_memcpy(&word, q, 4);
  return _mm256_set1_epi32(word);
}

constexpr bool kHoldsUnit = false;  // the codes of 32 columns, beside what is summed: 16 registers

EM_INLINE Dot dot_zero() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }

#if defined(__AVXVNNI__)
template <class C>
constexpr bool kSplits = !C::kIsByte;

EM_INLINE B byte_code(B x) { return x; }
EM_INLINE B level_of(B code) {
  const __m256i table = plus_128(levels());
  return {_mm256_shuffle_epi8(table, code.a), _mm256_shuffle_epi8(table, code.b)};
}
template <class C, int PLACE>
EM_INLINE Dot dot_begin(const int32_t &negative_sum) {
  if constexpr (C::kZero == 0) return dot_zero();
  const __m256i start = _mm256_slli_epi32(_mm256_set1_epi32(negative_sum), C::kZeroShift + PLACE);
  return {start, start};
}
template <class C>
EM_INLINE Dot dot_add(Dot d, B code, const int8_t *q) {
  const __m256i a = word_of(q);
  return {_mm256_dpbusd_avx_epi32(d.a, code.a, a), _mm256_dpbusd_avx_epi32(d.b, code.b, a)};
}
template <int PLACE>
EM_INLINE Dot shifted_down(Dot d) {
  return {_mm256_srai_epi32(d.a, PLACE), _mm256_srai_epi32(d.b, PLACE)};
}
EM_INLINE Dot sum_of(Dot x, Dot y) {
  return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)};
}
template <class C>
EM_INLINE F dot_end(Dot d, int32_t) {
  return {_mm256_cvtepi32_ps(d.a), _mm256_cvtepi32_ps(d.b)};
}
#else
// maddubs adds pairs of products in int16. Codes up to 15: the 8 words of an activation group reach
// 8 * 2 * 15 * 127 = 30480 and are summed there; 2-bit codes two bits up 4 * 2 * 12 * 127. Bytes
// would saturate: taken as signed numbers, 128 less, one pair at a time, summed in int32.
template <class C>
constexpr bool kSplits = C::kBits == 2;

EM_INLINE B byte_code(B x) { return {plus_128(x.a), plus_128(x.b)}; }
EM_INLINE B level_of(B code) {
  return {_mm256_shuffle_epi8(levels(), code.a), _mm256_shuffle_epi8(levels(), code.b)};
}
template <class C, int>
EM_INLINE Dot dot_begin(int32_t) {
  return dot_zero();
}
EM_INLINE __m256i dot_signed(__m256i sum, __m256i weight, __m256i q) {
  const __m256i pairs =
      _mm256_maddubs_epi16(_mm256_abs_epi8(weight), _mm256_sign_epi8(q, weight));
  return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
template <class C>
EM_INLINE Dot dot_add(Dot d, B code, const int8_t *q) {
  const __m256i a = word_of(q);
  if constexpr (C::kIsByte) return {dot_signed(d.a, code.a, a), dot_signed(d.b, code.b, a)};
  return {_mm256_add_epi16(d.a, _mm256_maddubs_epi16(code.a, a)),
          _mm256_add_epi16(d.b, _mm256_maddubs_epi16(code.b, a))};
}
template <int PLACE>
EM_INLINE Dot shifted_down(Dot d) {
  return {_mm256_srai_epi16(d.a, PLACE), _mm256_srai_epi16(d.b, PLACE)};
}
EM_INLINE Dot sum_of(Dot x, Dot y) {
  return {_mm256_add_epi16(x.a, y.a), _mm256_add_epi16(x.b, y.b)};
}
template <class C>
EM_INLINE F dot_end(Dot d, int32_t negative_sum) {
  if constexpr (!C::kIsByte) {
    const __m256i one = _mm256_set1_epi16(1);
    d = {_mm256_madd_epi16(d.a, one), _mm256_madd_epi16(d.b, one)};
  }
  constexpr int kZero = C::kZero - (C::kIsByte ? 128 : 0);
  if constexpr (kZero != 0) {
    const __m256i start = _mm256_set1_epi32(negative_sum * kZero);
    d = {_mm256_add_epi32(d.a, start), _mm256_add_epi32(d.b, start)};
  }
  return {_mm256_cvtepi32_ps(d.a), _mm256_cvtepi32_ps(d.b)};
}
#endif

#include "kernels_impl.h"

}  // namespace
}  // namespace em
