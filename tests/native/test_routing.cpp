// From scores to routes: fewer experts, top-p, masks and gains, rows that share a body.
#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "check.h"
#include "routing.h"

namespace {

constexpr int64_t kRows = 12, kTopK = 4;

struct Chosen {
  std::vector<int32_t> ids = std::vector<int32_t>(kTopK, 99);
  std::vector<float> weights = std::vector<float>(kTopK, 99.0f);
};

Chosen choose(const em::LayerRouting &layer, const std::vector<float> &scores,
              const em_routing &rule = {}, bool renormalise = false, const int32_t *kept = nullptr) {
  Chosen found;
  std::vector<int32_t> order(kTopK);
  em::Routes(rule, kTopK, renormalise)
      .choose(layer, scores.data(), kept, static_cast<int64_t>(scores.size()), nullptr, order.data(),
              found.ids.data(), found.weights.data());
  return found;
}

std::vector<float> softmax(check::Random *random, int64_t num = kRows) {
  std::vector<float> scores = random->floats(num, 3.0f);
  float sum = 0;
  for (float &score : scores) sum += score = std::exp(score);
  for (float &score : scores) score /= sum;
  return scores;
}

// Rows by descending score, of equal ones the lowest first.
std::vector<int32_t> by_score(const std::vector<float> &scores) {
  std::vector<int32_t> rows(scores.size());
  std::iota(rows.begin(), rows.end(), 0);
  std::stable_sort(rows.begin(), rows.end(),
                   [&](int32_t a, int32_t b) { return scores[a] > scores[b]; });
  return rows;
}

}  // namespace

TEST(routes_without_a_rule_are_the_largest) {
  check::Random random(1);
  const em::LayerRouting layer(kRows);
  CHECK(layer.is_plain());
  for (int turn = 0; turn < 200; ++turn) {
    const std::vector<float> scores = softmax(&random);
    for (const bool renormalise : {false, true}) {
      Chosen plain;
      em::pick_largest(scores.data(), kRows, kTopK, renormalise, plain.ids.data(),
                       plain.weights.data());
      const Chosen found = choose(layer, scores, {}, renormalise);
      CHECK(found.ids == plain.ids);
      CHECK(check::same_bits(found.weights, plain.weights));
    }
  }
}

TEST(fewer_experts_and_top_p_take_the_shortest_run) {
  check::Random random(2);
  const em::LayerRouting layer(kRows);
  for (int turn = 0; turn < 400; ++turn) {
    std::vector<float> scores = softmax(&random);
    if (turn % 3 == 0) scores[5] = scores[2] = scores[9];  // ties
    em_routing rule = {};
    rule.active_experts = turn % 5;
    rule.top_p = turn % 7 == 0 ? 0.999999f : static_cast<float>(turn % 11) / 10.0f;
    const int64_t most = rule.active_experts ? rule.active_experts : kTopK;
    const std::vector<int32_t> rows = by_score(scores);
    int64_t num = most;
    if (rule.top_p > 0 && rule.top_p < 1) {
      double sum = 0;
      for (num = 0; num < most && !(sum > rule.top_p); ++num) sum += scores[rows[num]];
    }
    std::vector<int32_t> expected(rows.begin(), rows.begin() + num);
    std::sort(expected.begin(), expected.end());
    float divisor = 0;
    for (int64_t i = 0; i < most; ++i) divisor += scores[rows[i]];
    const Chosen plain = choose(layer, scores, rule), divided = choose(layer, scores, rule, true);
    CHECK(num >= 1 && em::num_active(plain.ids.data(), kTopK) == num);
    for (int64_t k = 0; k < kTopK; ++k) {
      const bool is_used = k < num;
      CHECK_EQUAL(plain.ids[k], is_used ? expected[k] : -1);
      CHECK_EQUAL(plain.weights[k], is_used ? scores[expected[k]] : 0.0f);
      CHECK_EQUAL(divided.weights[k], is_used ? scores[expected[k]] / divisor : 0.0f);
    }
  }
}

TEST(top_p_counts_what_exceeds_it) {
  const em::LayerRouting layer(4);
  const std::vector<float> scores = {0.125f, 0.5f, 0.25f, 0.125f};
  em_routing rule = {};
  const float limits[] = {0.25f, 0.5f, 0.75f, 0.8125f, 0.875f, 1.0f};
  const int64_t counts[] = {1, 2, 3, 3, 4, 4};  // 0.5 does not exceed 0.5
  for (int i = 0; i < 6; ++i) {
    rule.top_p = limits[i];
    CHECK_EQUAL(em::num_active(choose(layer, scores, rule).ids.data(), kTopK), counts[i]);
  }
}

