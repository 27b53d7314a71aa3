// Packed matrices with the float64 values that they stand for.
#pragma once
#include <string>
#include <vector>

#include "check.h"
#include "edgemoe_core.h"

struct Matrix {
  int64_t rows, cols;
  em_format format;
  std::vector<double> weights;  // [rows, cols], exact
  std::vector<uint8_t> packed;
};

const std::vector<em_format> &all_formats();
std::string name_of(em_format format);
double from_half(uint16_t half);

// Random codes and scales. `extreme`: scales from subnormal to the largest, zeros among them.
Matrix make_matrix(check::Random &random, int64_t rows, int64_t cols, em_format format,
                   bool extreme = false);

// What a matrix of this format sees of x [T, cols]: int8 in groups of 32, or x itself.
std::vector<double> seen_by(em_format format, const std::vector<float> &x);
// [T, rows] = x [T, cols] . W^T
std::vector<double> product(const Matrix &matrix, const std::vector<double> &x);
