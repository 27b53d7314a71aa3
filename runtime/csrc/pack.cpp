// Between row-major matrices and tiles. The layout is described in runtime/format.py.
#include <cstring>

#include "edgemoe_core.h"
#include "kernels.h"

namespace em {
namespace {

constexpr int64_t kMaxSide = int64_t{1} << 30;  // keeps every product below 2^63

bool is_valid(int64_t rows, int64_t cols, em_format f) {
  if (rows < 1 || cols < 1 || rows > kMaxSide || cols > kMaxSide) return false;
  if (is_16bit(f)) return f.bits == 16 && f.group_size == 0 && cols % 2 == 0;
  const bool is_table = f.mode == EM_MODE_NF4;
  return (f.mode == EM_MODE_SYM || f.mode == EM_MODE_ASYM || is_table) &&
         (f.bits == 4 || (!is_table && (f.bits == 2 || f.bits == 3 || f.bits == 8))) &&
         (f.group_size == 32 || f.group_size == 64 || f.group_size == 128) &&
         cols % f.group_size == 0;
}

void put_word(uint8_t *p, uint16_t word) {
  p[0] = static_cast<uint8_t>(word);
  p[1] = static_cast<uint8_t>(word >> 8);
}
uint16_t get_word(const uint8_t *p) { return static_cast<uint16_t>(p[0] | p[1] << 8); }

float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

float from_bf16(uint16_t word) { return float_of(static_cast<uint32_t>(word) << 16); }

float from_fp16(uint16_t word) {
  const uint32_t sign = static_cast<uint32_t>(word & 0x8000) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(word & 0x7fff) << 13;
  if (magnitude >= 0x0f800000) return float_of(sign | 0x7f800000 | magnitude);
  const float value = float_of(magnitude) * 0x1p112f;  // exact, subnormals too
  return sign != 0 ? -value : value;
}

// Where the tile keeps what belongs to column group g.
struct Group {
  uint8_t *scales;  // fp16 [16]
  uint8_t *mins;    // fp16 [16], asymmetric only
  uint8_t *codes;
};

Group group_at(uint8_t *tile, em_format f, int64_t g) {
  const int64_t lines = f.mode == EM_MODE_ASYM ? 2 : 1;
  const int64_t code_bytes = f.group_size * kTileRows * f.bits / 8;
  // Every pair before this one is whole, whatever the number of groups.
  uint8_t *pair = tile + g / 2 * (lines * kLineBytes + 2 * code_bytes);
  return {pair + g % 2 * 32, pair + kLineBytes + g % 2 * 32,
          pair + lines * kLineBytes + g % 2 * code_bytes};
}

// The lowest bit of a code is bit `shift` of byte `byte`, counted from the group's first code byte.
struct Place {
  int64_t byte;
  int shift;
};

Place place_of(int bits, int row, int64_t column) {
  const int64_t lane = row * 4 + column % 4;
  const int64_t word = column / 4;
  if (bits == 8) return {word * kLineBytes + lane, 0};
  if (bits == 4) return {word / 2 * kLineBytes + lane, static_cast<int>(word % 2) * 4};
  if (bits == 2) return {word / 4 * kLineBytes + lane, static_cast<int>(word % 4) * 2};
  // 3 bits: the low two, in units of 32 columns; the high bit is in the unit's third line.
  return {column / 32 * 3 * kLineBytes + word % 8 / 4 * kLineBytes + lane,
          static_cast<int>(word % 4) * 2};
}

Place high_place_of(int row, int64_t column) {
  return {column / 32 * 3 * kLineBytes + 2 * kLineBytes + row * 4 + column % 4,
          static_cast<int>(column / 4 % 8)};
}

void put_code(uint8_t *codes, int bits, int row, int64_t column, int code) {
  const Place place = place_of(bits, row, column);
  const int low = bits == 3 ? code & 3 : code & ((1 << bits) - 1);
  codes[place.byte] = static_cast<uint8_t>(codes[place.byte] | low << place.shift);
  if (bits != 3) return;
  const Place high = high_place_of(row, column);
  codes[high.byte] = static_cast<uint8_t>(codes[high.byte] | (code >> 2 & 1) << high.shift);
}

int get_code(const uint8_t *codes, int bits, int row, int64_t column) {
  const Place place = place_of(bits, row, column);
  const int low = codes[place.byte] >> place.shift & ((1 << (bits == 3 ? 2 : bits)) - 1);
  if (bits != 3) return low;
  const Place high = high_place_of(row, column);
  return low | (codes[high.byte] >> high.shift & 1) << 2;
}

void unpack_row(uint8_t *tile, int64_t cols, em_format f, int row, float *dst) {
  if (is_16bit(f)) {
    for (int64_t k = 0; k < cols; ++k) {
      const uint16_t word = get_word(tile + k / 2 * kLineBytes + row * 4 + k % 2 * 2);
      dst[k] = f.mode == EM_MODE_BF16 ? from_bf16(word) : from_fp16(word);
    }
    return;
  }
  const bool is_table = f.mode == EM_MODE_NF4;
  const int zero = f.mode == EM_MODE_ASYM ? 0 : 1 << (f.bits - 1);
  for (int64_t g = 0; g < cols / f.group_size; ++g) {
    const Group group = group_at(tile, f, g);
    const float scale = from_fp16(get_word(group.scales + 2 * row));
    const float min = f.mode == EM_MODE_ASYM ? from_fp16(get_word(group.mins + 2 * row)) : 0.0f;
    for (int64_t k = 0; k < f.group_size; ++k) {
      const int code = get_code(group.codes, f.bits, row, k);
      *dst++ = scale * static_cast<float>(is_table ? kNf4Levels[code] : code - zero) + min;
    }
  }
}

}  // namespace
}  // namespace em

