// A resident linear layer.
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "edgemoe_core.h"
#include "gemm.h"
#include "kernels.h"
#include "thread_pool.h"

namespace em {
namespace {

// A work item reads at least this much, so that taking it from the counter costs nothing beside it.
constexpr int64_t kItemBytes = 32 * 1024;
constexpr int64_t kPanelTiles = 4;  // tiles of a work item of the panel kernel

struct Free {
  void operator()(void *memory) const { std::free(memory); }
};
template <class T>
using Buffer = std::unique_ptr<T, Free>;

template <class T>
Buffer<T> buffer(int64_t num) {
  constexpr std::size_t kAlign = 64;
  const std::size_t num_bytes = (num * sizeof(T) + kAlign - 1) / kAlign * kAlign;
#if defined(_WIN32)
  return Buffer<T>(static_cast<T *>(std::malloc(num_bytes)));
#else
  return Buffer<T>(static_cast<T *>(std::aligned_alloc(kAlign, num_bytes)));
#endif
}

int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }

struct Linear {
  em_pool *pool;
  const uint8_t *packed;
  int64_t rows, cols;
  em_format format;
  const float *x;
  int64_t num_tokens;
  const float *bias;
  float *y;
  const Kernels &level = kernels();

  int64_t num_tiles() const { return (rows + kTileRows - 1) / kTileRows; }
  int64_t num_groups() const { return cols / kActGroup; }
  int32_t run() const;
  int32_t run_panels() const;
  void pack_block(int64_t first, ActPanel *dst) const;
  template <class Kernel>
  void multiply(int64_t tile, int64_t num_tiles, int64_t token, int64_t num,
                const Kernel &kernel) const;
};

// kernel(tiles, out, stride) for `num_tiles` tiles and `num` tokens; the last tile may have rows that
// the matrix does not have.
template <class Kernel>
void Linear::multiply(int64_t tile, int64_t num_tiles, int64_t token, int64_t num,
                      const Kernel &kernel) const {
  const uint8_t *const data = packed + tile * tile_bytes(cols, format);
  const int64_t row = tile * kTileRows, most = num_tiles * kTileRows;
  const int64_t num_rows = min_of(most, rows - row);
  float *dst = y + token * rows + row;
  if (num_rows == most) {
    kernel(data, dst, rows);
  } else {
    float padded[kMaxPanelTokens * kPanelTiles * kTileRows];
    kernel(data, padded, most);
    for (int64_t t = 0; t < num; ++t)
      std::memcpy(dst + t * rows, padded + t * most, num_rows * sizeof(float));
  }
  if (bias == nullptr) return;
  for (int64_t t = 0; t < num; ++t, dst += rows) {
    for (int64_t r = 0; r < num_rows; ++r) dst[r] += bias[row + r];
  }
}

int32_t Linear::run() const {
  const TileKernel kernel = level.tile(format);
  Buffer<ActGroup> quantized;
  if (!is_16bit(format)) {
    quantized = buffer<ActGroup>(num_tokens * num_groups());
    if (quantized == nullptr) return -ENOMEM;
    parallel_for(pool, num_tokens, [&](int64_t t, int) {
      level.quantize(x + t * cols, cols, quantized.get() + t * num_groups());
    });
  }
  const int64_t stride = tile_bytes(cols, format);
  const int64_t tiles_per_item =
      max_of(2, min_of((kItemBytes + stride - 1) / stride, num_tiles() / (4 * num_threads(pool))));
  const auto multiply_item = [&](int64_t item, int) {
    const int64_t end = min_of(num_tiles(), (item + 1) * tiles_per_item);
    for (int64_t tile = item * tiles_per_item; tile < end; ++tile) {
      for (int64_t t = 0; t < num_tokens; t += kMaxTokens) {
        const int block = static_cast<int>(min_of(kMaxTokens, num_tokens - t));
        const void *inputs[kMaxTokens];
        for (int i = 0; i < block; ++i) {
          inputs[i] = quantized != nullptr
                          ? static_cast<const void *>(quantized.get() + (t + i) * num_groups())
                          : static_cast<const void *>(x + (t + i) * cols);
        }
        multiply(tile, 1, t, block, [&](const uint8_t *data, float *out, int64_t out_stride) {
          kernel(data, cols, inputs, block, out, out_stride);
        });
      }
    }
  };
  parallel_for(pool, (num_tiles() + tiles_per_item - 1) / tiles_per_item, multiply_item);
  return 0;
}

void Linear::pack_block(int64_t first, ActPanel *dst) const {
  const int num = static_cast<int>(min_of(kPanelTokens, num_tokens - first));
  for (int64_t s = 0; s < num_groups(); ++s, ++dst) {
    for (int t = 0; t < num; ++t) {
      ActGroup group;
      level.quantize(x + (first + t) * cols + s * kActGroup, kActGroup, &group);
      put_group(group, t, dst);
    }
    clear_tokens(num, dst);
  }
}

int32_t Linear::run_panels() const {
  const Buffer<ActPanel> panels = buffer<ActPanel>(num_panels(num_tokens, cols));
  if (panels == nullptr) return -ENOMEM;
  parallel_for(pool, (num_tokens + kPanelTokens - 1) / kPanelTokens, [&](int64_t block, int) {
    pack_block(block * kPanelTokens, panels.get() + block * num_groups());
  });
  // A thread's run of items has few blocks of tokens, which stay in its second cache.
  const int64_t runs = (num_tiles() + kPanelTiles - 1) / kPanelTiles;
  const int64_t blocks = (num_tokens + kMaxPanelTokens - 1) / kMaxPanelTokens;
  parallel_for(pool, runs * blocks, [&](int64_t item, int) {
    const int64_t token = item / runs * kMaxPanelTokens;
    const int64_t num = min_of(kMaxPanelTokens, num_tokens - token);
    const ActPanel *const block = panels.get() + num_panels(token, cols);
    const int64_t first = item % runs * kPanelTiles;
    const int64_t tiles = min_of(num_tiles() - first, kPanelTiles);
    multiply(first, tiles, token, num, [&](const uint8_t *data, float *out, int64_t out_stride) {
      level.panels(data, tiles, cols, format, block, num, out, out_stride);
    });
  });
  return 0;
}

}  // namespace
}  // namespace em

int32_t em_linear(em_pool *pool, const uint8_t *packed, int64_t rows, int64_t cols,
                  em_format format, const float *x, int64_t num_tokens, const float *bias,
                  float *y) {
  using namespace em;
  if (em_matrix_bytes(rows, cols, format) < 0 || num_tokens < 0) return EM_ERR_ARG;
  if (num_tokens == 0) return 0;
  const Linear linear = {pool, packed, rows, cols, format, x, num_tokens, bias, y};
  const bool has_panels = linear.level.panels != nullptr && !is_16bit(format);
  return has_panels && num_tokens >= kMinPanelTokens ? linear.run_panels() : linear.run();
}
