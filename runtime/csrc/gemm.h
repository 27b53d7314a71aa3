// Matrices times many tokens. The tokens are packed once, and every tile of 16 rows is multiplied
// with the same panels: its codes are unpacked once for all of them.
#pragma once
#include <cstdint>

#include "kernels.h"

namespace em {

constexpr int kPanelTokens = 16;
constexpr int kMaxPanelTokens = 128;  // most tokens in one call of a panel kernel
// From here on panels are faster than tile kernels (8 tokens: .85 of their speed, 12: 1.2), and no
// larger than the fp32 rows they are made of.
constexpr int kMinPanelTokens = 12;

// 32 columns of 16 tokens: their ActGroups turned round.
struct ActPanel {
  int8_t q[kPanelTokens][kActGroup];
  float scale[kPanelTokens];
  float sum[kPanelTokens];
  int32_t negative_sum[kPanelTokens];
};
static_assert(sizeof(ActPanel) == kPanelTokens * sizeof(ActGroup), "panels lie in place of rows");

// Panels of a matrix [num_tokens, cols]: [blocks of 16 tokens][cols / 32].
inline int64_t num_panels(int64_t num_tokens, int64_t cols) {
  return (num_tokens + kPanelTokens - 1) / kPanelTokens * (cols / kActGroup);
}
static_assert(kPanelTokens * sizeof(ActGroup) <= kMinPanelTokens * kActGroup * sizeof(float),
              "panels fit where fp32 rows of as many tokens lay");

PanelKernel panels_neon_i8mm();  // null where the compiler was not asked for it

// Packs one block of num_tokens <= 16 tokens, tokens[t] [cols / 32]; the others become 0.
void pack_panels(const ActGroup *const *tokens, int num_tokens, int64_t cols, ActPanel *dst);
// One group of one token.
void put_group(const ActGroup &group, int token, ActPanel *dst);
// Zeros for tokens num_tokens .. 15.
void clear_tokens(int num_tokens, ActPanel *dst);

}  // namespace em
