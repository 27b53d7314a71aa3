// AVX-512 lanes: one register.
#include "attention.h"

#if defined(__AVX512F__)
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // gcc 12's own _mm512_undefined
#endif
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

constexpr int kMaxRows = 8;
constexpr int kMaxAccumulators = 16;
constexpr int kMaxScores = 8;  // chains of products side by side

using F = __m512;

EM_INLINE F broadcast(float x) { return _mm512_set1_ps(x); }
EM_INLINE F fma(F x, F y, F z) { return _mm512_fmadd_ps(x, y, z); }
EM_INLINE F load(const float *p) { return _mm512_loadu_ps(p); }
// Word i becomes the upper half of lane i in one step.
EM_INLINE F load(const uint16_t *p) {
  const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(p));
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  return _mm512_castsi512_ps(_mm512_maskz_permutexvar_epi16(
      0xaaaaaaaa, _mm512_slli_epi32(lanes, 16), _mm512_castsi256_si512(words)));
}
EM_INLINE F load(const int8_t *p) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i *>(p));
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
}
EM_INLINE void store(float *p, F x) { _mm512_storeu_ps(p, x); }

// Sums of the 16 rows of [16, 16]: a transposition that adds as it goes.
EM_INLINE F row_sums(const float *p) {
  F two[8], four[4], eight[2];
  EM_UNROLL
  for (int i = 0; i < 8; ++i) {
    const F x = load(p + 32 * i), y = load(p + 32 * i + 16);
    two[i] = _mm512_add_ps(_mm512_shuffle_f32x4(x, y, 0x44), _mm512_shuffle_f32x4(x, y, 0xee));
  }
  EM_UNROLL
  for (int i = 0; i < 4; ++i) {
    const F x = two[2 * i], y = two[2 * i + 1];
    four[i] = _mm512_add_ps(_mm512_shuffle_f32x4(x, y, 0x88), _mm512_shuffle_f32x4(x, y, 0xdd));
  }
  EM_UNROLL
  for (int i = 0; i < 2; ++i) {
    const F x = four[2 * i], y = four[2 * i + 1];
    eight[i] = _mm512_add_ps(_mm512_shuffle_ps(x, y, 0x44), _mm512_shuffle_ps(x, y, 0xee));
  }
  const F sums = _mm512_add_ps(_mm512_shuffle_ps(eight[0], eight[1], 0x88),
                               _mm512_shuffle_ps(eight[0], eight[1], 0xdd));
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  return _mm512_permutexvar_ps(order, sums);
}

#include "attention_impl.h"

}  // namespace

const RowKernels *rows_avx512vnni() { return &kRowTable; }

}  // namespace em
#else
namespace em {
const RowKernels *rows_avx512vnni() { return nullptr; }
}  // namespace em
#endif
