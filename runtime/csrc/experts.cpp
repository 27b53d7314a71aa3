#include "experts.h"

#include <cmath>
#include <cstring>

namespace em {
namespace {

constexpr int64_t kItemRows = kActGroup;    // intermediate rows of one gate_up item
constexpr int64_t kDownTiles = 8;           // tiles of one down item
constexpr int64_t kMinRows = 256;           // intermediate rows held at a time, where so many are
constexpr int64_t kSerialFloats = 1 << 16;  // below it a second thread does not pay
constexpr int64_t kColumnBlock = 256;

int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }

}  // namespace

int64_t Experts::num_rows(int64_t num_tokens, int64_t num_pairs) {
  return min_of(num_pairs, max_of(num_tokens, kMinRows));
}

int64_t Experts::workspace_floats(int64_t num_tokens, int64_t num_pairs, int64_t hidden,
                                  int64_t width) {
  return num_pairs * hidden + num_rows(num_tokens, num_pairs) * width +
         num_tokens * (hidden / kActGroup) * kActGroupFloats;
}

Experts::Experts(em_pool *pool, const em_record *records, const em_moe_args &args)
    : pool_(pool), records_(records), a_(args), level_(kernels()) {
  const int64_t num_pairs = a_.pair_begin[a_.num_experts];
  partial_ = a_.workspace;
  h_ = partial_ + num_pairs * a_.hidden;
  quantized_x_ = reinterpret_cast<ActGroup *>(h_ + num_rows(a_.num_tokens, num_pairs) * a_.width);
}

void Experts::quantize_inputs() const {
  bool is_quantized = false;
  for (int64_t i = 0; i < a_.num_experts; ++i) {
    is_quantized = is_quantized || !is_16bit(record(i).gate_up);
  }
  if (!is_quantized) return;
  const int64_t groups = a_.hidden / kActGroup;
  parallel_for(pool_, a_.num_tokens, [&](int64_t t, int) {
    level_.quantize(a_.x + t * a_.hidden, a_.hidden, quantized_x_ + t * groups);
  });
}

int64_t Experts::num_gate_up_items() const { return (a_.width + kItemRows - 1) / kItemRows; }

int64_t Experts::num_down_items() const {
  return (a_.hidden / kTileRows + kDownTiles - 1) / kDownTiles;
}

bool Experts::uses_panels(const Segment &segment, em_format format) const {
  return level_.panels != nullptr && !is_16bit(format) && segment.num_pairs >= kMinPanelTokens;
}

ActPanel *Experts::input_panels(const Segment &segment) const {
  return reinterpret_cast<ActPanel *>(partial_ + segment.pair * a_.hidden);
}

ActPanel *Experts::h_panels(const Segment &segment) const {
  return reinterpret_cast<ActPanel *>(h_ + segment.row * a_.width);
}

int64_t Experts::num_gather_items(const Segment &segment) const {
  if (!uses_panels(segment, record(segment.expert).gate_up)) return 0;
  return (segment.num_pairs + kPanelTokens - 1) / kPanelTokens;
}

void Experts::gather(const Segment &segment, int64_t item) const {
  const int64_t pair = segment.pair + item * kPanelTokens;
  const int64_t groups = a_.hidden / kActGroup;
  const ActGroup *tokens[kPanelTokens];
  const int num =
      static_cast<int>(min_of(kPanelTokens, segment.pair + segment.num_pairs - pair));
  for (int t = 0; t < num; ++t) tokens[t] = quantized_x_ + a_.pair_token[pair + t] * groups;
  pack_panels(tokens, num, a_.hidden, input_panels(segment) + item * groups);
}

// The 32 rows of one item are one activation group of the down projection, quantized here.
void Experts::put_h(const Segment &segment, int64_t pair, int64_t item,
                    const float *values) const {
  const em_format down = record(segment.expert).down;
  const int64_t row = item * kItemRows, num_rows = min_of(kItemRows, a_.width - row);
  const int64_t groups = a_.width / kActGroup;
  float *const h = h_ + (segment.row + pair) * a_.width;
  if (a_.hidden_square != nullptr) {  // an item's rows of one expert: no other thread has them
    float *const sums = a_.hidden_square + segment.expert * a_.width + row;
    for (int64_t r = 0; r < num_rows; ++r) sums[r] += values[r] * values[r];
  }
  if (is_16bit(down)) {
    std::memcpy(h + row, values, num_rows * sizeof(float));
  } else if (uses_panels(segment, down)) {
    const int token = static_cast<int>(pair % kPanelTokens);
    ActPanel *const panel = h_panels(segment) + pair / kPanelTokens * groups + item;
    ActGroup group;
    level_.quantize(values, kActGroup, &group);
    put_group(group, token, panel);
    if (pair + 1 == segment.num_pairs) clear_tokens(token + 1, panel);
  } else {
    level_.quantize(values, kActGroup, reinterpret_cast<ActGroup *>(h) + item);
  }
}

