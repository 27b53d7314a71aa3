// AVX2 lanes: two registers of 8.
#include "attention.h"

#if defined(__AVX2__) && defined(__FMA__)
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

constexpr int kMaxRows = 4;
constexpr int kMaxAccumulators = 4;  // of two registers each; more would not stay in 16
constexpr int kMaxScores = 4;  // chains of products side by side

struct F {
  __m256 low, high;
};

EM_INLINE F broadcast(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
EM_INLINE F fma(F x, F y, F z) {
  return {_mm256_fmadd_ps(x.low, y.low, z.low), _mm256_fmadd_ps(x.high, y.high, z.high)};
}
EM_INLINE F load(const float *p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
EM_INLINE __m256 widen(const uint16_t *p) {
  const __m128i words = _mm_loadu_si128(reinterpret_cast<const __m128i *>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(words), 16));
}
EM_INLINE F load(const uint16_t *p) { return {widen(p), widen(p + 8)}; }
EM_INLINE __m256 widen(const int8_t *p) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i *>(p));
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
}
EM_INLINE F load(const int8_t *p) { return {widen(p), widen(p + 8)}; }
EM_INLINE void store(float *p, F x) {
  _mm256_storeu_ps(p, x.low);
  _mm256_storeu_ps(p + 8, x.high);
}

// Sums of 8 rows of [8, 16]: a transposition that adds as it goes.
EM_INLINE __m256 eight_sums(const float *p) {
  __m256 row[8], two[4], four[2];
  EM_UNROLL
  for (int i = 0; i < 8; ++i) {
    row[i] = _mm256_add_ps(_mm256_loadu_ps(p + 16 * i), _mm256_loadu_ps(p + 16 * i + 8));
  }
  EM_UNROLL
  for (int i = 0; i < 4; ++i) {
    const __m256 x = row[2 * i], y = row[2 * i + 1];
    two[i] = _mm256_add_ps(_mm256_permute2f128_ps(x, y, 0x20), _mm256_permute2f128_ps(x, y, 0x31));
  }
  EM_UNROLL
  for (int i = 0; i < 2; ++i) {
    const __m256 x = two[2 * i], y = two[2 * i + 1];
    four[i] = _mm256_add_ps(_mm256_shuffle_ps(x, y, 0x44), _mm256_shuffle_ps(x, y, 0xee));
  }
  const __m256 sums = _mm256_add_ps(_mm256_shuffle_ps(four[0], four[1], 0x88),
                                    _mm256_shuffle_ps(four[0], four[1], 0xdd));
  return _mm256_permutevar8x32_ps(sums, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}
EM_INLINE F row_sums(const float *p) { return {eight_sums(p), eight_sums(p + 128)}; }

#include "attention_impl.h"

}  // namespace

const RowKernels *rows_avx2() { return &kRowTable; }

}  // namespace em
#else
namespace em {
const RowKernels *rows_avx2() { return nullptr; }
}  // namespace em
#endif
