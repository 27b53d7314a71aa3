#include <cmath>

#include "check.h"
#include "edgemoe_core.h"

TEST(rms_norm_agrees_with_float64) {
  check::Random random(21);
  for (const int64_t cols : {1, 15, 16, 17, 64, 2048}) {
    constexpr int64_t kTokens = 3;
    std::vector<float> x = random.floats(kTokens * cols, 5.0f), weight = random.floats(cols);
    for (int64_t i = 0; i < cols; ++i) x[i] = 0.0f;  // a row of zeros: only eps under the root
    std::vector<float> y(x.size());
    em_rms_norm(x.data(), weight.data(), kTokens, cols, 1e-5f, y.data());
    std::vector<double> expected(x.size());
    for (int64_t t = 0; t < kTokens; ++t) {
      double sum = 0;
      for (int64_t i = 0; i < cols; ++i) sum += std::pow(x[t * cols + i], 2);
      const double inverse = 1 / std::sqrt(sum / cols + 1e-5f);
      for (int64_t i = 0; i < cols; ++i) {
        expected[t * cols + i] = x[t * cols + i] * inverse * weight[i];
      }
    }
    CHECK(check::relative_error(y, expected) < 1e-6);
    check::digest(y);
    std::vector<float> last(x.end() - cols, x.end());  // alone and in place
    em_rms_norm(last.data(), weight.data(), 1, cols, 1e-5f, last.data());
    CHECK(check::same_bits(last, {y.end() - cols, y.end()}));
  }
}