void Experts::gate_up_panels(const Segment &segment, int64_t item) const {
  const em_format format = record(segment.expert).gate_up;
  const int64_t stride = tile_bytes(a_.hidden, format);
  const int64_t row = item * kItemRows, num_rows = min_of(kItemRows, a_.width - row);
  const uint8_t *tiles = a_.data[segment.expert] + row / kTileRows * 2 * stride;
  // Of a token: 16 rows of gate, the same of up, and so on.
  float rows[kMaxPanelTokens * 2 * kItemRows];
  for (int64_t p = 0; p < segment.num_pairs; p += kMaxPanelTokens) {
    const int64_t num = min_of(kMaxPanelTokens, segment.num_pairs - p);
    level_.panels(tiles, 2 * num_rows / kTileRows, a_.hidden, format,
                  input_panels(segment) + num_panels(p, a_.hidden), num, rows, 2 * kItemRows);
    for (int64_t i = 0; i < num; ++i) {
      float h[kItemRows];
      const float *gate = rows + i * 2 * kItemRows;
      for (int64_t r = 0; r < num_rows; r += kTileRows, gate += 2 * kTileRows)
        level_.silu_mul(gate, gate + kTileRows, kTileRows, h + r);
      put_h(segment, p + i, item, h);
    }
  }
}

void Experts::gate_up_tiles(const Segment &segment, int64_t item) const {
  const em_format format = record(segment.expert).gate_up;
  const bool is_quantized = !is_16bit(format);
  const TileKernel kernel = level_.tile(format);
  const int64_t stride = tile_bytes(a_.hidden, format);
  const int64_t row = item * kItemRows, num_rows = min_of(kItemRows, a_.width - row);
  const uint8_t *tiles = a_.data[segment.expert] + row / kTileRows * 2 * stride;
  for (int64_t p = 0; p < segment.num_pairs; p += kMaxTokens) {
    const int block = static_cast<int>(min_of(kMaxTokens, segment.num_pairs - p));
    const void *inputs[kMaxTokens];
    for (int i = 0; i < block; ++i) {
      const int64_t token = a_.pair_token[segment.pair + p + i];
      inputs[i] = is_quantized
                      ? static_cast<const void *>(quantized_x_ + token * (a_.hidden / kActGroup))
                      : static_cast<const void *>(a_.x + token * a_.hidden);
    }
    float gate[kMaxTokens * kItemRows], up[kMaxTokens * kItemRows];
    for (int64_t r = 0; r < num_rows; r += kTileRows) {
      const uint8_t *tile = tiles + r / kTileRows * 2 * stride;
      kernel(tile, a_.hidden, inputs, block, gate + r, kItemRows);
      kernel(tile + stride, a_.hidden, inputs, block, up + r, kItemRows);
    }
    for (int i = 0; i < block; ++i) {
      float h[kItemRows];
      level_.silu_mul(gate + i * kItemRows, up + i * kItemRows, num_rows, h);
      put_h(segment, p + i, item, h);
    }
  }
}

void Experts::gate_up(const Segment &segment, int64_t item) const {
  if (uses_panels(segment, record(segment.expert).gate_up)) {
    gate_up_panels(segment, item);
  } else {
    gate_up_tiles(segment, item);
  }
}

void Experts::down(const Segment &segment, int64_t item) const {
  const em_record &source = record(segment.expert);
  const TileKernel kernel = level_.tile(source.down);
  const int64_t stride = tile_bytes(a_.width, source.down);
  const int64_t first = item * kDownTiles;
  const int64_t end = min_of(first + kDownTiles, a_.hidden / kTileRows);
  const uint8_t *tiles = a_.data[segment.expert] + source.down_offset;
  const bool has_panels = uses_panels(segment, source.down);
  const int64_t most = has_panels ? kMaxPanelTokens : kMaxTokens;
  for (int64_t p = 0; p < segment.num_pairs; p += most) {
    const int block = static_cast<int>(min_of(most, segment.num_pairs - p));
    const ActPanel *const panels = h_panels(segment) + num_panels(p, a_.width);
    const void *inputs[kMaxTokens];
    for (int i = 0; i < block && !has_panels; ++i)
      inputs[i] = h_ + (segment.row + p + i) * a_.width;
    float *dst = partial_ + (segment.pair + p) * a_.hidden;
    if (has_panels) {
      level_.panels(tiles + first * stride, end - first, a_.width, source.down, panels, block,
                    dst + first * kTileRows, a_.hidden);
      continue;
    }
    for (int64_t tile = first; tile < end; ++tile) {
      kernel(tiles + tile * stride, a_.width, inputs, block, dst + tile * kTileRows, a_.hidden);
    }
  }
}

void Experts::combine() const {
  const int64_t num_pairs = a_.pair_begin[a_.num_experts];
  const auto add = [&](int64_t first, int64_t num) {
    for (int64_t p = 0; p < num_pairs; ++p) {
      level_.add_scaled(a_.pair_weight[p], partial_ + p * a_.hidden + first, num,
                        a_.y + a_.pair_token[p] * a_.hidden + first);
    }
  };
  if (num_pairs * a_.hidden <= kSerialFloats) return add(0, a_.hidden);
  parallel_for(pool_, (a_.hidden + kColumnBlock - 1) / kColumnBlock, [&](int64_t item, int) {
    const int64_t first = item * kColumnBlock;
    add(first, min_of(kColumnBlock, a_.hidden - first));
  });
}

void Experts::measure() const {
  constexpr int64_t kLanes = kTileRows;  // sums side by side, so that the loop can be vectorized
  parallel_for(pool_, a_.pair_begin[a_.num_experts], [&](int64_t p, int) {
    const float *output = partial_ + p * a_.hidden;
    float lanes[kLanes] = {};
    for (int64_t i = 0; i < a_.hidden; i += kLanes) {
      for (int64_t j = 0; j < kLanes; ++j) lanes[j] += output[i + j] * output[i + j];
    }
    float sum = 0;
    for (const float lane : lanes) sum += lane;
    a_.pair_norm[p] = std::sqrt(sum);
  });
}

}  // namespace em
