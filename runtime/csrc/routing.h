// What lies between the logits of a layer's router and the routes of a token: masks and gains, the
// rule of em_routing, and the map from the router's rows to bodies.
#pragma once
#include <cstdint>
#include <vector>

#include "edgemoe_core.h"

namespace em {

// What a pruned set leaves of the experts of a layer.
struct Mask {
  std::vector<uint8_t> is_kept;  // [E]; empty: every expert stays
  std::vector<int32_t> kept;     // their ids, ascending
  float threshold = 0;           // an expert with at least this share of a token comes back for it
};

// Of one layer with E rows in its router and D bodies.
class LayerRouting {
 public:
  // experts_of_token: of em_block.
  explicit LayerRouting(int64_t num_rows, const int32_t *experts_of_token = nullptr)
      : num_rows_(num_rows), num_bodies_(num_rows), experts_of_token_(experts_of_token) {}

  // Each checks its array [E] and keeps a copy; null takes the last one back. False: it cannot be.
  bool set_mask(const uint8_t *mask, float threshold, int64_t top_k);
  bool set_gains(const float *gains);
  bool set_bodies(const int32_t *bodies);

  int64_t num_bodies() const { return num_bodies_; }
  bool is_masked() const { return !mask_.is_kept.empty(); }
  bool is_plain() const { return mask_.is_kept.empty() && gains_.empty() && bodies_.empty(); }
  // Whether some token could choose the body.
  bool may_choose(int64_t body) const { return may_choose_.empty() || may_choose_[body]; }

  // In place of a row of logits [E]: the softmax over the experts that the masks leave for this
  // token, close together, and their ids in `kept` [E]; returns their number. What is left out takes
  // no part in any sum, so that the bits are those of a router that never had its rows. shares [E]:
  // scratch.
  int64_t softmax(float *row, float *shares, int32_t *kept) const;
  // Shares [E] of the rows of one token, those that it cannot choose 0, as shares of bodies [D].
  void shares_of_bodies(const float *shares, float *scores) const;
  // -1: none.
  int32_t body_of(int32_t row) const { return bodies_.empty() ? row : bodies_[row]; }
  float gain_of(int32_t row) const { return gains_.empty() ? 1.0f : gains_[row]; }
  const float *theta = nullptr;  // [E, D], not owned

 private:
  bool is_off(int64_t row) const { return !gains_.empty() && gains_[row] == 0.0f; }
  void update();

  int64_t num_rows_, num_bodies_;
  const int32_t *experts_of_token_;
  std::vector<uint8_t> set_;         // [E] of set_mask; empty: none
  float threshold_ = 2.0f;           // of it
  std::vector<float> gains_;         // [E]; empty: 1 each
  std::vector<int32_t> bodies_;      // [E]; empty: row e is body e
  std::vector<uint8_t> may_choose_;  // [D]; empty: all
  Mask mask_;                        // what the set and the gains leave
};

// The routes of one token, from scores [num] of the rows `kept` (null: row i is i).
class Routes {
 public:
  Routes(const em_routing &rule, int64_t top_k, bool renormalise)
      : rule_(rule), top_k_(top_k), renormalise_(renormalise) {}

  // Writes ids, weights [K]: bodies, ascending, then -1 with weight 0. order [K]: afterwards, the
  // positions of auxiliary experts at num_active .. num_active + (what is returned). given [K]: the
  // rows to choose among, ascending; null: all.
  int64_t choose(const LayerRouting &layer, const float *scores, const int32_t *kept, int64_t num,
                 const int32_t *given, int32_t *order, int32_t *ids, float *weights) const;
  int64_t num_active() const { return rule_.active_experts > 0 ? rule_.active_experts : top_k_; }

 private:
  const em_routing &rule_;
  const int64_t top_k_;
  const bool renormalise_;
};

// The K largest scores [E], by ascending id; of equal ones the lowest ids. Compared as integers,
// which orders numbers >= 0 and gives NaN a place, so that the ids are good whatever the scores.
void pick_largest(const float *scores, int64_t num_experts, int64_t top_k, bool renormalise,
                  int32_t *ids, float *weights);

// Active entries of a row of routes: they come before those that are -1.
inline int64_t num_active(const int32_t *ids, int64_t top_k) {
  while (top_k > 0 && ids[top_k - 1] < 0) --top_k;
  return top_k;
}

}  // namespace em
