// The experts of one layer: resident ones first, the others as they land, one order of summation.
#include <cerrno>
#include <cstring>
#include <vector>

#include "edgemoe_core.h"
#include "kernels.h"
#include "platform.h"
#include "store.h"
#include "thread_pool.h"

namespace em {
namespace {

constexpr int64_t kItemRows = kActGroup;    // intermediate rows of one item of phase 1
constexpr int64_t kDownTiles = 4;           // tiles of one item of phase 2
constexpr int64_t kBatchPairs = 256;        // pairs whose intermediate rows are held at a time
constexpr int64_t kSerialFloats = 1 << 16;  // below it a second thread does not pay
constexpr int64_t kColumnBlock = 256;

int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }

int64_t batch_capacity(int64_t num_tokens, int64_t num_pairs) {
  return min_of(num_pairs, max_of(num_tokens, kBatchPairs));
}
int64_t quantized_floats(int64_t num_tokens, int64_t cols) {
  return num_tokens * (cols / kActGroup) * kActGroupFloats;
}

// Consecutive pairs of one expert, and where their intermediate rows lie in the batch.
struct Segment {
  int64_t expert, pair, num_pairs, row;
};

class Layer {
 public:
  Layer(em_pool *pool, em_store *store, const em_record *records, em_moe_args *args)
      : pool_(pool), store_(store), records_(records), a_(*args), level_(kernels()) {}

  int32_t run();
  void drain() const;  // waits for every read of the list

 private:
  const em_record &record(int64_t expert) const { return records_[a_.keys[expert]]; }
  bool is_valid() const;
  void prepare();
  int32_t gather_ready(std::vector<int64_t> *ready);
  void compute(const std::vector<int64_t> &experts);
  void compute_batch();
  void gate_up(const Segment &segment, int64_t chunk) const;
  void down(const Segment &segment, int64_t chunk) const;
  void combine() const;

  em_pool *pool_;
  em_store *store_;
  const em_record *records_;
  em_moe_args &a_;
  const Kernels &level_;
  ActGroup *quantized_x_ = nullptr;  // [T][D / 32]
  float *partial_ = nullptr;         // [pairs][D]
  float *h_ = nullptr;               // [batch][F] floats, or ActGroup [F / 32] at the row's start
  std::vector<int64_t> waiting_;     // positions not computed yet, ascending
  std::vector<Segment> batch_;
};

bool Layer::is_valid() const {
  const int64_t rows_unit = kTileRows;
  if (a_.num_tokens < 0 || a_.num_experts < 0 || a_.hidden < 1 || a_.width < 1 ||
      a_.hidden % rows_unit || a_.width % rows_unit || (records_ == nullptr && a_.num_experts > 0)) {
    return false;
  }
  for (int64_t i = 0; i < a_.num_experts; ++i) {
    if (a_.keys[i] < 0 || (store_ != nullptr && a_.keys[i] >= num_records_of(store_)) ||
        a_.pair_begin[i] > a_.pair_begin[i + 1] ||
        em_matrix_bytes(a_.width, a_.hidden, record(i).gate_up) < 0 ||
        em_matrix_bytes(a_.hidden, a_.width, record(i).down) < 0) {
      return false;
    }
  }
  return true;
}

void Layer::prepare() {
  const int64_t num_pairs = a_.pair_begin[a_.num_experts];
  partial_ = a_.workspace;
  h_ = partial_ + num_pairs * a_.hidden;
  quantized_x_ = reinterpret_cast<ActGroup *>(
      h_ + batch_capacity(a_.num_tokens, num_pairs) * a_.width);
  bool is_quantized = false;
  for (int64_t i = 0; i < a_.num_experts; ++i) {
    waiting_.push_back(i);
    is_quantized = is_quantized || !is_16bit(record(i).gate_up);
  }
  if (!is_quantized) return;
  const int64_t groups = a_.hidden / kActGroup;
  parallel_for(pool_, a_.num_tokens, [&](int64_t t, int) {
    level_.quantize(a_.x + t * a_.hidden, a_.hidden, quantized_x_ + t * groups);
  });
}

// Moves what has landed from waiting_ to ready; the first failure, or 0.
int32_t Layer::gather_ready(std::vector<int64_t> *ready) {
  ready->clear();
  size_t kept = 0;
  for (const int64_t i : waiting_) {
    const int32_t status = store_ == nullptr ? EM_READY : status_of(store_, a_.keys[i]);
    if (status == EM_READY) {
      ready->push_back(i);
    } else if (status == EM_READING) {
      waiting_[kept++] = i;
    } else {
      a_.failed = i;
      return status < 0 ? status : EM_ERR_ARG;  // absent: it was never asked for
    }
  }
  waiting_.resize(kept);
  return 0;
}

void Layer::drain() const {
  if (store_ == nullptr) return;
  for (int64_t i = 0; i < a_.num_experts; ++i) {
    const int32_t key = a_.keys[i];
    if (key < 0 || key >= num_records_of(store_)) continue;
    if (status_of(store_, key) == EM_READING) em_store_wait(store_, key);
  }
}

// One item: 32 rows of gate and up for every pair of the segment, and the activation between. The
// rows are one activation group of the down projection, which is quantized here.
void Layer::gate_up(const Segment &segment, int64_t chunk) const {
  const em_format format = record(segment.expert).gate_up;
  const bool is_quantized = !is_16bit(format);
  const bool is_down_quantized = !is_16bit(record(segment.expert).down);
  const TileKernel kernel = level_.tile(format);
  const int64_t stride = tile_bytes(a_.hidden, format);
  const int64_t row = chunk * kItemRows;
  const int64_t num_rows = min_of(kItemRows, a_.width - row);
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
      float *h = h_ + (segment.row + p + i) * a_.width;
      float values[kItemRows];
      level_.silu_mul(gate + i * kItemRows, up + i * kItemRows, num_rows, values);
      if (is_down_quantized) {
        level_.quantize(values, num_rows, reinterpret_cast<ActGroup *>(h) + chunk);
      } else {
        std::memcpy(h + row, values, num_rows * sizeof(float));
      }
    }
  }
}

