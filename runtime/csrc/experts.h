// What the experts of one layer compute, apart from when their records arrive (moe.cpp).
//
// The work of a segment is cut into items that any thread may run in any order: gate_up items, and
// once all of them are done, down items; between the two expand and reduce items, in this order,
// where the record is factored. Segments of many pairs go through the panel kernel (gemm.h):
// their inputs are gathered into panels before the first gate_up item. Both ways give the same bits.
#pragma once
#include <cstdint>

#include "edgemoe_core.h"
#include "gemm.h"
#include "kernels.h"
#include "record_shape.h"
#include "thread_pool.h"

namespace em {

// Consecutive pairs of one expert, and where their intermediate rows lie in the workspace.
struct Segment {
  int64_t expert, pair, num_pairs, row;
};

enum class Phase { kGateUp, kExpand, kReduce, kDown, kDone };  // what a segment computes next

class Experts {
 public:
  Experts(em_pool *pool, const em_record *records, const em_moe_args &args);

  static int64_t workspace_floats(int64_t num_tokens, int64_t num_pairs, int64_t hidden,
                                  int64_t row_floats);
  // Intermediate rows that are held at a time; the rows of all segments in work must fit.
  static int64_t num_rows(int64_t num_tokens, int64_t num_pairs);

  void quantize_inputs() const;  // before the first gate_up
  int64_t num_items(const Segment &segment, Phase phase) const;
  Phase following(const Segment &segment, Phase phase) const;
  int64_t num_gather_items(const Segment &segment) const;  // 0: it needs none
  void gather(const Segment &segment, int64_t item) const;
  void compute(const Segment &segment, Phase phase, int64_t item) const;
  // Has the first bytes that a segment's next phase reads come from memory.
  void fetch_start(const Segment &segment, Phase phase) const;
  void combine() const;  // y[t] += weight * output, in the order of the list
  void measure() const;  // pair_norm

 private:
  // Vectors of all pairs of a segment, as the kernels of `format` take them: floats, ActGroup
  // [cols / 32] at the start of a pair's floats, or panels in the place of all.
  struct Vectors {
    float *data;
    int64_t cols;
    em_format format;
  };

  const em_record &record(int64_t expert) const { return records_[a_.keys[expert]]; }
  RecordShape shape(const Segment &segment) const {
    return RecordShape(record(segment.expert), a_.hidden, a_.width);
  }
  int64_t inner(const Segment &segment) const {
    return inner_width(record(segment.expert), a_.width);
  }
  bool uses_panels(const Segment &segment, em_format format) const;
  // Panels lie in place of the fp32 rows of the segment: the inputs where its outputs will be.
  ActPanel *input_panels(const Segment &segment) const;
  Vectors down_inputs(const Segment &segment) const;  // h; factored: dense h, then V_d h
  // V_g x, V_u x, and what the second makes of them: h of the factored neurons.
  Vectors factor_inputs(const Segment &segment, int part) const;
  Vectors factored_h(const Segment &segment) const;
  int64_t pairs_at_once(const Segment &segment, em_format format) const;
  // out[i * stride + r] = row r of the tiles . vector of pair first + i, for i < num_pairs.
  void multiply(const Segment &segment, const Vectors &vectors, const uint8_t *tiles,
                int64_t num_tiles, int64_t first, int64_t num_pairs, float *out,
                int64_t stride) const;
  void gate_up(const Segment &segment, int64_t item) const;  // silu(gate x) * (up x), 32 rows
  void gate_up_panels(const Segment &segment, int64_t item) const;
  void gate_up_tiles(const Segment &segment, int64_t item) const;
  void expand(const Segment &segment, int64_t item) const;  // the same of 32 factored neurons
  void reduce(const Segment &segment, int64_t item) const;  // 32 rows of V_d h
  void down(const Segment &segment, int64_t item) const;    // one row of outputs per pair
  bool is_factor(const Segment &segment, int64_t item) const;  // rows of V_g and V_u
  // 32 values, or what there is, of one pair: group `group` of its vector.
  void put(const Segment &segment, const Vectors &vectors, int64_t pair, int64_t group,
           int64_t num, const float *values) const;
  void put_factors(const Segment &segment, int64_t pair, int64_t item, const float *gate,
                   const float *up) const;
  void put_h(const Segment &segment, int64_t pair, int64_t item, const float *values) const;
  void add_squares(const Segment &segment, int64_t neuron, int64_t num, const float *h) const;

  em_pool *pool_;
  const em_record *records_;
  const em_moe_args &a_;
  const Kernels &level_;
  float *partial_;         // [pairs][D], or the segment's panels of inputs at its first pair
  float *h_;               // [num_rows][row_floats_]: Vectors, of a segment one after the other
  int64_t row_floats_;     // the most that an expert of the list takes
  ActGroup *quantized_x_;  // [T][D / 32]
};

}  // namespace em