TEST(rows_of_one_body_count_as_one) {
  em::LayerRouting layer(kRows);
  const int32_t bodies[kRows] = {2, 0, 2, 1, -1, 0, 1, 2, -1, 3, 3, 0};
  CHECK(layer.set_bodies(bodies) && !layer.is_plain() && layer.num_bodies() == 4);
  check::Random random(3);
  bool has_sum = false, has_null = false, has_none = false;
  for (int turn = 0; turn < 500; ++turn) {
    std::vector<float> scores = softmax(&random);
    if (turn % 50 == 0) {  // null experts alone, but for two of them there are only two
      scores.assign(kRows, 0.0f);
      scores[4] = scores[8] = 0.5f;
    }
    em_routing rule = {};
    rule.active_experts = turn % 50 == 0 ? 2 : 0;
    const int64_t count = rule.active_experts ? rule.active_experts : kTopK;
    std::vector<int32_t> rows = by_score(scores);
    rows.resize(count);
    float divisor = 0;
    for (const int32_t row : rows) divisor += bodies[row] < 0 ? 0 : scores[row];
    for (const bool renormalise : {false, true}) {
      float sums[4] = {};
      bool is_used[4] = {};
      std::sort(rows.begin(), rows.end());
      for (const int32_t row : rows) {
        has_null = has_null || bodies[row] < 0;
        if (bodies[row] < 0) continue;
        has_sum = has_sum || is_used[bodies[row]];
        is_used[bodies[row]] = true;
        sums[bodies[row]] += renormalise ? scores[row] / divisor : scores[row];
      }
      const Chosen found = choose(layer, scores, rule, renormalise);
      int64_t num = 0;
      for (int32_t body = 0; body < 4; ++body) {
        if (!is_used[body]) continue;
        CHECK_EQUAL(found.ids[num], body);
        CHECK_EQUAL(found.weights[num], sums[body]);
        ++num;
      }
      has_none = has_none || num == 0;
      for (; num < kTopK; ++num) CHECK(found.ids[num] == -1 && found.weights[num] == 0.0f);
    }
  }
  CHECK(has_sum && has_null && has_none);
}

TEST(a_predicted_body_has_the_share_of_its_rows) {
  em::LayerRouting layer(4);
  const int32_t bodies[] = {1, 0, 1, -1};
  const uint8_t mask[] = {1, 1, 0, 1};
  const std::vector<float> shares = {0.125f, 0.25f, 0.5f, 0.125f};
  float scores[2];
  CHECK(layer.set_bodies(bodies));
  layer.shares_of_bodies(shares.data(), scores);
  CHECK(scores[0] == 0.25f && scores[1] == 0.625f);
  CHECK(layer.set_mask(mask, 2.0f, 3));
  layer.shares_of_bodies(shares.data(), scores);
  CHECK(scores[0] == 0.25f && scores[1] == 0.125f && layer.may_choose(1));
  CHECK(layer.set_mask(mask, 0.5f, 3));  // row 2 insists
  layer.shares_of_bodies(shares.data(), scores);
  CHECK_EQUAL(scores[1], 0.625f);
}

TEST(an_expert_without_gain_is_out_of_the_choice) {
  check::Random random(4);
  em::LayerRouting layer(kRows), sliced(kRows - 2);
  std::vector<float> gains(kRows, 1.0f);
  gains[3] = gains[7] = 0.0f;
  gains[0] = 2.0f;
  CHECK(layer.set_gains(gains.data()) && layer.is_masked());
  CHECK(!layer.may_choose(3) && layer.may_choose(0));
  for (int turn = 0; turn < 100; ++turn) {
    std::vector<float> logits = random.floats(kRows, 4.0f), few;
    for (int32_t e = 0; e < kRows; ++e) {
      if (gains[e] > 0) few.push_back(logits[e]);
    }
    std::vector<float> shares(kRows);
    std::vector<int32_t> kept(kRows);
    const int64_t num = layer.softmax(logits.data(), shares.data(), kept.data());
    CHECK_EQUAL(num, kRows - 2);
    const std::vector<float> scores(logits.begin(), logits.begin() + num);
    const Chosen found = choose(layer, scores, {}, false, kept.data());
    const Chosen plain = choose(sliced, scores);
    for (int64_t k = 0; k < kTopK; ++k) {
      const int32_t row = kept[plain.ids[k]];
      CHECK_EQUAL(found.ids[k], row);
      CHECK_EQUAL(found.weights[k], plain.weights[k] * gains[row]);
    }
  }
  CHECK(layer.set_gains(nullptr) && layer.is_plain() && layer.may_choose(3));
}

TEST(a_gain_of_nothing_holds_against_a_soft_set) {
  em::LayerRouting layer(4);
  const uint8_t mask[] = {1, 1, 0, 0};
  const float gains[] = {1, 1, 1, 0};
  CHECK(layer.set_mask(mask, 0.1f, 2) && layer.set_gains(gains));
  float row[] = {0, 0, 5, 5}, shares[4];
  int32_t kept[4];
  CHECK_EQUAL(layer.softmax(row, shares, kept), 3);
  CHECK(kept[0] == 0 && kept[1] == 1 && kept[2] == 2);
  CHECK(layer.may_choose(2) && !layer.may_choose(3));
}

TEST(what_cannot_be_is_refused) {
  em::LayerRouting layer(4);
  const int32_t too_high[] = {0, 1, 2, 4}, too_low[] = {0, 1, 2, -2}, none[] = {-1, -1, -1, -1};
  for (const int32_t *bodies : {too_high, too_low, none}) CHECK(!layer.set_bodies(bodies));
  const float negative[] = {1, 1, 1, -1}, endless[] = {1, 1, 1, INFINITY}, off[] = {0, 0, 0, 0};
  for (const float *gains : {negative, endless, off}) CHECK(!layer.set_gains(gains));
  const uint8_t mask[] = {1, 0, 0, 0};
  CHECK(!layer.set_mask(mask, 2.0f, 2) && !layer.set_mask(mask, NAN, 1));
  CHECK(layer.is_plain() && layer.num_bodies() == 4);
}
