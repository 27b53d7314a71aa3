// The experts of a layer: resident, arriving late from a file, failing; always the same bits.
#include <cmath>
#include <cstring>

#include "check.h"
#include "store_folder.h"

namespace {

using check::Random;

const std::vector<em_format> kFormats = {{4, 32, EM_MODE_SYM}, {8, 64, EM_MODE_ASYM},
                                         {16, 0, EM_MODE_BF16}, {3, 64, EM_MODE_SYM}};
constexpr int64_t kHidden = 192, kWidth = 128, kExperts = 8;

StoreFolder make() { return make_store("moe", kHidden, kWidth, {0}, kExperts, kFormats); }

// Some experts, and which token goes to which of them with which weight.
struct Routes {
  int64_t num_tokens;
  std::vector<int32_t> keys;
  std::vector<int64_t> pair_begin = {0};
  std::vector<int32_t> pair_token;
  std::vector<float> pair_weight;
};

Routes make_routes(Random &random, int64_t num_tokens, std::vector<int32_t> keys) {
  Routes routes = {num_tokens, keys, {0}, {}, {}};
  for (size_t i = 0; i < keys.size(); ++i) {
    for (int64_t t = 0; t < num_tokens; ++t) {
      if (num_tokens > 1 && random.below(3) == 0) continue;
      routes.pair_token.push_back(static_cast<int32_t>(t));
      routes.pair_weight.push_back(random.uniform());
    }
    routes.pair_begin.push_back(static_cast<int64_t>(routes.pair_token.size()));
  }
  return routes;
}

struct Result {
  int32_t status;
  int64_t failed;
  std::vector<float> y;
};

Result run(em_pool *pool, em_store *store, const StoreFolder &folder, const Routes &routes,
           const std::vector<float> &x, const std::vector<const uint8_t *> &data) {
  Result result = {0, 0, std::vector<float>(x.size(), 0.25f)};
  const int64_t num_pairs = routes.pair_begin.back();
  std::vector<float> workspace(static_cast<size_t>(
      em_moe_workspace_floats(routes.num_tokens, num_pairs, kHidden, kWidth)));
  em_moe_args args = {};
  args.num_tokens = routes.num_tokens;
  args.hidden = kHidden;
  args.width = kWidth;
  args.num_experts = static_cast<int64_t>(routes.keys.size());
  args.x = x.data();
  args.y = result.y.data();
  args.keys = routes.keys.data();
  args.data = data.data();
  args.pair_begin = routes.pair_begin.data();
  args.pair_token = routes.pair_token.data();
  args.pair_weight = routes.pair_weight.data();
  args.workspace = workspace.data();
  result.status = em_moe_run(pool, store, store ? nullptr : folder.records.data(), &args);
  result.failed = args.failed;
  CHECK(args.stall_ns >= 0);
  return result;
}

Result run_resident(em_pool *pool, const StoreFolder &folder, const Routes &routes,
                    const std::vector<float> &x) {
  std::vector<const uint8_t *> data;
  for (const int32_t key : routes.keys) data.push_back(folder.experts[key].record.data());
  return run(pool, nullptr, folder, routes, x, data);
}

std::vector<double> oracle(const StoreFolder &folder, const Routes &routes,
                           const std::vector<float> &x) {
  std::vector<double> y(x.size(), 0.25);
  for (size_t i = 0; i < routes.keys.size(); ++i) {
    const Expert &expert = folder.experts[routes.keys[i]];
    for (int64_t p = routes.pair_begin[i]; p < routes.pair_begin[i + 1]; ++p) {
      const int64_t token = routes.pair_token[p];
      const std::vector<float> row(x.begin() + token * kHidden, x.begin() + (token + 1) * kHidden);
      const std::vector<double> seen = seen_by(expert.gate.format, row);
      const std::vector<double> gate = product(expert.gate, seen), up = product(expert.up, seen);
      std::vector<float> h(kWidth);
      for (int64_t k = 0; k < kWidth; ++k) {
        h[k] = static_cast<float>(gate[k] / (1 + std::exp(-gate[k])) * up[k]);
      }
      const std::vector<double> out = product(expert.down, seen_by(expert.down.format, h));
      for (int64_t k = 0; k < kHidden; ++k) y[token * kHidden + k] += routes.pair_weight[p] * out[k];
    }
  }
  return y;
}

em_store *open(const StoreFolder &folder, int32_t depth = 2) {
  int32_t error = 0;
  em_store *store =
      em_store_open(folder.experts_path().c_str(), folder.records.data(),
                    static_cast<int64_t>(folder.records.size()), depth, 0, EM_METHOD_AUTO, &error);
  CHECK_EQUAL(error, 0);
  return store;
}

}  // namespace

