#include "matrices.h"

#include <cmath>
#include <cstring>

const std::vector<em_format> &all_formats() {
  static const std::vector<em_format> formats = [] {
    std::vector<em_format> list = {{16, 0, EM_MODE_BF16}, {16, 0, EM_MODE_FP16}};
    for (const int bits : {2, 3, 4, 8}) {
      for (const int group : {32, 64, 128}) {
        for (const int mode : {EM_MODE_SYM, EM_MODE_ASYM}) list.push_back({bits, group, mode});
      }
    }
    for (const int group : {32, 64, 128}) list.push_back({4, group, EM_MODE_NF4});
    return list;
  }();
  return formats;
}

std::string name_of(em_format format) {
  return std::to_string(format.bits) + " bits, groups of " + std::to_string(format.group_size) +
         ", mode " + std::to_string(format.mode);
}

double from_half(uint16_t half) {
  const int exponent = half >> 10 & 31, fraction = half & 1023;
  const double magnitude =
      exponent == 0 ? std::ldexp(fraction, -24) : std::ldexp(1024 + fraction, exponent - 25);
  return half & 0x8000 ? -magnitude : magnitude;
}

namespace {

double from_bf16(uint16_t word) {
  const uint32_t bits = static_cast<uint32_t>(word) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// NormalFloat4 in 127ths, as runtime/format.py has it.
constexpr int kNf4[16] = {-127, -88, -67, -50, -36, -23, -12, 0,
                          10,   20,  31,  43,  56,  71,  92,  127};

// A half of random sign and mantissa, its exponent around 1 / 64, or any finite one.
uint16_t random_half(check::Random &random, bool extreme) {
  if (extreme && random.below(4) == 0) return 0;
  const int64_t exponent = extreme ? random.below(31) : 8 + random.below(3);
  return static_cast<uint16_t>(random.below(2) << 15 | exponent << 10 | random.below(1024));
}

}  // namespace

Matrix make_matrix(check::Random &random, int64_t rows, int64_t cols, em_format format,
                   bool extreme) {
  Matrix matrix = {rows, cols, format, {}, {}};
  matrix.packed.assign(static_cast<size_t>(em_matrix_bytes(rows, cols, format)), 0xee);
  matrix.weights.resize(static_cast<size_t>(rows * cols));
  if (format.bits == 16) {
    std::vector<uint16_t> words(matrix.weights.size());
    for (size_t i = 0; i < words.size(); ++i) {
      words[i] = random_half(random, extreme);
      if (format.mode == EM_MODE_BF16) {
        words[i] = static_cast<uint16_t>((words[i] & 0x80ff) | (120 + random.below(6)) << 7);
      }
      matrix.weights[i] = format.mode == EM_MODE_BF16 ? from_bf16(words[i]) : from_half(words[i]);
    }
    CHECK_EQUAL(em_pack_16bit(words.data(), rows, cols, matrix.packed.data()), 0);
    return matrix;
  }
  const int64_t groups = cols / format.group_size;
  const bool has_mins = format.mode == EM_MODE_ASYM;
  std::vector<uint8_t> codes(matrix.weights.size());
  std::vector<uint16_t> scales(static_cast<size_t>(rows * groups)), mins(scales.size());
  for (uint8_t &code : codes) code = static_cast<uint8_t>(random.below(int64_t{1} << format.bits));
  for (uint16_t &scale : scales) scale = random_half(random, extreme);
  for (uint16_t &min : mins) min = random_half(random, extreme);
  for (int64_t i = 0; i < rows * cols; ++i) {
    const int64_t group = i / format.group_size;
    const int zero = has_mins ? 0 : 1 << (format.bits - 1);
    const int level = format.mode == EM_MODE_NF4 ? kNf4[codes[i]] : codes[i] - zero;
    matrix.weights[i] = from_half(scales[group]) * level;
    if (has_mins) matrix.weights[i] += from_half(mins[group]);
  }
  CHECK_EQUAL(em_pack_codes(codes.data(), scales.data(), has_mins ? mins.data() : nullptr, rows,
                            cols, format, matrix.packed.data()),
              0);
  return matrix;
}

std::vector<double> seen_by(em_format format, const std::vector<float> &x) {
  std::vector<double> seen(x.begin(), x.end());
  if (format.bits == 16) return seen;
  for (size_t begin = 0; begin < x.size(); begin += 32) {
    float largest = 0;
    for (size_t i = begin; i < begin + 32; ++i) largest = std::fmax(largest, std::fabs(x[i]));
    const bool is_zero = largest < 0x1p-116f;
    const float inverse = is_zero ? 0 : 127.0f / largest;
    const double scale = is_zero ? 0 : largest / 127.0f;
    for (size_t i = begin; i < begin + 32; ++i) seen[i] = std::nearbyint(x[i] * inverse) * scale;
  }
  return seen;
}

std::vector<double> product(const Matrix &matrix, const std::vector<double> &x) {
  const int64_t num_tokens = static_cast<int64_t>(x.size()) / matrix.cols;
  std::vector<double> y(static_cast<size_t>(num_tokens * matrix.rows));
  for (int64_t t = 0; t < num_tokens; ++t) {
    for (int64_t r = 0; r < matrix.rows; ++r) {
      double sum = 0;
      for (int64_t c = 0; c < matrix.cols; ++c) {
        sum += matrix.weights[r * matrix.cols + c] * x[t * matrix.cols + c];
      }
      y[t * matrix.rows + r] = sum;
    }
  }
  return y;
}
