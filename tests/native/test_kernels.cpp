// Every level of the kernels against float64, against each other, and against itself in batches.
#include <cmath>
#include <limits>

#include "check.h"
#include "kernels.h"
#include "matrices.h"

namespace {

using check::Random;

std::vector<const em::Kernels *> levels() {
  const em::Kernels *list[em::kMaxLevels];
  const int num = em::available_levels(list);
  return {list, list + num};
}

// A tile of 16 rows with num_tokens tokens, starting at `first` of x.
std::vector<float> run_tile(const em::Kernels &level, const Matrix &matrix,
                            const std::vector<float> &x, int first, int num_tokens) {
  const int64_t groups = matrix.cols / em::kActGroup;
  std::vector<em::ActGroup> quantized(static_cast<size_t>(num_tokens * groups));
  const void *inputs[em::kMaxTokens];
  for (int t = 0; t < num_tokens; ++t) {
    const float *row = x.data() + (first + t) * matrix.cols;
    inputs[t] = row;
    if (matrix.format.bits == 16) continue;
    level.quantize(row, matrix.cols, &quantized[t * groups]);
    inputs[t] = &quantized[t * groups];
  }
  std::vector<float> y(static_cast<size_t>(num_tokens * em::kTileRows));
  level.tile(matrix.format)(matrix.packed.data(), matrix.cols, inputs, num_tokens, y.data(),
                            em::kTileRows);
  return y;
}

std::vector<float> rows_of(const std::vector<float> &y, int first, int num) {
  return {y.begin() + first * em::kTileRows, y.begin() + (first + num) * em::kTileRows};
}

}  // namespace

TEST(tiles_agree_with_float64_and_between_levels) {
  Random random(1);
  for (const em_format format : all_formats()) {
    const int64_t unit = format.bits == 16 ? 2 : format.group_size;
    for (const int64_t cols : {unit, 3 * unit, 4 * unit, 7 * unit}) {
      const Matrix matrix = make_matrix(random, em::kTileRows, cols, format);
      const std::vector<float> x = random.floats(em::kMaxTokens * cols);
      const std::vector<double> expected = product(matrix, seen_by(format, x));
      const std::vector<float> y = run_tile(em::kernels(), matrix, x, 0, em::kMaxTokens);
      if (!(check::relative_error(y, expected) < 2e-6)) {
        check::fail(__FILE__, __LINE__, name_of(format) + ", columns " + std::to_string(cols));
      }
      check::digest(y);
      for (const em::Kernels *level : levels()) {
        for (int num = 1, first = 0; num <= em::kMaxTokens; ++num, first = em::kMaxTokens - num) {
          if (check::same_bits(run_tile(*level, matrix, x, first, num), rows_of(y, first, num)))
            continue;
          check::fail(__FILE__, __LINE__, std::string(level->name) + ": " + name_of(format) +
                                              ", tokens " + std::to_string(num));
        }
      }
    }
  }
}

TEST(tiles_hold_extreme_scales) {
  Random random(2);
  for (const em_format format : all_formats()) {
    const Matrix matrix = make_matrix(random, em::kTileRows, 384, format, true);
    std::vector<float> x = random.floats(3 * 384, 100.0f);
    for (int i = 0; i < 384; ++i) x[384 + i] = i < 64 ? 0.0f : x[i] * 1e-30f;
    const std::vector<double> expected = product(matrix, seen_by(format, x));
    const std::vector<float> y = run_tile(em::kernels(), matrix, x, 0, 3);
    for (int t = 0; t < 3; ++t) {
      const std::vector<float> row = rows_of(y, t, 1);
      const std::vector<double> right(expected.begin() + t * em::kTileRows,
                                      expected.begin() + (t + 1) * em::kTileRows);
      if (!(check::relative_error(row, right) < 1e-4)) check::fail(__FILE__, __LINE__, name_of(format));
    }
    check::digest(y);
    for (const em::Kernels *level : levels()) {
      CHECK(check::same_bits(run_tile(*level, matrix, x, 0, 3), y));
    }
  }
}

TEST(activations_are_quantized_alike) {
  Random random(3);
  std::vector<float> x = random.floats(14 * 32, 1000.0f);
  const float inf = std::numeric_limits<float>::infinity();
  x[0] = std::numeric_limits<float>::quiet_NaN();
  x[33] = inf;
  x[70] = -inf;
  for (int i = 96; i < 128; ++i) x[i] = 0.0f;
  for (int i = 128; i < 160; ++i) x[i] *= 0x1p-140f;  // subnormal
  for (int i = 160; i < 192; ++i) x[i] *= 0x1p100f;
  for (int i = 192; i < 224; ++i) x[i] = static_cast<float>(i - 192) * 8.0f + 0.5f;  // ties
  for (int i = 224; i < 256; ++i) x[i] = -0.0f;
  x[256] = 0x1p-116f, x[257] = -0x1p-117f;
  for (int i = 258; i < 288; ++i) x[i] = 0.0f;
  const std::vector<double> seen = seen_by({4, 32, EM_MODE_SYM}, x);
  for (const em::Kernels *level : levels()) {
    em::ActGroup groups[14];
    level->quantize(x.data(), 14 * 32, groups);
    for (int g = 0; g < 14; ++g) {
      int sum = 0;
      for (int i = 0; i < 32; ++i) {
        sum += groups[g].q[i];
        if (g >= 3) CHECK_EQUAL(groups[g].q[i] * static_cast<double>(groups[g].scale), seen[32 * g + i]);
      }
      CHECK_EQUAL(groups[g].negative_sum, -sum);
      if (g < 3) CHECK(std::isnan(groups[g].scale) && std::isnan(groups[g].sum) && sum == 0);
      else CHECK_EQUAL(groups[g].sum, groups[g].scale * static_cast<float>(sum));
    }
  }
}

TEST(activation_function_agrees_with_float64_and_between_levels) {
  Random random(4);
  constexpr int kNum = 1003;
  std::vector<float> gate = random.floats(kNum, 20.0f), up = random.floats(kNum);
  gate[0] = 200.0f, gate[1] = -200.0f, gate[2] = 0.0f, gate[3] = -87.3f, gate[4] = 88.5f;
  std::vector<float> first(kNum);
  em::kernels().silu_mul(gate.data(), up.data(), kNum, first.data());
  check::digest(first);
  for (int i = 0; i < kNum; ++i) {
    const double right = gate[i] / (1.0 + std::exp(-static_cast<double>(gate[i]))) * up[i];
    // Below -87 the exponential stays where it was, so the result is tiny, not 0.
    CHECK(std::fabs(first[i] - right) <= 1e-6 * std::fabs(right) + 1e-35);
  }
  for (const em::Kernels *level : levels()) {
    std::vector<float> other(kNum);
    level->silu_mul(gate.data(), up.data(), kNum, other.data());
    CHECK(check::same_bits(other, first));
    std::vector<float> sum = up, expected = up;
    level->add_scaled(0.37f, gate.data(), kNum, sum.data());
    for (int i = 0; i < kNum; ++i) expected[i] = std::fma(0.37f, gate[i], expected[i]);
    CHECK(check::same_bits(sum, expected));
  }
}