TEST(a_layer_of_experts_agrees_with_float64) {
  const StoreFolder folder = make();
  Random random(51);
  em_pool *pools[] = {em_pool_create(2), em_pool_create(3)};
  for (const int64_t num_tokens : {1, 2, 5, 40}) {
    const Routes routes = make_routes(random, num_tokens, {0, 1, 2, 3, 5, 6, 7});
    const std::vector<float> x = random.floats(num_tokens * kHidden);
    const Result result = run_resident(nullptr, folder, routes, x);
    CHECK_EQUAL(result.status, 0);
    CHECK_EQUAL(result.failed, -1);
    // h is rounded to int8: one step of it may differ where the float64 value lies at an edge.
    CHECK(check::relative_error(result.y, oracle(folder, routes, x)) < 2e-3);
    check::digest(result.y);
    for (em_pool *pool : pools) {
      CHECK(check::same_bits(run_resident(pool, folder, routes, x).y, result.y));
    }
  }
  for (em_pool *pool : pools) em_pool_destroy(pool);
}

TEST(experts_that_arrive_late_give_the_same_bits) {
  const StoreFolder folder = make();
  Random random(52);
  em_pool *pool = em_pool_create(2);
  const Slots slots(kExperts, folder.max_record_bytes());
  for (int round = 0; round < 12; ++round) {
    const int64_t num_tokens = round % 4 == 3 ? 30 : 1 + round % 3;
    const Routes routes = make_routes(random, num_tokens, {0, 1, 2, 4, 6, 7});
    const std::vector<float> x = random.floats(num_tokens * kHidden);
    const Result right = run_resident(nullptr, folder, routes, x);
    em_store *store = open(folder, 1 + round % 2);
    std::vector<const uint8_t *> data;
    for (size_t i = 0; i < routes.keys.size(); ++i) {
      // In an order that has nothing to do with the list's, some with low priority.
      const size_t at = (i * 5 + round) % routes.keys.size();
      const int32_t key = routes.keys[at];
      void *dst = slots.at(key);
      std::memset(dst, 0, static_cast<size_t>(folder.records[key].num_bytes));
      CHECK_EQUAL(em_store_submit(store, 1, &key, &dst, static_cast<int32_t>(i % 3)), 0);
      data.push_back(slots.at(routes.keys[i]));
    }
    const Result result = run(round % 2 ? pool : nullptr, store, folder, routes, x, data);
    CHECK_EQUAL(result.status, 0);
    CHECK(check::same_bits(result.y, right.y));
    CHECK(check::same_bits(run(pool, store, folder, routes, x, data).y, right.y));  // resident now
    em_store_close(store);
  }
  em_pool_destroy(pool);
}

TEST(an_expert_that_fails_is_named_and_all_reads_have_ended) {
  const StoreFolder folder = make();
  Random random(53);
  em_pool *pool = em_pool_create(2);
  const Slots slots(kExperts, folder.max_record_bytes());
  std::string bytes = folder.experts_bytes();
  bytes[folder.records[3].offset + 5] ^= 8;
  write_file(folder.experts_path(), bytes);
  const Routes routes = make_routes(random, 2, {1, 2, 3, 5});
  const std::vector<float> x = random.floats(2 * kHidden);
  for (const bool is_absent : {false, true}) {
    em_store *store = open(folder);
    std::vector<const uint8_t *> data;
    for (const int32_t key : routes.keys) {
      void *dst = slots.at(key);
      data.push_back(slots.at(key));
      if (is_absent && key == 2) continue;
      CHECK_EQUAL(em_store_submit(store, 1, &key, &dst, 0), 0);
    }
    const Result result = run(pool, store, folder, routes, x, data);
    CHECK(result.status == EM_ERR_CRC || (is_absent && result.status == EM_ERR_ARG));
    CHECK(result.failed == 2 || (is_absent && result.failed == 1));
    for (const int32_t key : routes.keys) CHECK(em_store_status(store)[key] != EM_READING);
    em_store_close(store);
  }
  em_pool_destroy(pool);
}

TEST(impossible_layers_are_refused) {
  const StoreFolder folder = make();
  Random random(54);
  const std::vector<float> x = random.floats(kHidden);
  em_store *store = open(folder);
  Routes routes = make_routes(random, 1, {0, 1});
  const std::vector<const uint8_t *> data(2, folder.experts[0].record.data());
  for (const int32_t key : {-1, 8, INT32_MAX}) {
    routes.keys[1] = key;
    CHECK_EQUAL(run(nullptr, store, folder, routes, x, data).status, EM_ERR_ARG);
  }
  const Routes nothing = {1, {}, {0}, {}, {}};
  const Result result = run(nullptr, nullptr, folder, nothing, x, {});
  CHECK_EQUAL(result.status, 0);
  for (const float value : result.y) CHECK_EQUAL(value, 0.25f);
  em_store_close(store);
}