int64_t em_matrix_bytes(int64_t rows, int64_t cols, em_format format) {
  if (!em::is_valid(rows, cols, format)) return EM_ERR_ARG;
  return (rows + em::kTileRows - 1) / em::kTileRows * em::tile_bytes(cols, format);
}

int32_t em_pack_codes(const uint8_t *codes, const uint16_t *scales, const uint16_t *mins,
                      int64_t rows, int64_t cols, em_format format, uint8_t *dst) {
  const int64_t num_bytes = em_matrix_bytes(rows, cols, format);
  const bool has_mins = mins != nullptr;
  if (num_bytes < 0 || em::is_16bit(format) || has_mins != (format.mode == EM_MODE_ASYM)) {
    return EM_ERR_ARG;
  }
  std::memset(dst, 0, num_bytes);
  const int64_t num_groups = cols / format.group_size;
  for (int64_t r = 0; r < rows; ++r) {
    uint8_t *tile = dst + r / em::kTileRows * em::tile_bytes(cols, format);
    const int row = static_cast<int>(r % em::kTileRows);
    for (int64_t g = 0; g < num_groups; ++g) {
      const em::Group group = em::group_at(tile, format, g);
      em::put_word(group.scales + 2 * row, scales[r * num_groups + g]);
      if (has_mins) em::put_word(group.mins + 2 * row, mins[r * num_groups + g]);
      const uint8_t *source = codes + r * cols + g * format.group_size;
      for (int64_t k = 0; k < format.group_size; ++k) {
        em::put_code(group.codes, format.bits, row, k, source[k]);
      }
    }
  }
  return 0;
}

int32_t em_pack_16bit(const uint16_t *weights, int64_t rows, int64_t cols, uint8_t *dst) {
  const em_format format = {16, 0, EM_MODE_BF16};  // fp16 lies the same way
  const int64_t num_bytes = em_matrix_bytes(rows, cols, format);
  if (num_bytes < 0) return EM_ERR_ARG;
  if (rows % em::kTileRows) {
    const int64_t last = em::tile_bytes(cols, format);
    std::memset(dst + num_bytes - last, 0, last);
  }
  for (int64_t r = 0; r < rows; ++r) {
    uint8_t *row = dst + r / em::kTileRows * em::tile_bytes(cols, format) + r % em::kTileRows * 4;
    for (int64_t k = 0; k < cols; ++k) {
      em::put_word(row + k / 2 * em::kLineBytes + k % 2 * 2, weights[r * cols + k]);
    }
  }
  return 0;
}

int32_t em_unpack_rows(const uint8_t *packed, int64_t rows, int64_t cols, em_format format,
                       int64_t row_begin, int64_t num_rows, float *dst) {
  if (em_matrix_bytes(rows, cols, format) < 0 || row_begin < 0 || num_rows < 0 ||
      row_begin > rows - num_rows) {
    return EM_ERR_ARG;
  }
  for (int64_t r = row_begin; r < row_begin + num_rows; ++r, dst += cols) {
    const uint8_t *tile = packed + r / em::kTileRows * em::tile_bytes(cols, format);
    em::unpack_row(const_cast<uint8_t *>(tile), cols, format,
                   static_cast<int>(r % em::kTileRows), dst);
  }
  return 0;
}
