#include "routing.h"

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstring>
#include <utility>

#include "decoder.h"
#include "kernels.h"
#include "predict.h"
#include "store.h"
#include "thread_pool.h"

namespace em {

void pick_largest(const float *scores, int64_t num_experts, int64_t top_k, bool renormalise,
                  int32_t *ids, float *weights) {
  int32_t last_key = INT32_MAX;
  int32_t last_id = -1;
  float sum = 0.0f;
  for (int64_t k = 0; k < top_k; ++k) {
    int32_t best_key = -1, best_id = -1;
    for (int32_t e = 0; e < num_experts; ++e) {
      int32_t key;
      std::memcpy(&key, scores + e, 4);
      key &= INT32_MAX;
      const bool is_left = key < last_key || (key == last_key && e > last_id);
      if (is_left && key > best_key) {
        best_key = key;
        best_id = e;
      }
    }
    last_key = best_key;
    last_id = best_id;
    sum += scores[best_id];
    int64_t place = k;
    for (; place > 0 && ids[place - 1] > best_id; --place) {
      ids[place] = ids[place - 1];
      weights[place] = weights[place - 1];
    }
    ids[place] = best_id;
    weights[place] = scores[best_id];
  }
  if (!renormalise) return;
  for (int64_t k = 0; k < top_k; ++k) weights[k] /= sum;
}

bool LayerRouting::set_mask(const uint8_t *mask, float threshold, int64_t top_k) {
  std::vector<uint8_t> next;
  if (mask != nullptr) {
    int64_t num_kept = 0;
    for (int64_t e = 0; e < num_rows_; ++e) num_kept += mask[e] != 0;
    if (num_kept < top_k || !(threshold >= 0)) return false;
    if (experts_of_token_ != nullptr && num_kept < num_rows_) return false;
    next.assign(mask, mask + num_rows_);
  }
  set_.swap(next);
  threshold_ = threshold;
  update();
  return true;
}

bool LayerRouting::set_gains(const float *gains) {
  std::vector<float> next;
  if (gains != nullptr) {
    bool is_any_on = false;
    for (int64_t e = 0; e < num_rows_; ++e) {
      if (!(gains[e] >= 0) || !std::isfinite(gains[e])) return false;
      is_any_on = is_any_on || gains[e] > 0;
    }
    const bool is_any_off = std::find(gains, gains + num_rows_, 0.0f) != gains + num_rows_;
    if (!is_any_on || (is_any_off && experts_of_token_ != nullptr)) return false;
    next.assign(gains, gains + num_rows_);
  }
  gains_.swap(next);
  update();
  return true;
}

bool LayerRouting::set_bodies(const int32_t *bodies) {
  std::vector<int32_t> next;
  int64_t num_bodies = num_rows_;
  if (bodies != nullptr) {
    num_bodies = 0;
    for (int64_t e = 0; e < num_rows_; ++e) {
      if (bodies[e] < -1 || bodies[e] >= num_rows_) return false;
      if (bodies[e] >= num_bodies) num_bodies = bodies[e] + 1;
    }
    if (num_bodies == 0) return false;
    next.assign(bodies, bodies + num_rows_);
  }
  bodies_.swap(next);
  num_bodies_ = num_bodies;
  update();
  return true;
}

void LayerRouting::update() {
  Mask next;
  bool is_any_off = false;
  for (int64_t e = 0; e < num_rows_; ++e) is_any_off = is_any_off || is_off(e);
  if (!set_.empty() || is_any_off) {
    next.threshold = set_.empty() ? 2.0f : threshold_;
    for (int32_t e = 0; e < num_rows_; ++e) {
      next.is_kept.push_back((set_.empty() || set_[e]) && !is_off(e));
      if (next.is_kept[e]) next.kept.push_back(e);
    }
  }
  std::vector<uint8_t> may_choose;
  if (!bodies_.empty() || !next.is_kept.empty()) {
    may_choose.resize(static_cast<size_t>(num_bodies_), 0);
    for (int32_t e = 0; e < num_rows_; ++e) {
      const bool may = next.is_kept.empty() || next.is_kept[e] ||
                       (next.threshold <= 1.0f && !is_off(e));
      if (may && body_of(e) >= 0) may_choose[body_of(e)] = 1;
    }
  }
  std::swap(mask_, next);
  may_choose_.swap(may_choose);
}

int64_t LayerRouting::softmax(float *row, float *shares, int32_t *kept) const {
  int64_t num = 0;
  if (mask_.threshold > 1.0f) {  // no share is that large
    for (const int32_t e : mask_.kept) kept[num++] = e;
  } else {
    std::memcpy(shares, row, num_rows_ * sizeof(float));
    row_kernels().softmax(shares, num_rows_);
    for (int32_t e = 0; e < num_rows_; ++e) {
      if (mask_.is_kept[e] || (shares[e] >= mask_.threshold && !is_off(e))) kept[num++] = e;
    }
  }
  for (int64_t i = 0; i < num; ++i) row[i] = row[kept[i]];
  row_kernels().softmax(row, num);
  return num;
}

void LayerRouting::shares_of_bodies(const float *shares, float *scores) const {
  for (int64_t body = 0; body < num_bodies_; ++body) scores[body] = 0.0f;
  for (int32_t e = 0; e < num_rows_; ++e) {
    const int32_t body = body_of(e);
    if (body < 0 || is_off(e)) continue;
    const bool is_out = is_masked() && !mask_.is_kept[e] && shares[e] < mask_.threshold;
    if (!is_out) scores[body] += shares[e];
  }
}

int64_t Routes::choose(const LayerRouting &layer, const float *scores, const int32_t *kept,
                       int64_t num, const int32_t *given, int32_t *order, int32_t *ids,
                       float *weights) const {
  const auto row_of = [kept](int32_t position) { return kept ? kept[position] : position; };
  const int64_t count = std::min(num_active(), num);
  const int64_t num_auxiliary = std::min<int64_t>(rule_.num_auxiliary, num - count);
  if (given == nullptr) {
    rank_largest(scores, num, count + num_auxiliary, order);
  } else {
    for (int64_t k = 0; k < top_k_; ++k) weights[k] = scores[given[k]];
    rank_largest(weights, top_k_, count + num_auxiliary, order);
    for (int64_t k = 0; k < count + num_auxiliary; ++k) order[k] = given[order[k]];
  }
  int64_t used = count;
  if (rule_.top_p > 0 && rule_.top_p < 1) {
    double sum = 0;
    for (used = 0; used < count && !(sum > static_cast<double>(rule_.top_p)); ++used) {
      sum += static_cast<double>(scores[order[used]]);
    }
  }
  float sum = 1.0f;
  if (renormalise_) {  // over what has a body; top-p spreads nothing over those that stay
    sum = 0.0f;
    for (int64_t i = 0; i < count; ++i) {
      if (layer.body_of(row_of(order[i])) >= 0) sum += scores[order[i]];
    }
  }
  for (int64_t i = 1; i < used; ++i) {  // ascending from here on
    const int32_t position = order[i];
    int64_t place = i;
    for (; place > 0 && order[place - 1] > position; --place) order[place] = order[place - 1];
    order[place] = position;
  }
  int64_t num_ids = 0;
  for (int64_t i = 0; i < used; ++i) {
    const int32_t row = row_of(order[i]), body = layer.body_of(row);
    if (body < 0) continue;
    float weight = scores[order[i]];
    if (renormalise_) weight /= sum;
    weight *= layer.gain_of(row);
    int64_t place = num_ids;
    while (place > 0 && ids[place - 1] > body) --place;
    if (place > 0 && ids[place - 1] == body) {
      weights[place - 1] += weight;
      continue;
    }
    for (int64_t j = num_ids; j > place; --j) {
      ids[j] = ids[j - 1];
      weights[j] = weights[j - 1];
    }
    ids[place] = body;
    weights[place] = weight;
    ++num_ids;
  }
  for (; num_ids < top_k_; ++num_ids) {
    ids[num_ids] = -1;
    weights[num_ids] = 0.0f;
  }
  return num_auxiliary;
}

bool Decoder::set_routing(const em_routing *routing) {
  const em_routing next = routing == nullptr ? em_routing{} : *routing;
  const int64_t num_active = next.active_experts > 0 ? next.active_experts : model_.top_k;
  const auto is_share = [](float share) { return share >= 0 && share <= 1; };
  if (next.active_experts < 0 || next.num_auxiliary < 0 ||
      num_active + next.num_auxiliary > model_.top_k || !is_share(next.top_p) ||
      !is_share(next.cold_share) || !is_share(next.max_dropped) ||
      !is_share(next.stand_in_after)) {
    return false;
  }
  rule_ = next;
  return true;
}

// The input of the experts of a token from its normed row [D]: x * (1 + sum of a (theta - 1)) over the
// auxiliary ones, in which thetas of 1 change no bit.
static void scale_input(const float *theta, const float *scores, const int32_t *kept,
                        const int32_t *auxiliary, int64_t num, const float *normed, int64_t hidden,
                        float *x) {
  float sum = 0.0f;
  for (int64_t i = 0; i < num; ++i) sum += scores[auxiliary[i]];
  std::fill_n(x, hidden, 1.0f);
  for (int64_t i = 0; i < num; ++i) {
    const float share = scores[auxiliary[i]] / sum;
    const int64_t row = kept ? kept[auxiliary[i]] : auxiliary[i];
    for (int64_t d = 0; d < hidden; ++d) x[d] += share * (theta[row * hidden + d] - 1.0f);
  }
  for (int64_t d = 0; d < hidden; ++d) x[d] *= normed[d];
}

int32_t Decoder::route(int64_t number, const float *normed, int64_t num_tokens,
                       const int32_t *token_ids, int32_t *ids, float *weights) {
  const em_block &layer = layers_[number];
  const LayerRouting &routing = routing_[number];
  const int64_t num_rows = layer.router.rows, top_k = model_.top_k;
  const bool renormalise = model_.renormalise != 0;
  const bool has_rule = rule_.active_experts != 0 || rule_.top_p > 0 || rule_.cold_share > 0 ||
                        rule_.stand_ins != 0;
  const bool is_changed = !routing.is_plain() || has_rule;
  const bool is_plain = !is_changed && layer.experts_of_token == nullptr;
  const bool has_auxiliary = !is_plain && rule_.num_auxiliary > 0 && routing.theta != nullptr;
  float *inputs = has_auxiliary ? inputs_.floats(num_tokens * model_.hidden) : nullptr;
  if (has_auxiliary && inputs == nullptr) return -ENOMEM;
  experts_x_ = inputs;
  const int64_t room = 2 * num_rows + top_k;  // of a token that is not plain
  float *scores = scores_.floats(num_tokens * num_rows);
  float *scratch = is_plain ? nullptr : masked_.floats(num_tokens * room);
  if (scores == nullptr || (!is_plain && scratch == nullptr)) return -ENOMEM;
  if (cache_ != nullptr) cache_->fetch_ahead(next_place_);
  const int32_t status = multiply(layer.router, normed, num_tokens, nullptr, scores);
  if (status != 0) return status;
  const Routes routes(rule_, top_k, renormalise);
  parallel_for(pool_, num_tokens, [&](int64_t t, int) {
    float *row = scores + t * num_rows;
    if (is_plain) {
      row_kernels().softmax(row, num_rows);
      pick_largest(row, num_rows, top_k, renormalise, ids + t * top_k, weights + t * top_k);
      return;
    }
    float *shares = scratch + t * room;
    int32_t *kept = reinterpret_cast<int32_t *>(shares + num_rows);
    int32_t *order = kept + num_rows;
    int64_t num = num_rows;
    if (routing.is_masked()) {
      num = routing.softmax(row, shares, kept);
    } else {
      row_kernels().softmax(row, num_rows);
      kept = nullptr;
    }
    const int32_t *given =
        layer.experts_of_token ? layer.experts_of_token + token_ids[t] * top_k : nullptr;
    const int64_t num_auxiliary =
        routes.choose(routing, row, kept, num, given, order, ids + t * top_k, weights + t * top_k);
    if (inputs == nullptr) return;
    const int64_t at = t * model_.hidden;
    scale_input(routing.theta, row, kept, order + routes.num_active(), num_auxiliary, normed + at,
                model_.hidden, inputs + at);
  });
  router_shares_ = is_plain && num_tokens == 1 ? scores : nullptr;
  if (!is_changed) return 0;
  counts_.num_routed += num_tokens;
  for (int64_t t = 0; t < num_tokens; ++t) counts_.num_active += num_active(ids + t * top_k, top_k);
  return 0;
}

// Leaves records of little weight out of a token's routes that are absent, as is what may stand in for
// them, the coldest first; returns how many entries are left.
int64_t Decoder::drop_cold(const em_block &layer, const Cache &cache, int32_t *ids, float *weights,
                           int64_t num) {
  float sum = 0.0f, largest = 0.0f;
  for (int64_t k = 0; k < num; ++k) {
    sum += weights[k];
    largest = std::max(largest, weights[k]);
  }
  num_picks_ += num;
  const int64_t stand_ins = rule_.stand_ins != 0 ? layer.first_stand_in : 0;
  const auto is_absent = [&](int32_t id) {
    return cache.is_absent(static_cast<int32_t>(layer.first_key + id)) &&
           (stand_ins == 0 || cache.is_absent(static_cast<int32_t>(stand_ins + id)));
  };
  for (int64_t left = num; left > 1; --left) {
    const double limit = static_cast<double>(rule_.max_dropped) * static_cast<double>(num_picks_);
    if (static_cast<double>(counts_.num_dropped + 1) > limit) return left;
    int64_t coldest = -1;
    for (int64_t k = 0; k < left; ++k) {
      const bool is_cold =
          weights[k] < rule_.cold_share * sum && weights[k] < largest && is_absent(ids[k]);
      if (is_cold && (coldest < 0 || weights[k] < weights[coldest])) coldest = k;
    }
    if (coldest < 0) return left;
    std::copy(ids + coldest + 1, ids + left, ids + coldest);
    std::copy(weights + coldest + 1, weights + left, weights + coldest);
    ids[left - 1] = -1;
    weights[left - 1] = 0.0f;
    ++counts_.num_dropped;
    --counts_.num_active;
  }
  return std::min<int64_t>(num, 1);
}

// Of keys_ [num], the experts of one token: absent ones of little weight become their stand-ins. Sums in
// double, most weight first, of equal ones the first: those of runtime/stand_ins.py.
void Decoder::stand_in(const em_block &layer, const Cache &cache, const float *weights,
                       int64_t num) {
  order_.resize(static_cast<size_t>(num));
  rank_largest(weights, num, num, order_.data());
  double sum = 0.0, before = 0.0;
  for (const int32_t k : order_) sum += static_cast<double>(weights[k]);
  const double limit = static_cast<double>(rule_.stand_in_after) * sum;
  const int32_t step = static_cast<int32_t>(layer.first_stand_in - layer.first_key);
  const em_record *records = records_of(cache.store());
  for (const int32_t k : order_) {
    const em_record *own = records + keys_[k];
    if (before > limit && cache.is_absent(keys_[k]) && own[step].num_bytes < own->num_bytes) {
      keys_[k] += step;
      ++counts_.num_stand_ins;
    }
    before += static_cast<double>(weights[k]);
  }
}

int32_t Decoder::look_ahead(int64_t number, const float *x, float *scores) {
  const em_block &layer = layers_[number];
  float *normed = ahead_.floats(model_.hidden + layer.router.rows);
  if (normed == nullptr) return -ENOMEM;
  row_kernels().rms_norm(x, layer.post_norm, model_.hidden, model_.rms_eps, normed);
  const bool is_plain = routing_[number].is_plain();
  float *shares = is_plain ? scores : normed + model_.hidden;
  const int32_t status = multiply(layer.router, normed, 1, nullptr, shares);
  if (status != 0) return status;
  row_kernels().softmax(shares, layer.router.rows);
  if (!is_plain) routing_[number].shares_of_bodies(shares, scores);
  return 0;
}

}  // namespace em
