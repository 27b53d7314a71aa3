// What the matrices of a record are, of an expert with F neurons; runtime/format.py.
#pragma once
#include <cstdint>

#include "edgemoe_core.h"
#include "kernels.h"

namespace em {

// Rows of gate and of up as stored, columns of down.
inline int64_t inner_width(const em_record &record, int64_t width) {
  return record.rank > 0 ? int64_t{record.dense} + record.rank : width;
}

struct RecordShape {
  // `width` F; hidden and width are multiples of kTileRows, or is_valid becomes false.
  RecordShape(const em_record &record, int64_t hidden, int64_t width)
      : num_factored(record.rank > 0 ? width - record.dense : 0) {
    is_valid = hidden > 0 && width > 0 && hidden % kTileRows == 0 && width % kTileRows == 0;
    if (record.rank != 0) {
      is_valid = is_valid && record.rank > 0 && record.dense >= 0 && num_factored > 0 &&
                 (record.dense | record.rank | num_factored) % kActGroup == 0;
    }
    if (!is_valid) return;
    const int64_t inner = inner_width(record, width);
    gate_bytes = em_matrix_bytes(inner, hidden, record.gate_up);
    down_bytes = em_matrix_bytes(hidden, inner, record.down);
    if (record.rank > 0) {
      expand_bytes = em_matrix_bytes(num_factored, record.rank, record.factors);
      reduce_bytes = em_matrix_bytes(record.rank, num_factored, record.factors);
    }
    is_valid = gate_bytes > 0 && down_bytes > 0 && expand_bytes >= 0 && reduce_bytes >= 0;
  }

  int64_t num_factored;  // neurons whose weights are products
  bool is_valid = false;
  int64_t gate_bytes = 0, down_bytes = 0;
  int64_t expand_bytes = 0, reduce_bytes = 0;  // of U_g, as of U_u, and of V_d
  // Where U_g begins; U_u and V_d follow.
  int64_t factors_offset() const { return 2 * gate_bytes; }
  int64_t front_bytes() const { return factors_offset() + 2 * expand_bytes + reduce_bytes; }
};

// Floats between gate|up and down of one token of an expert with this record.
inline int64_t row_floats(const em_record &record, int64_t width) {
  return width + 3 * int64_t{record.rank};
}

}  // namespace em
