#include <cmath>

#include "edgemoe_core.h"

// Sums run over 16 fixed lanes in double: the compiler can use vectors of any width, and a row has
// the same bits wherever it lies. A product of two floats is exact in double, so that it does not
// matter whether the compiler fuses it with the addition.
void em_rms_norm(const float *x, const float *weight, int64_t num_tokens, int64_t cols, float eps,
                 float *y) {
  constexpr int kLanes = 16;
  for (int64_t t = 0; t < num_tokens; ++t, x += cols, y += cols) {
    double lanes[kLanes] = {};
    int64_t k = 0;
    for (; k + kLanes <= cols; k += kLanes) {
      for (int i = 0; i < kLanes; ++i) {
        const double value = x[k + i];
        lanes[i] += value * value;
      }
    }
    for (int i = 0; k < cols; ++i, ++k) lanes[i] += static_cast<double>(x[k]) * x[k];
    for (int half = kLanes / 2; half; half /= 2) {
      for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
    }
    const float inverse =
        static_cast<float>(1.0 / std::sqrt(lanes[0] / static_cast<double>(cols) + eps));
    for (int64_t i = 0; i < cols; ++i) y[i] = x[i] * inverse * weight[i];
  }
}
