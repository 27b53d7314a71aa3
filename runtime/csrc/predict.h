// Which experts a layer will want, as scores; the twin of runtime/prefetch.py.
#pragma once
#include <cstdint>

#include "edgemoe_core.h"

namespace em {

// The key of a state of two layers, as `path_keys` of runtime/transitions.py.
uint64_t path_key(const int32_t *before, int64_t num_before, const int32_t *active,
                  int64_t num_active);
// As em_profile_scores.
void profile_scores(const em_place_tables &tables, float back_off, int64_t num_experts,
                    const int32_t *before, int64_t num_before, const int32_t *active,
                    int64_t num_active, int64_t token_id, float *scores);
// The n positions of the largest scores, largest first; of equal ones the lowest. Scores >= 0 or NaN.
void rank_largest(const float *scores, int64_t num, int64_t n, int32_t *positions);

// How sure a choice is by its score: between 0, far below the line between the last one chosen and the
// first one left out, and kNumMargins - 1, far above it. The line is the geometric mean of their scores.
constexpr int32_t kNumMargins = 13;
int32_t margin_of(float score, float last_chosen, float first_left);

}  // namespace em
