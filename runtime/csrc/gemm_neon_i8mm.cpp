// Panel kernel of Arm processors with 8-bit matrix products: 2 rows x 8 columns times 8 columns x 2
// tokens in one instruction. A block of columns is unpacked once, in that order, for all tokens.
#include "gemm.h"

#if defined(__aarch64__) && defined(__ARM_FEATURE_DOTPROD) && defined(__ARM_FEATURE_MATMUL_INT8)
#include <arm_neon.h>

namespace em {
namespace {

#include "kernels_neon.h"

constexpr int64_t kBlockUnits = 16;  // activation groups; their codes, 8 KiB, stay in the first cache
constexpr int kSteps = kActGroup / 8;
constexpr int kRowPairs = kTileRows / 2;

struct Block {
  int8x16_t codes[kBlockUnits][kRowPairs][kSteps];  // rows 2i and 2i + 1, 8 columns each
  F scales[kBlockUnits];                            // by weight group
  F mins[kBlockUnits];
};

// The 8 words of 32 columns as signed bytes. Of operands above 127, 128 is taken off.
template <int BITS, bool IS_TABLE>
EM_INLINE void unpack_words(const uint8_t *p, B *words) {
  if constexpr (BITS == 8) {
    EM_UNROLL
    for (int w = 0; w < 8; ++w) words[w] = byte_code(load_bytes(p + w * kLineBytes));
  } else if constexpr (BITS == 4) {
    EM_UNROLL
    for (int line = 0; line < 4; ++line) {
      const B x = load_bytes(p + line * kLineBytes);
      words[2 * line] = masked<15>(x);
      words[2 * line + 1] = shifted_right<4>(x);
    }
    if constexpr (IS_TABLE) {
      EM_UNROLL
      for (int w = 0; w < 8; ++w) words[w] = level_of(words[w]);
    }
  } else {
    EM_UNROLL
    for (int line = 0; line < 2; ++line) {
      const B x = load_bytes(p + line * kLineBytes);
      words[4 * line] = masked<3>(x);
      words[4 * line + 1] = masked<3>(shifted_right<2>(x));
      words[4 * line + 2] = masked<3>(shifted_right<4>(x));
      words[4 * line + 3] = shifted_right<6>(x);
    }
    if constexpr (BITS == 3) {
      const B high = load_bytes(p + 2 * kLineBytes);
      const B bits[8] = {shifted_left<2>(high),  shifted_left<1>(high),  high,
                         shifted_right<1>(high), shifted_right<2>(high), shifted_right<3>(high),
                         shifted_right<4>(high), shifted_right<5>(high)};
      EM_UNROLL
      for (int w = 0; w < 8; ++w) words[w] = selected<3>(words[w], masked<4>(bits[w]));
    }
  }
}

template <int BITS, bool IS_TABLE>
EM_INLINE void unpack_unit(const uint8_t *p, int8x16_t (*codes)[kSteps]) {
  B words[8];
  unpack_words<BITS, IS_TABLE>(p, words);
  EM_UNROLL
  for (int step = 0; step < kSteps; ++step) {
    EM_UNROLL
    for (int i = 0; i < 4; ++i) {  // 4 rows of 4 columns, of two words that follow each other
      const uint32x4_t first = vreinterpretq_u32_u8(words[2 * step].v[i]);
      const uint32x4_t second = vreinterpretq_u32_u8(words[2 * step + 1].v[i]);
      codes[2 * i][step] = vreinterpretq_s8_u32(vzip1q_u32(first, second));
      codes[2 * i + 1][step] = vreinterpretq_s8_u32(vzip2q_u32(first, second));
    }
  }
}

// Returns where the next columns begin.
template <int BITS, bool IS_TABLE>
const uint8_t *unpack_block(const uint8_t *p, int64_t num_groups, int64_t units, bool is_asym,
                            Block *block) {
  int64_t unit = 0;
  for (int64_t g = 0; g < num_groups;) {
    const uint8_t *scales = p;
    p += is_asym ? 2 * kLineBytes : kLineBytes;
    for (int i = 0; i < 2 && g < num_groups; ++i, ++g, scales += kLineBytes / 2) {
      block->scales[g] = load_half(scales);
      if (is_asym) block->mins[g] = load_half(scales + kLineBytes);
      for (int64_t u = 0; u < units; ++u, ++unit, p += kLineBytes * BITS) {
        unpack_unit<BITS, IS_TABLE>(p, block->codes[unit]);
      }
    }
  }
  return p;
}

struct Plan {
  const uint8_t *(*unpack)(const uint8_t *, int64_t, int64_t, bool, Block *);
  int64_t units;       // activation groups per weight group
  int32_t zero_point;  // what is still to be taken off the unpacked codes
  bool is_asym;
};

Plan plan_of(em_format format) {
  const bool is_asym = format.mode == EM_MODE_ASYM, is_table = format.mode == EM_MODE_NF4;
  Plan plan = {unpack_block<8, false>, format.group_size / kActGroup, 0, is_asym};
  if (format.bits == 2) plan.unpack = unpack_block<2, false>;
  if (format.bits == 3) plan.unpack = unpack_block<3, false>;
  if (format.bits == 4) plan.unpack = is_table ? unpack_block<4, true> : unpack_block<4, false>;
  if (!is_asym && !is_table) plan.zero_point = 1 << (format.bits - 1);
  if (format.bits == 8) plan.zero_point -= 128;
  return plan;
}

// Adds to acc [2][16] what the columns of the block make of tokens t and t + 1.
EM_INLINE void multiply(const Plan &plan, const Block &block, int64_t num_groups,
                        const ActPanel *panels, int t, float *acc) {
  F sum[2];
  EM_UNROLL
  for (int j = 0; j < 2; ++j) {
    EM_EACH_REGISTER sum[j].v[i] = vld1q_f32(acc + j * kTileRows + 4 * i);
  }
  for (int64_t g = 0; g < num_groups; ++g) {
    F part[2] = {broadcast(0.0f), broadcast(0.0f)};
    const ActPanel *const first = panels;
    for (int64_t u = 0; u < plan.units; ++u, ++panels) {
      int8x16_t x[kSteps];
      EM_UNROLL
      for (int step = 0; step < kSteps; ++step) {
        x[step] = vcombine_s8(vld1_s8(panels->q[t] + 8 * step), vld1_s8(panels->q[t + 1] + 8 * step));
      }
      const int32x2_t start = vmul_n_s32(vld1_s32(panels->negative_sum + t), plan.zero_point);
      const int8x16_t(*const codes)[kSteps] = block.codes[g * plan.units + u];
      EM_EACH_REGISTER {
        int32x4_t low = vcombine_s32(start, start), high = low;
        EM_UNROLL
        for (int step = 0; step < kSteps; ++step) {
          low = vmmlaq_s32(low, codes[2 * i][step], x[step]);
          high = vmmlaq_s32(high, codes[2 * i + 1][step], x[step]);
        }
        part[0].v[i] = vfmaq_n_f32(part[0].v[i], vcvtq_f32_s32(vuzp1q_s32(low, high)),
                                   panels->scale[t]);
        part[1].v[i] = vfmaq_n_f32(part[1].v[i], vcvtq_f32_s32(vuzp2q_s32(low, high)),
                                   panels->scale[t + 1]);
      }
    }
    EM_UNROLL
    for (int j = 0; j < 2; ++j) sum[j] = fma(block.scales[g], part[j], sum[j]);
    for (int64_t u = 0; plan.is_asym && u < plan.units; ++u) {
      EM_UNROLL
      for (int j = 0; j < 2; ++j) {
        sum[j] = fma(block.mins[g], broadcast(first[u].sum[t + j]), sum[j]);
      }
    }
  }
  EM_UNROLL
  for (int j = 0; j < 2; ++j) store(acc + j * kTileRows, sum[j]);
}

void panels_i8mm(const uint8_t *tiles, int64_t num_tiles, int64_t cols, em_format format,
                 const ActPanel *panels, int64_t num_tokens, float *out, int64_t out_stride) {
  const Plan plan = plan_of(format);
  const int64_t num_units = cols / kActGroup;
  Block block;
  float acc[kMaxPanelTokens * kTileRows];
  for (int64_t tile = 0; tile < num_tiles; ++tile, out += kTileRows) {
    for (int64_t i = 0; i < (num_tokens + 1) * kTileRows && i < kMaxPanelTokens * kTileRows; ++i) {
      acc[i] = 0.0f;
    }
    for (int64_t s = 0; s < num_units; s += kBlockUnits) {
      const int64_t left = num_units - s;
      const int64_t num_groups = (left < kBlockUnits ? left : kBlockUnits) / plan.units;
      tiles = plan.unpack(tiles, num_groups, plan.units, plan.is_asym, &block);
      for (int64_t t = 0; t < num_tokens; t += 2) {
        multiply(plan, block, num_groups, panels + t / kPanelTokens * num_units + s,
                 static_cast<int>(t % kPanelTokens), acc + t * kTileRows);
      }
    }
    for (int64_t t = 0; t < num_tokens; ++t) {
      for (int i = 0; i < kTileRows; ++i) out[t * out_stride + i] = acc[t * kTileRows + i];
    }
  }
}

}  // namespace

PanelKernel panels_neon_i8mm() { return panels_i8mm; }

}  // namespace em
#else
namespace em {
PanelKernel panels_neon_i8mm() { return nullptr; }
}  // namespace em
#endif
