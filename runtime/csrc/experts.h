// What the experts of one layer compute, apart from when their records arrive (moe.cpp).
//
// The work of a segment is cut into items that any thread may run in any order: gate_up items, and
// once all of them are done, down items. Segments of many pairs go through the panel kernel (gemm.h):
// their inputs are gathered into panels before the first gate_up item. Both ways give the same bits.
#pragma once
#include <cstdint>

#include "edgemoe_core.h"
#include "gemm.h"
#include "kernels.h"
#include "thread_pool.h"

namespace em {

// Consecutive pairs of one expert, and where their intermediate rows lie in the workspace.
struct Segment {
  int64_t expert, pair, num_pairs, row;
};

class Experts {
 public:
  Experts(em_pool *pool, const em_record *records, const em_moe_args &args);

  static int64_t workspace_floats(int64_t num_tokens, int64_t num_pairs, int64_t hidden,
                                  int64_t width);
  // Intermediate rows that are held at a time; the rows of all segments in work must fit.
  static int64_t num_rows(int64_t num_tokens, int64_t num_pairs);

  void quantize_inputs() const;  // before the first gate_up
  int64_t num_gate_up_items() const;  // of one segment
  int64_t num_down_items() const;
  int64_t num_gather_items(const Segment &segment) const;  // 0: it needs none
  void gather(const Segment &segment, int64_t item) const;
  void gate_up(const Segment &segment, int64_t item) const;  // h = silu(gate x) * (up x), 32 rows
  void down(const Segment &segment, int64_t item) const;     // one row of outputs per pair
  void combine() const;  // y[t] += weight * output, in the order of the list
  void measure() const;  // pair_norm

 private:
  const em_record &record(int64_t expert) const { return records_[a_.keys[expert]]; }
  bool uses_panels(const Segment &segment, em_format format) const;
  // Panels lie in place of the fp32 rows of the segment: the inputs where its outputs will be.
  ActPanel *input_panels(const Segment &segment) const;
  ActPanel *h_panels(const Segment &segment) const;
  void gate_up_panels(const Segment &segment, int64_t item) const;
  void gate_up_tiles(const Segment &segment, int64_t item) const;
  void put_h(const Segment &segment, int64_t pair, int64_t item, const float *values) const;

  em_pool *pool_;
  const em_record *records_;
  const em_moe_args &a_;
  const Kernels &level_;
  float *partial_;         // [pairs][D], or the segment's panels of inputs at its first pair
  float *h_;               // [num_rows][F] floats, or ActGroup [F / 32] at the row's start, or panels
  ActGroup *quantized_x_;  // [T][D / 32]
};

}  // namespace em
