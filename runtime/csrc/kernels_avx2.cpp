// AVX2 lanes: two registers of 8 rows.
#include "kernels.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include <immintrin.h>

#define EM_INLINE static inline __attribute__((always_inline))
#if defined(__clang__)
#define EM_UNROLL _Pragma("unroll")
#else
#define EM_UNROLL _Pragma("GCC unroll 8")
#endif
#define EM_FMA __builtin_fmaf

namespace em {
namespace {

constexpr const char *kName = "avx2";
constexpr int kMaxCodesBlock = 4;
constexpr int kMax16bitBlock = 2;

struct F {
  __m256 a, b;
};
struct B {
  __m256i a, b;
};
// Below 8 bits: int16 sums of pairs; 8 words of codes up to 15 reach 8 * 2 * 15 * 127 = 30480, so
// the 32 columns of an activation group just fit. 8 bits: int32 sums.
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

template <int BITS, bool ASYM>
EM_INLINE Dot dot_begin(int32_t) {
  return {_mm256_setzero_si256(), _mm256_setzero_si256()};
}
EM_INLINE __m256i dot_signed(__m256i sum, __m256i code, __m256i q) {
  // maddubs would saturate with codes up to 255: take |code - 128| and move the sign to q.
  const __m256i weight = _mm256_xor_si256(code, _mm256_set1_epi8(static_cast<char>(0x80)));
  const __m256i pairs =
      _mm256_maddubs_epi16(_mm256_abs_epi8(weight), _mm256_sign_epi8(q, weight));
  return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
template <int BITS>
EM_INLINE Dot dot_add(Dot d, B code, const int8_t *q) {
  int32_t word;
  __builtin_memcpy(&word, q, 4);
  const __m256i a = _mm256_set1_epi32(word);
  if constexpr (BITS == 8) return {dot_signed(d.a, code.a, a), dot_signed(d.b, code.b, a)};
  return {_mm256_add_epi16(d.a, _mm256_maddubs_epi16(code.a, a)),
          _mm256_add_epi16(d.b, _mm256_maddubs_epi16(code.b, a))};
}
template <int BITS, bool ASYM>
EM_INLINE F dot_end(Dot d, int32_t negative_sum) {
  if constexpr (BITS < 8) {
    const __m256i one = _mm256_set1_epi16(1);
    d = {_mm256_madd_epi16(d.a, one), _mm256_madd_epi16(d.b, one)};
  }
  // 8-bit codes have their 128 taken off already: asymmetric ones get it back.
  constexpr bool kShift = ASYM == (BITS == 8);
  if constexpr (kShift) {
    const __m256i shift = _mm256_set1_epi32(negative_sum * (1 << (BITS - 1)));
    if constexpr (BITS == 8) {
      d = {_mm256_sub_epi32(d.a, shift), _mm256_sub_epi32(d.b, shift)};
    } else {
      d = {_mm256_add_epi32(d.a, shift), _mm256_add_epi32(d.b, shift)};
    }
  }
  return {_mm256_cvtepi32_ps(d.a), _mm256_cvtepi32_ps(d.b)};
}

#include "kernels_impl.h"

}  // namespace

const Kernels *kernels_avx2() { return &kTable; }

}  // namespace em
#else
namespace em {
const Kernels *kernels_avx2() { return nullptr; }
}  // namespace em
#endif
