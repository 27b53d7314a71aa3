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
                                  int64_t row_floats) {
  return num_pairs * hidden + num_rows(num_tokens, num_pairs) * row_floats +
         num_tokens * (hidden / kActGroup) * kActGroupFloats;
}

Experts::Experts(em_pool *pool, const em_record *records, const em_moe_args &args)
    : pool_(pool), records_(records), a_(args), level_(kernels()), row_floats_(args.width) {
  const int64_t num_pairs = a_.pair_begin[a_.num_experts];
  for (int64_t i = 0; i < a_.num_experts; ++i)
    row_floats_ = max_of(row_floats_, row_floats(record(i), a_.width));
  partial_ = a_.workspace;
  h_ = partial_ + num_pairs * a_.hidden;
  quantized_x_ = reinterpret_cast<ActGroup *>(h_ + num_rows(a_.num_tokens, num_pairs) * row_floats_);
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

int64_t Experts::num_items(const Segment &segment, Phase phase) const {
  switch (phase) {
    case Phase::kGateUp: return (inner(segment) + kItemRows - 1) / kItemRows;
    case Phase::kExpand: return shape(segment).num_factored / kItemRows;
    case Phase::kReduce: return record(segment.expert).rank / kItemRows;
    default: return (a_.hidden / kTileRows + kDownTiles - 1) / kDownTiles;
  }
}

Phase Experts::following(const Segment &segment, Phase phase) const {
  if (phase == Phase::kGateUp && record(segment.expert).rank == 0) return Phase::kDown;
  return static_cast<Phase>(static_cast<int>(phase) + 1);
}

void Experts::compute(const Segment &segment, Phase phase, int64_t item) const {
  switch (phase) {
    case Phase::kGateUp: return gate_up(segment, item);
    case Phase::kExpand: return expand(segment, item);
    case Phase::kReduce: return reduce(segment, item);
    default: return down(segment, item);
  }
}

void Experts::fetch_start(const Segment &segment, Phase phase) const {
  const int64_t offset = phase == Phase::kDown ? record(segment.expert).down_offset : 0;
  const uint8_t *const first = a_.data[segment.expert] + offset;
  for (int64_t i = 0; i < kFarAhead; i += kLineBytes) __builtin_prefetch(first + i, 0, 2);
}

bool Experts::uses_panels(const Segment &segment, em_format format) const {
  return level_.panels != nullptr && !is_16bit(format) && segment.num_pairs >= kMinPanelTokens;
}

ActPanel *Experts::input_panels(const Segment &segment) const {
  return reinterpret_cast<ActPanel *>(partial_ + segment.pair * a_.hidden);
}

Experts::Vectors Experts::down_inputs(const Segment &segment) const {
  return {h_ + segment.row * row_floats_, inner(segment), record(segment.expert).down};
}

Experts::Vectors Experts::factor_inputs(const Segment &segment, int part) const {
  const em_record &source = record(segment.expert);
  const Vectors before = down_inputs(segment);
  return {before.data + segment.num_pairs * (before.cols + part * source.rank), source.rank,
          source.factors};
}

Experts::Vectors Experts::factored_h(const Segment &segment) const {
  const Vectors before = factor_inputs(segment, 2);
  return {before.data, shape(segment).num_factored, before.format};
}

int64_t Experts::pairs_at_once(const Segment &segment, em_format format) const {
  return uses_panels(segment, format) ? kMaxPanelTokens : kMaxTokens;
}

void Experts::multiply(const Segment &segment, const Vectors &vectors, const uint8_t *tiles,
                       int64_t num_tiles, int64_t first, int64_t num_pairs, float *out,
                       int64_t stride) const {
  if (uses_panels(segment, vectors.format)) {
    const ActPanel *const panels = reinterpret_cast<const ActPanel *>(vectors.data);
    level_.panels(tiles, num_tiles, vectors.cols, vectors.format,
                  panels + num_panels(first, vectors.cols), num_pairs, out, stride);
    return;
  }
  const TileKernel kernel = level_.tile(vectors.format);
  const int64_t num_bytes = tile_bytes(vectors.cols, vectors.format);
  const void *inputs[kMaxTokens];
  for (int64_t i = 0; i < num_pairs; ++i) inputs[i] = vectors.data + (first + i) * vectors.cols;
  for (int64_t tile = 0; tile < num_tiles; ++tile) {
    kernel(tiles + tile * num_bytes, vectors.cols, inputs, static_cast<int>(num_pairs),
           out + tile * kTileRows, stride);
  }
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

void Experts::put(const Segment &segment, const Vectors &vectors, int64_t pair, int64_t group,
                  int64_t num, const float *values) const {
  float *const row = vectors.data + pair * vectors.cols;
  if (is_16bit(vectors.format)) {
    std::memcpy(row + group * kActGroup, values, num * sizeof(float));
  } else if (uses_panels(segment, vectors.format)) {
    const int token = static_cast<int>(pair % kPanelTokens);
    ActPanel *const panel = reinterpret_cast<ActPanel *>(vectors.data) +
                            pair / kPanelTokens * (vectors.cols / kActGroup) + group;
    ActGroup quantized;
    level_.quantize(values, kActGroup, &quantized);
    put_group(quantized, token, panel);
    if (pair + 1 == segment.num_pairs) clear_tokens(token + 1, panel);
  } else {
    level_.quantize(values, kActGroup, reinterpret_cast<ActGroup *>(row) + group);
  }
}

void Experts::add_squares(const Segment &segment, int64_t neuron, int64_t num,
                          const float *h) const {
  if (a_.hidden_square == nullptr) return;
  // An item's rows of one expert: no other thread has them.
  float *const sums = a_.hidden_square + segment.expert * a_.width + neuron;
  for (int64_t r = 0; r < num; ++r) sums[r] += h[r] * h[r];
}

// The 32 rows of one item are one activation group of what follows, quantized here.
void Experts::put_h(const Segment &segment, int64_t pair, int64_t item,
                    const float *values) const {
  const Vectors inputs = down_inputs(segment);
  const int64_t row = item * kItemRows, num_rows = min_of(kItemRows, inputs.cols - row);
  add_squares(segment, row, num_rows, values);
  put(segment, inputs, pair, item, num_rows, values);
}

bool Experts::is_factor(const Segment &segment, int64_t item) const {
  const em_record &source = record(segment.expert);
  return source.rank > 0 && item * kItemRows >= source.dense;
}

void Experts::put_factors(const Segment &segment, int64_t pair, int64_t item, const float *gate,
                          const float *up) const {
  const int64_t group = item - record(segment.expert).dense / kItemRows;
  put(segment, factor_inputs(segment, 0), pair, group, kItemRows, gate);
  put(segment, factor_inputs(segment, 1), pair, group, kItemRows, up);
}

void Experts::gate_up_panels(const Segment &segment, int64_t item) const {
  const em_format format = record(segment.expert).gate_up;
  const int64_t stride = tile_bytes(a_.hidden, format);
  const int64_t row = item * kItemRows;
  const int64_t num_rows = min_of(kItemRows, inner(segment) - row);
  const bool has_factors = is_factor(segment, item);
  const uint8_t *tiles = a_.data[segment.expert] + row / kTileRows * 2 * stride;
  // Of a token: 16 rows of gate, the same of up, and so on.
  float rows[kMaxPanelTokens * 2 * kItemRows];
  for (int64_t p = 0; p < segment.num_pairs; p += kMaxPanelTokens) {
    const int64_t num = min_of(kMaxPanelTokens, segment.num_pairs - p);
    level_.panels(tiles, 2 * num_rows / kTileRows, a_.hidden, format,
                  input_panels(segment) + num_panels(p, a_.hidden), num, rows, 2 * kItemRows);
    for (int64_t i = 0; i < num; ++i) {
      const float *pair_rows = rows + i * 2 * kItemRows;
      if (has_factors) {
        float parts[2][kItemRows];
        for (int64_t tile = 0; tile < 2 * kItemRows / kTileRows; ++tile) {
          std::memcpy(parts[tile % 2] + tile / 2 * kTileRows, pair_rows + tile * kTileRows,
                      kTileRows * sizeof(float));
        }
        put_factors(segment, p + i, item, parts[0], parts[1]);
        continue;
      }
      float h[kItemRows];
      for (int64_t r = 0; r < num_rows; r += kTileRows, pair_rows += 2 * kTileRows)
        level_.silu_mul(pair_rows, pair_rows + kTileRows, kTileRows, h + r);
      put_h(segment, p + i, item, h);
    }
  }
}

void Experts::gate_up_tiles(const Segment &segment, int64_t item) const {
  const em_format format = record(segment.expert).gate_up;
  const bool is_quantized = !is_16bit(format);
  const TileKernel kernel = level_.tile(format);
  const int64_t stride = tile_bytes(a_.hidden, format);
  const int64_t row = item * kItemRows;
  const int64_t num_rows = min_of(kItemRows, inner(segment) - row);
  const bool has_factors = is_factor(segment, item);
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
      if (has_factors) {
        put_factors(segment, p + i, item, gate + i * kItemRows, up + i * kItemRows);
        continue;
      }
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

void Experts::expand(const Segment &segment, int64_t item) const {
  const RecordShape sizes = shape(segment);
  const em_record &source = record(segment.expert);
  const int64_t tile = item * kItemRows / kTileRows, num_tiles = kItemRows / kTileRows;
  const uint8_t *const tiles = a_.data[segment.expert] + sizes.factors_offset() +
                               tile * tile_bytes(source.rank, source.factors);
  const Vectors inputs[] = {factor_inputs(segment, 0), factor_inputs(segment, 1)};
  const int64_t most = pairs_at_once(segment, source.factors);
  for (int64_t p = 0; p < segment.num_pairs; p += most) {
    const int64_t num = min_of(most, segment.num_pairs - p);
    float rows[2][kMaxPanelTokens * kItemRows];  // of U_g and U_u
    for (int part = 0; part < 2; ++part) {
      multiply(segment, inputs[part], tiles + part * sizes.expand_bytes, num_tiles, p, num,
               rows[part], kItemRows);
    }
    for (int64_t i = 0; i < num; ++i) {
      float h[kItemRows];
      level_.silu_mul(rows[0] + i * kItemRows, rows[1] + i * kItemRows, kItemRows, h);
      add_squares(segment, source.dense + item * kItemRows, kItemRows, h);
      put(segment, factored_h(segment), p + i, item, kItemRows, h);
    }
  }
}

void Experts::reduce(const Segment &segment, int64_t item) const {
  const RecordShape sizes = shape(segment);
  const em_record &source = record(segment.expert);
  const Vectors inputs = factored_h(segment), outputs = down_inputs(segment);
  const int64_t tile = item * kItemRows / kTileRows, num_tiles = kItemRows / kTileRows;
  const uint8_t *const tiles = a_.data[segment.expert] + sizes.factors_offset() +
                               2 * sizes.expand_bytes + tile * tile_bytes(inputs.cols, inputs.format);
  const int64_t most = pairs_at_once(segment, inputs.format);
  for (int64_t p = 0; p < segment.num_pairs; p += most) {
    const int64_t num = min_of(most, segment.num_pairs - p);
    float rows[kMaxPanelTokens * kItemRows];
    multiply(segment, inputs, tiles, num_tiles, p, num, rows, kItemRows);
    for (int64_t i = 0; i < num; ++i) {
      put(segment, outputs, p + i, source.dense / kItemRows + item, kItemRows,
          rows + i * kItemRows);
    }
  }
}

void Experts::down(const Segment &segment, int64_t item) const {
  const em_record &source = record(segment.expert);
  const Vectors inputs = down_inputs(segment);
  const int64_t first = item * kDownTiles;
  const int64_t num_tiles = min_of(kDownTiles, a_.hidden / kTileRows - first);
  const uint8_t *tiles = a_.data[segment.expert] + source.down_offset +
                         first * tile_bytes(inputs.cols, source.down);
  const int64_t most = pairs_at_once(segment, source.down);
  for (int64_t p = 0; p < segment.num_pairs; p += most) {
    multiply(segment, inputs, tiles, num_tiles, p, min_of(most, segment.num_pairs - p),
             partial_ + (segment.pair + p) * a_.hidden + first * kTileRows, a_.hidden);
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
