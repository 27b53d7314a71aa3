// A resident linear layer.
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "edgemoe_core.h"
#include "kernels.h"
#include "thread_pool.h"

namespace em {
namespace {

// A work item reads at least this much, so that taking it from the counter costs nothing beside it.
constexpr int64_t kItemBytes = 32 * 1024;

struct Free {
  void operator()(void *memory) const { std::free(memory); }
};

int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }

}  // namespace
}  // namespace em

int32_t em_linear(em_pool *pool, const uint8_t *packed, int64_t rows, int64_t cols,
                  em_format format, const float *x, int64_t num_tokens, const float *bias,
                  float *y) {
  using namespace em;
  if (em_matrix_bytes(rows, cols, format) < 0 || num_tokens < 0) return EM_ERR_ARG;
  if (num_tokens == 0) return 0;
  const Kernels &level = kernels();
  const TileKernel tile_kernel = level.tile(format);
  const int64_t groups = cols / kActGroup;

  std::unique_ptr<ActGroup, Free> quantized;
  if (!is_16bit(format)) {
    quantized.reset(static_cast<ActGroup *>(std::malloc(num_tokens * groups * sizeof(ActGroup))));
    if (quantized == nullptr) return -ENOMEM;
    const auto quantize = [&](int64_t t, int) {
      level.quantize(x + t * cols, cols, quantized.get() + t * groups);
    };
    parallel_for(pool, num_tokens, quantize);
  }
  const int64_t num_tiles = (rows + kTileRows - 1) / kTileRows;
  const int64_t stride = tile_bytes(cols, format);
  const int64_t tiles_per_item =
      max_of(2, min_of((kItemBytes + stride - 1) / stride, num_tiles / (4 * num_threads(pool))));

  const auto multiply = [&](int64_t item, int) {
    const int64_t end = min_of(num_tiles, (item + 1) * tiles_per_item);
    for (int64_t tile = item * tiles_per_item; tile < end; ++tile) {
      const int64_t row = tile * kTileRows;
      const int64_t num_rows = min_of(kTileRows, rows - row);
      for (int64_t t = 0; t < num_tokens; t += kMaxTokens) {
        const int block = static_cast<int>(min_of(kMaxTokens, num_tokens - t));
        const void *inputs[kMaxTokens];
        for (int i = 0; i < block; ++i) {
          inputs[i] = quantized != nullptr
                          ? static_cast<const void *>(quantized.get() + (t + i) * groups)
                          : static_cast<const void *>(x + (t + i) * cols);
        }
        float *dst = y + t * rows + row;
        float padded[kMaxTokens * kTileRows];
        const bool is_whole = num_rows == kTileRows;
        tile_kernel(packed + tile * stride, cols, inputs, block, is_whole ? dst : padded,
                    is_whole ? rows : kTileRows);
        for (int i = 0; i < block; ++i, dst += rows) {
          if (!is_whole) std::memcpy(dst, padded + i * kTileRows, num_rows * sizeof(float));
          if (bias == nullptr) continue;
          for (int64_t r = 0; r < num_rows; ++r) dst[r] += bias[row + r];
        }
      }
    }
  };
  parallel_for(pool, (num_tiles + tiles_per_item - 1) / tiles_per_item, multiply);
  return 0;
}
