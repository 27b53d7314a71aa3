// Packing and em_linear: values, odd shapes, threads, and what is refused.
#include <cmath>

#include "check.h"
#include "matrices.h"

namespace {

using check::Random;

std::vector<float> linear(em_pool *pool, const Matrix &matrix, const std::vector<float> &x,
                          int64_t first, int64_t num_tokens, const float *bias) {
  std::vector<float> y(static_cast<size_t>(num_tokens * matrix.rows), NAN);
  CHECK_EQUAL(em_linear(pool, matrix.packed.data(), matrix.rows, matrix.cols, matrix.format,
                        x.data() + first * matrix.cols, num_tokens, bias, y.data()),
              0);
  return y;
}

}  // namespace

TEST(packed_matrices_unpack_to_their_weights) {
  Random random(11);
  for (const em_format format : all_formats()) {
    const Matrix matrix = make_matrix(random, 21, 384, format);
    std::vector<float> rows(7 * 384);
    CHECK_EQUAL(em_unpack_rows(matrix.packed.data(), 21, 384, format, 13, 7, rows.data()), 0);
    for (int64_t i = 0; i < 7 * 384; ++i) {
      const double right = matrix.weights[13 * 384 + i];
      CHECK(std::fabs(rows[i] - right) <= 1e-6 * std::fabs(right) + 1e-9);
    }
    // The padded rows of the last tile are zero.
    std::vector<float> last(384);
    CHECK_EQUAL(em_unpack_rows(matrix.packed.data(), 32, 384, format, 31, 1, last.data()), 0);
    for (const float value : last) CHECK_EQUAL(value, 0.0f);
  }
}

TEST(linear_agrees_with_float64_for_any_batch_and_threads) {
  Random random(12);
  em_pool *pools[] = {nullptr, em_pool_create(1), em_pool_create(2), em_pool_create(5)};
  constexpr int64_t kCols = 640;  // two blocks of the panel kernels, the second not whole
  for (const em_format format : all_formats()) {
    const Matrix matrix = make_matrix(random, 83, kCols, format);
    constexpr int64_t kTokens = 19;
    const std::vector<float> x = random.floats(kTokens * kCols), bias = random.floats(83);
    const std::vector<float> y = linear(nullptr, matrix, x, 0, kTokens, bias.data());
    std::vector<double> expected = product(matrix, seen_by(format, x));
    for (size_t i = 0; i < expected.size(); ++i) expected[i] += bias[i % 83];
    if (!(check::relative_error(y, expected) < 2e-6)) check::fail(__FILE__, __LINE__, name_of(format));
    check::digest(y);
    for (em_pool *pool : pools) {
      CHECK(check::same_bits(linear(pool, matrix, x, 0, kTokens, bias.data()), y));
      for (const int64_t num : {1, 2, 3, 8, 11}) {
        const int64_t first = kTokens - num;
        const std::vector<float> part = linear(pool, matrix, x, first, num, bias.data());
        CHECK(check::same_bits(part, {y.begin() + first * 83, y.end()}));
      }
    }
  }
  for (em_pool *pool : pools) em_pool_destroy(pool);
}

TEST(shapes_and_formats_that_cannot_be_are_refused) {
  const em_format good = {4, 32, EM_MODE_SYM};
  CHECK_EQUAL(em_matrix_bytes(16, 64, good), 64 + 64 * 16 / 2);
  for (const em_format format : {em_format{5, 32, 0}, em_format{4, 48, 0}, em_format{4, 32, 99},
                                 em_format{4, 32, -1}, em_format{16, 32, EM_MODE_BF16},
                                 em_format{8, 0, EM_MODE_FP16}, em_format{16, 0, EM_MODE_SYM}}) {
    CHECK_EQUAL(em_matrix_bytes(16, 64, format), EM_ERR_ARG);
  }
  for (const int64_t side : {int64_t{0}, int64_t{-16}, INT64_MIN, INT64_MAX, int64_t{1} << 40}) {
    CHECK_EQUAL(em_matrix_bytes(side, 64, good), EM_ERR_ARG);
    CHECK_EQUAL(em_matrix_bytes(64, side, good), EM_ERR_ARG);
  }
  CHECK_EQUAL(em_matrix_bytes(16, 65, {16, 0, EM_MODE_BF16}), EM_ERR_ARG);
  CHECK_EQUAL(em_matrix_bytes(16, 48, good), EM_ERR_ARG);
  // The largest sides: either refused or a size that is right, never one that wrapped around.
  for (const int64_t side : {int64_t{1} << 30, int64_t{1} << 31}) {
    const int64_t num_bytes = em_matrix_bytes(side, side, {16, 0, EM_MODE_BF16});
    CHECK(num_bytes == EM_ERR_ARG || num_bytes / side / 2 == side);
  }
  uint8_t packed[64 + 512] = {};
  float y[16];
  CHECK_EQUAL(em_unpack_rows(packed, 16, 64, good, 16, 1, y), EM_ERR_ARG);
  CHECK_EQUAL(em_unpack_rows(packed, 16, 64, good, -1, 1, y), EM_ERR_ARG);
  CHECK_EQUAL(em_unpack_rows(packed, 16, 64, good, INT64_MAX, 1, y), EM_ERR_ARG);
  CHECK_EQUAL(em_linear(nullptr, packed, 16, 64, good, y, -1, nullptr, y), EM_ERR_ARG);
  CHECK_EQUAL(em_linear(nullptr, packed, 16, 64, good, nullptr, 0, nullptr, nullptr), 0);
  CHECK_EQUAL(em_pack_codes(packed, nullptr, nullptr, 16, 64, {4, 32, EM_MODE_ASYM}, packed),
              EM_ERR_ARG);
}
