#include "gemm.h"

#include <cstring>

namespace em {

void put_group(const ActGroup &group, int token, ActPanel *dst) {
  std::memcpy(dst->q[token], group.q, kActGroup);
  dst->scale[token] = group.scale;
  dst->sum[token] = group.sum;
  dst->negative_sum[token] = group.negative_sum;
}

void clear_tokens(int num_tokens, ActPanel *dst) {
  const ActGroup zero = {};
  for (int t = num_tokens; t < kPanelTokens; ++t) put_group(zero, t, dst);
}

void pack_panels(const ActGroup *const *tokens, int num_tokens, int64_t cols, ActPanel *dst) {
  for (int64_t s = 0; s < cols / kActGroup; ++s, ++dst) {
    for (int t = 0; t < num_tokens; ++t) put_group(tokens[t][s], t, dst);
    clear_tokens(num_tokens, dst);
  }
}

}  // namespace em