void Layer::down(const Segment &segment, int64_t chunk) const {
  const em_record &source = record(segment.expert);
  const TileKernel kernel = level_.tile(source.down);
  const int64_t stride = tile_bytes(a_.width, source.down);
  const int64_t first = chunk * kDownTiles;
  const int64_t end = min_of(first + kDownTiles, a_.hidden / kTileRows);
  const uint8_t *tiles = a_.data[segment.expert] + source.down_offset;
  for (int64_t p = 0; p < segment.num_pairs; p += kMaxTokens) {
    const int block = static_cast<int>(min_of(kMaxTokens, segment.num_pairs - p));
    const void *inputs[kMaxTokens];
    for (int i = 0; i < block; ++i) inputs[i] = h_ + (segment.row + p + i) * a_.width;
    float *dst = partial_ + (segment.pair + p) * a_.hidden;
    for (int64_t tile = first; tile < end; ++tile) {
      kernel(tiles + tile * stride, a_.width, inputs, block, dst + tile * kTileRows, a_.hidden);
    }
  }
}

void Layer::compute_batch() {
  const int64_t gate_up_chunks = (a_.width + kItemRows - 1) / kItemRows;
  const int64_t down_chunks = (a_.hidden / kTileRows + kDownTiles - 1) / kDownTiles;
  const int64_t num_segments = static_cast<int64_t>(batch_.size());
  parallel_for(pool_, num_segments * gate_up_chunks, [&](int64_t item, int) {
    gate_up(batch_[item / gate_up_chunks], item % gate_up_chunks);
  });
  parallel_for(pool_, num_segments * down_chunks, [&](int64_t item, int) {
    down(batch_[item / down_chunks], item % down_chunks);
  });
  batch_.clear();
}

void Layer::compute(const std::vector<int64_t> &experts) {
  const int64_t capacity = batch_capacity(a_.num_tokens, a_.pair_begin[a_.num_experts]);
  int64_t used = 0;
  for (const int64_t i : experts) {
    for (int64_t pair = a_.pair_begin[i]; pair < a_.pair_begin[i + 1];) {
      const int64_t num = min_of(a_.pair_begin[i + 1] - pair, capacity - used);
      batch_.push_back({i, pair, num, used});
      pair += num;
      used += num;
      if (used < capacity) continue;
      compute_batch();
      used = 0;
    }
  }
  if (!batch_.empty()) compute_batch();
}

void Layer::combine() const {
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

int32_t Layer::run() {
  a_.stall_ns = 0;
  a_.failed = -1;
  if (!is_valid()) return EM_ERR_ARG;
  prepare();
  std::vector<int64_t> ready;
  std::vector<int32_t> keys;
  while (!waiting_.empty()) {
    const int32_t error = gather_ready(&ready);
    if (error != 0) return error;
    if (!ready.empty()) {
      compute(ready);
      continue;
    }
    keys.clear();
    for (const int64_t i : waiting_) keys.push_back(a_.keys[i]);
    const int64_t start = monotonic_ns();
    wait_any(store_, keys.data(), static_cast<int64_t>(keys.size()));
    a_.stall_ns += monotonic_ns() - start;
  }
  combine();
  return 0;
}

}  // namespace
}  // namespace em

int64_t em_moe_workspace_floats(int64_t num_tokens, int64_t num_pairs, int64_t hidden,
                                int64_t width) {
  return num_pairs * hidden + em::batch_capacity(num_tokens, num_pairs) * width +
         em::quantized_floats(num_tokens, hidden);
}

int32_t em_moe_run(em_pool *pool, em_store *store, const em_record *records, em_moe_args *args) {
  if (store != nullptr) records = em::records_of(store);
  em::Layer layer(pool, store, records, args);
  int32_t status;
  try {
    status = layer.run();
  } catch (...) {  // only vectors allocate here
    status = -ENOMEM;
  }
  if (status != 0) layer.drain();
  return status;
}
