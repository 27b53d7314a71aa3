// The small loops of RowKernels, included at the end of attention_impl.h under the same rules: plain
// loops whose order of operations is written out, so that vectors of any width give the same bits.

EM_INLINE float float_of(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}
EM_INLINE uint32_t bits_of(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  return bits;
}

// The sum runs over 16 fixed lanes in double. A product of two floats is exact in double, so that it
// does not matter whether it is fused with the addition.
void rms_norm(const float *x, const float *weight, int64_t cols, float eps, float *y) {
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
  const double mean = lanes[0] / static_cast<double>(cols) + static_cast<double>(eps);
  const float inverse = static_cast<float>(1.0 / __builtin_sqrt(mean));
  for (int64_t i = 0; i < cols; ++i) y[i] = x[i] * inverse * weight[i];
}

void rotate(float *head, const float *cos, const float *sin, int64_t half) {
  for (int64_t i = 0; i < half; ++i) {
    const float first = head[i], second = head[half + i];
    head[i] = first * cos[i] - second * sin[i];
    head[half + i] = second * cos[i] + first * sin[i];
  }
}

void clamp(float *x, int64_t num, float limit) {
  for (int64_t i = 0; i < num; ++i) {
    const float low = x[i] < -limit ? -limit : x[i];  // NaN stays NaN
    x[i] = low > limit ? limit : low;
  }
}

void add(const float *x, int64_t num, float *y) {
  for (int64_t i = 0; i < num; ++i) y[i] += x[i];
}

void softmax(float *scores, int64_t num) {
  const float sum = softmax_weights(scores, num);
  for (int64_t i = 0; i < num; ++i) scores[i] /= sum;
}

void to_bf16(const float *x, int64_t num, uint16_t *dst) {
  for (int64_t i = 0; i < num; ++i) {
    const uint32_t bits = bits_of(x[i]);
    const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    // Rounding up would make a NaN with a full mantissa a zero.
    dst[i] = static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? bits >> 16 | 0x40 : rounded);
  }
}

// As Kernels::quantize, over a whole head: NaN or infinity makes the scale NaN, and with it every
// score or output that it has a part in.
float to_int8(const float *x, int64_t num, int8_t *dst) {
  constexpr float kRound = 12582912.0f;
  constexpr uint32_t kRoundBits = 0x4b400000;
  uint32_t largest_bits = 0;
  for (int64_t i = 0; i < num; ++i) {
    const uint32_t bits = bits_of(x[i]) & 0x7fffffff;
    largest_bits = bits > largest_bits ? bits : largest_bits;
  }
  const float largest = float_of(largest_bits);
  const bool is_finite = largest_bits < 0x7f800000;
  if (!is_finite || largest < 0x1p-116f) {
    for (int64_t i = 0; i < num; ++i) dst[i] = 0;
    return is_finite ? 0.0f : float_of(0x7fc00000);
  }
  const float inverse = 127.0f / largest;
  for (int64_t i = 0; i < num; ++i) {
    dst[i] = static_cast<int8_t>(bits_of(x[i] * inverse + kRound) - kRoundBits);
  }
  return largest / 127.0f;
}

float sigmoid(float x) {
  const float power = exp_of(x < 0 ? x : -x);  // of -|x|
  return (x < 0 ? power : 1.0f) / (1.0f + power);
}

constexpr RowKernels kRowTable = {attend,  rms_norm, rotate,  clamp,  add,
                                  softmax, to_bf16,  to_int8, sigmoid};
