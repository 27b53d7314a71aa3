// What the experts that a token has chosen do to a later router, learned while decoding. A router looked
// ahead at sees a residual that lacks what they are going to add; that shifts its logits, and what an
// expert adds is alike from token to token.
#pragma once
#include <cstdint>
#include <vector>

namespace em {

class Shift {
 public:
  // Of `num_experts` that are chosen, and the `num_scores` of the later router.
  Shift(int64_t num_experts, int64_t num_scores);

  // scores [num_scores]: the later router's shares, > 0 or so small as to be 0; afterwards in the
  // order that the choice ids, weights [num] makes of them, the largest 1.
  void apply(const int32_t *ids, const float *weights, int64_t num, float *scores);
  // What the router gave itself, [num_scores], to the token that was applied last, if one was.
  void learn(const float *scores);

 private:
  struct Input {
    int64_t row;
    float value;
  };

  int64_t num_scores_, num_experts_;
  std::vector<float> rows_;       // [num_experts + 1][num_scores]; the last one counts always
  std::vector<Input> inputs_;     // of the token applied last
  std::vector<float> predicted_;  // logits of it, but for a constant
  std::vector<float> error_;
};

}  // namespace em
