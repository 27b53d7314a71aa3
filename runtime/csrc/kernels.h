// The inner loops, one table per instruction set; all tables give the same bits.
#pragma once
#include <cstdint>

#include "edgemoe_core.h"

namespace em {

constexpr int kTileRows = 16;
constexpr int kLineBytes = 64;
constexpr int64_t kFarAhead = 4096;  // bytes: what is fetched from memory, before the weights in use
constexpr int kActGroup = 32;  // columns that share one activation scale
constexpr int kMaxTokens = 8;  // most tokens in one call of a tile kernel

// What the codes of EM_MODE_NF4 stand for; runtime/format.py says where the numbers come from.
constexpr int8_t kNf4Levels[16] = {-127, -88, -67, -50, -36, -23, -12, 0,
                                   10,   20,  31,  43,  56,  71,  92,  127};

// 32 columns of one token: x ~ scale * q. One struct, so that a kernel needs one pointer per token.
struct ActGroup {
  int8_t q[kActGroup];
  float scale;
  float sum;             // scale * sum(q): what a weight group's min is multiplied with
  int32_t negative_sum;  // -sum(q): folds the zero point of symmetric codes into the integer sum
};
static_assert(sizeof(ActGroup) == 44, "the workspace counts 11 floats per group");
constexpr int64_t kActGroupFloats = 11;

// out[t * out_stride + r] = row r of the tile . x[t], for t < num_tokens <= kMaxTokens and r < 16.
// x[t] points to ActGroup [cols / 32] for quantized modes, to float [cols] for 16-bit modes. The
// bits of a result depend on neither num_tokens nor t.
using TileKernel = void (*)(const uint8_t *tile, int64_t cols, const void *const *x, int num_tokens,
                            float *out, int64_t out_stride);

// The same for num_tiles consecutive tiles, row r of tile i at r + 16 i, and num_tokens <=
// kMaxPanelTokens packed into panels; see gemm.h. Quantized modes only.
struct ActPanel;
using PanelKernel = void (*)(const uint8_t *tiles, int64_t num_tiles, int64_t cols,
                             em_format format, const ActPanel *panels, int64_t num_tokens,
                             float *out, int64_t out_stride);

struct Kernels {
  const char *name;
  TileKernel (*tile)(em_format format);  // format must have passed em_matrix_bytes
  // scale = max|x| / 127, q = round to nearest even. A group with NaN or infinity becomes NaN
  // (scale NaN, q 0); one below 2^-116 becomes 0, since 127 / max|x| would overflow.
  void (*quantize)(const float *x, int64_t cols, ActGroup *dst);
  void (*silu_mul)(const float *gate, const float *up, int64_t num, float *h);
  void (*add_scaled)(float weight, const float *x, int64_t num, float *y);  // y = fma(weight, x, y)
  uint64_t (*sweep)(const uint8_t *data, int64_t num_lines);  // reads lines of 64 bytes: their union
  PanelKernel panels = nullptr;  // null where tile kernels are as fast for many tokens
};

// One unit each; all but the first are null where the compiler was not asked for them.
const Kernels *kernels_scalar();
const Kernels *kernels_avx2();
const Kernels *kernels_avxvnni();
const Kernels *kernels_avx512vnni();
const Kernels *kernels_amx();
const Kernels *kernels_neon_dotprod();
const Kernels *kernels_neon_i8mm();

constexpr int kMaxLevels = 8;
int available_levels(const Kernels **levels);  // those this machine runs, best first; their number
const Kernels &kernels();                      // the level in use

inline bool is_16bit(em_format format) {
  return format.mode == EM_MODE_BF16 || format.mode == EM_MODE_FP16;
}
// Bytes of one 16-row tile. The format must be valid.
inline int64_t tile_bytes(int64_t cols, em_format format) {
  if (is_16bit(format)) return cols * kTileRows * 2;
  const int64_t pairs = (cols / format.group_size + 1) / 2;
  return pairs * kLineBytes * (format.mode == EM_MODE_ASYM ? 2 : 1) +
         cols * kTileRows * format.bits / 8;
}

}  // namespace em
