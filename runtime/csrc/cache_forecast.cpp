// The default eviction policy. Twin of runtime/policy_forecast.py, which gives the reasons: the same
// float operations in the same order, so that both give the same bits (the core is compiled without
// contraction).
#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <utility>

#include "cache_policy.h"

namespace em {
namespace {

constexpr int kNumHalfLives = 4, kNumKinds = 2;  // of likeness
constexpr int kMemory = kNumHalfLives, kOne = kMemory + kNumKinds, kNumInputs = kOne + 1;
constexpr double kHalfLives[kNumHalfLives] = {1.0, 4.0, 16.0, 128.0};
constexpr float kRate = 0.1f, kDoubt = 0.2f;
constexpr double kKept = 0.8;
constexpr int64_t kWindow = 1024;  // tokens, a power of two
constexpr int64_t kBlock = 16, kNumBlocks = kWindow / kBlock;
constexpr int kMaxMatches = 16, kLevels = 64, kMinLevel = 24, kLanes = 8;
constexpr int64_t kAges = 8;  // tokens of a chunk that count for the likeness to its last one
constexpr int kNext = 0, kLater = 1, kFar = 2, kNumTimes = 3;
constexpr int kFirstAhead[kNumTimes + 1] = {1, 2, 5, 9};  // tokens behind a match

// Of what a token's predecessors shared, one turn further back.
constexpr double kKeptShared[kNumKinds] = {0.25, 0.75};

float log2_of(float x) {
  int32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return static_cast<float>(bits) * 0x1p-23f - 127.0f;
}

float exp2_of(float z) {
  z = (std::min(std::max(z, -30.0f), 30.0f) + 127.0f) * 0x1p23f;
  const int32_t bits = static_cast<int32_t>(z);
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

float probability(float z) {
  const float odds = exp2_of(z);
  return odds / (odds + 1.0f);
}

// By value of a byte: its bits as eight bytes, so that adding them counts eight tokens at once.
struct Spread {
  std::array<uint64_t, 256> of;
  Spread() {
    for (int value = 0; value < 256; ++value) {
      uint8_t bytes[8];
      for (int bit = 0; bit < 8; ++bit) bytes[bit] = static_cast<uint8_t>(value >> bit & 1);
      std::memcpy(&of[value], bytes, sizeof bytes);
    }
  }
};
const Spread kSpread;

struct Match {
  int64_t token;
  float weight;
};

// The routing of the last tokens, and how alike each of them is to the running one.
class Memory {
 public:
  explicit Memory(const Cycle &cycle) : places_(static_cast<size_t>(cycle.num_places())) {
    for (int64_t place = 0; place < cycle.num_places(); ++place) {
      Place &each = places_[place];
      const int64_t num_experts = cycle.first_key[place + 1] - cycle.first_key[place];
      each.num_picks.resize(static_cast<size_t>(kWindow));
      each.tokens.resize(static_cast<size_t>(num_experts * kWindow / 8));
      each.token_of.assign(static_cast<size_t>(kWindow), -1);
    }
    forget_likeness();
  }

  void begin_tokens(int64_t token, int64_t num_tokens) {  // those up to `token`
    for (int kind = 0; kind < kNumKinds; ++kind) {
      Likeness &of_kind = likeness_[kind];
      std::rotate(of_kind.begin(), of_kind.end() - num_tokens % kWindow, of_kind.end());
      const float left = left_after(kind, num_tokens);
      for (float &likeness : of_kind) likeness *= left;
      of_kind[token % kWindow] = 0.0f;
    }
  }

  void forget_likeness() {
    for (Likeness &of_kind : likeness_) of_kind.fill(0.0f);
  }

  // age: tokens between this one and the running one.
  void add(int64_t number, int64_t token, const int32_t *picks, int64_t n, int64_t age = 0) {
    Place &place = places_[number];
    const int64_t slot = token % kWindow;
    const uint8_t bit = static_cast<uint8_t>(1 << slot % 8);
    for (int32_t i = 0; i < place.num_picks[slot]; ++i) {
      const int64_t expert = place.picks[slot * place.width + i];
      place.tokens[expert * (kWindow / 8) + slot / 8] &= static_cast<uint8_t>(~bit);
    }
    for (int64_t begin = 0; begin < n && age < kAges; begin += 255) {  // a byte counts no further
      count_shared(place, picks + begin, std::min<int64_t>(n - begin, 255), age);
    }
    if (n > place.width) widen(place, n);
    for (int64_t i = 0; i < n; ++i) {
      place.picks[slot * place.width + i] = picks[i];
      place.tokens[picks[i] * (kWindow / 8) + slot / 8] |= bit;
    }
    place.num_picks[slot] = static_cast<int32_t>(n);
    place.token_of[slot] = token;
  }

  // Past tokens most like the running one, the newest first; returns their number.
  int matches(int64_t token, int kind, Match *found) const {
    const Likeness &of_kind = likeness_[kind];
    std::array<float, kNumBlocks> highest;
    for (int64_t block = 0; block < kNumBlocks; ++block) {
      const float *likeness = &of_kind[block * kBlock];
      float lanes[4] = {likeness[0], likeness[1], likeness[2], likeness[3]};
      for (int64_t i = 4; i < kBlock; i += 4) {
        for (int lane = 0; lane < 4; ++lane) {
          lanes[lane] = likeness[i + lane] > lanes[lane] ? likeness[i + lane] : lanes[lane];
        }
      }
      highest[block] = std::max(std::max(lanes[0], lanes[1]), std::max(lanes[2], lanes[3]));
    }
    const float best = *std::max_element(highest.begin(), highest.end());
    if (best <= 0.0f) return 0;
    const float scale = static_cast<float>(kLevels) / best;
    std::array<int16_t, kWindow> slots;
    std::array<int8_t, kWindow> levels;  // of those slots
    int num_slots = 0, counts[kLevels + 1] = {};
    for (int64_t block = 0; block < kNumBlocks; ++block) {  // few have one that is alike enough
      if (!(highest[block] * scale >= static_cast<float>(kMinLevel))) continue;
      for (int64_t slot = block * kBlock; slot < (block + 1) * kBlock; ++slot) {
        const int32_t level = static_cast<int32_t>(of_kind[slot] * scale);
        slots[num_slots] = static_cast<int16_t>(slot);
        levels[num_slots] = static_cast<int8_t>(level);
        ++counts[level];
        num_slots += level >= kMinLevel;
      }
    }
    int level = kLevels, num_above = 0;
    while (level > kMinLevel && num_above + counts[level] < kMaxMatches) num_above += counts[level--];
    int room = kMaxMatches - num_above, n = 0;
    const float scale_to_1 = 1.0f / best;
    const int64_t now = token % kWindow;
    const int num_older = static_cast<int>(
        std::lower_bound(slots.begin(), slots.begin() + num_slots, now) - slots.begin());
    for (int i = 0; i < num_slots; ++i) {
      const int number = i < num_older ? num_older - 1 - i : num_older - 1 - i + num_slots;
      const int64_t slot = slots[number];
      if (levels[number] < level || (levels[number] == level && room-- <= 0)) continue;
      float weight = of_kind[slot] * scale_to_1;
      weight *= weight;
      found[n++] = {token - 1 - (token - 1 - slot + kWindow) % kWindow, weight * weight * weight};
    }
    return n;
  }

  // Weights of the experts that were used after those, added to votes [kNumTimes, stride]; their
  // sums.
  std::array<float, kNumTimes> followers(int64_t number, int64_t token, const Match *found, int n,
                                         int64_t stride, float *votes) const {
    const Place &place = places_[number];
    std::array<float, kNumTimes> sums = {};
    for (int i = 0; i < n; ++i) {
      const float weight = found[i].weight;
      for (int time = 0; time < kNumTimes; ++time) {
        const int64_t last = std::min(found[i].token + kFirstAhead[time + 1] - 1, token);
        for (int64_t past = found[i].token + kFirstAhead[time]; past <= last; ++past) {
          const int64_t slot = past & (kWindow - 1);  // as past % kWindow: none is below 0
          if (past < 0 || place.token_of[slot] != past) continue;
          sums[time] += weight;
          const int32_t *row = &place.picks[slot * place.width];
          float *const of_time = votes + time * stride;
          for (int32_t pick = 0; pick < place.num_picks[slot]; ++pick) of_time[row[pick]] += weight;
        }
      }
    }
    return sums;
  }

 private:
  struct Place {
    int64_t width = 0;               // the most picks of a row so far
    std::vector<int32_t> picks;      // [kWindow, width]: experts of the token in each slot
    std::vector<int32_t> num_picks;  // by slot
    std::vector<uint8_t> tokens;     // [num_experts, kWindow / 8]: slots in which each was used
    std::vector<int64_t> token_of;   // by slot, -1: none
  };

  using Likeness = std::array<float, kWindow>;  // by slot: token modulo kWindow

  static float left_after(int kind, int64_t num_tokens) {
    return static_cast<float>(std::pow(kKeptShared[kind], static_cast<double>(num_tokens)));
  }

  static void widen(Place &place, int64_t width) {
    std::vector<int32_t> picks(static_cast<size_t>(kWindow * width));
    for (int64_t slot = 0; slot < kWindow; ++slot) {
      std::copy_n(place.picks.begin() + slot * place.width, place.num_picks[slot],
                  picks.begin() + slot * width);
    }
    place.picks = std::move(picks);
    place.width = width;
  }

  void count_shared(const Place &place, const int32_t *picks, int64_t n, int64_t age) {
    std::array<uint64_t, kWindow / 8> sums = {};
    for (int64_t i = 0; i < n; ++i) {
      const uint8_t *bits = &place.tokens[picks[i] * (kWindow / 8)];
      for (size_t byte = 0; byte < sums.size(); ++byte) sums[byte] += kSpread.of[bits[byte]];
    }
    std::array<uint8_t, kWindow> shared;
    std::memcpy(shared.data(), sums.data(), sizeof shared);
    if (age == 0) {
      for (size_t slot = 0; slot < shared.size(); ++slot) {
        const float count = static_cast<float>(shared[slot]);
        for (Likeness &of_kind : likeness_) of_kind[slot] += count;
      }
      return;
    }
    for (int kind = 0; kind < kNumKinds; ++kind) {
      const float left = left_after(kind, age);
      for (size_t slot = 0; slot < shared.size(); ++slot) {
        likeness_[kind][(slot + age) % kWindow] += static_cast<float>(shared[slot]) * left;
      }
    }
  }

  std::vector<Place> places_;
  std::array<Likeness, kNumKinds> likeness_;
};

class Forecast : public ByDistance {
 public:
  explicit Forecast(const Cycle &cycle)
      : ByDistance(cycle),
        memory_(cycle),
        places_(static_cast<size_t>(cycle.num_places())) {
    int64_t most = 0;
    for (int64_t place = 0; place < cycle.num_places(); ++place) {
      const int64_t n = cycle.first_key[place + 1] - cycle.first_key[place];
      Place &each = places_[place];
      each.stride = (n + kLanes - 1) / kLanes * kLanes;
      each.frequencies.resize(static_cast<size_t>(kNumHalfLives * n));
      each.inputs.resize(static_cast<size_t>(kNumInputs * each.stride));
      most = std::max(most, each.stride);
    }
    for (std::vector<float> *each : {&uses_, &z_, &errors_, &found_, &habits_}) {
      each->resize(static_cast<size_t>(most));
    }
    votes_.resize(static_cast<size_t>(kNumTimes * most));
    chances_.resize(static_cast<size_t>(kNumTimes * most));
    for (int i = 0; i < kNumHalfLives; ++i) {
      weights_[i] = 0.25f;
      decay_[i] = std::pow(base_, -1.0 / kHalfLives[i]);
    }
    guard_ = std::make_unique<Guard>(std::vector<int64_t>(value_.size(), 1), blocks_);
    for (int kind = 0; kind < kNumKinds; ++kind) weights_[kMemory + kind] = 0.25f;
    squares_.fill(1.0f);
  }

  bool forecasts() const override { return true; }

  double nearness(int64_t ahead) const override {
    return std::pow(kept_, static_cast<double>(ahead) / static_cast<double>(cycle_.num_places()));
  }

  void route(int64_t place, const int32_t *experts, int64_t num_tokens, int64_t top_k,
             int64_t step) override {
    const int32_t *const end = experts + num_tokens * top_k;
    if (std::all_of(experts, end, [](int32_t expert) { return expert < 0; })) return;
    begin(place, step, num_tokens);
    routed_place_ = place;
    routed_step_ = step;
    if (num_tokens != num_ages_) weigh_ages(num_tokens);
    Place &each = places_[place];
    const int64_t n = num_experts(place);
    for (int i = 0; i < kNumHalfLives; ++i) {
      const float left = static_cast<float>(std::pow(base_, -static_cast<double>(num_tokens) /
                                                                kHalfLives[i]));
      for (int64_t e = 0; e < n; ++e) each.frequencies[i * n + e] *= left;
      each.means[i] *= left;
    }
    float num_uses = 0.0f;
    for (int64_t token = 0; token < num_tokens; ++token) {
      picks_.clear();
      for (int64_t k = 0; k < top_k; ++k) {
        const int32_t expert = experts[token * top_k + k];
        const bool is_known = std::find(picks_.begin(), picks_.end(), expert) != picks_.end();
        if (expert >= 0 && !is_known) picks_.push_back(expert);
      }
      const float num_picks = static_cast<float>(picks_.size());
      num_uses += num_picks;
      for (int i = 0; i < kNumHalfLives; ++i) {
        const float weight = ages_[i * num_tokens + token];
        for (const int32_t pick : picks_) each.frequencies[i * n + pick] += weight;
        each.means[i] += num_picks / static_cast<float>(n) * weight;
      }
      const int64_t age = num_tokens - 1 - token;
      if (age >= kWindow || age > token_) continue;
      memory_.add(place, token_ - age, picks_.data(), static_cast<int64_t>(picks_.size()), age);
    }
    predict(place, num_uses / static_cast<float>(n) / static_cast<float>(num_tokens));
  }

  void touch(const int32_t *keys, int64_t n, const double *counts, int64_t step,
             int64_t num_tokens) override {
    Policy::touch(keys, n, counts, step, num_tokens);
    for (int64_t place = 0, left = n; left > 0; ++place) {
      if (left == n) place = std::max(place, lowest_place(keys, n));
      const int64_t first = cycle_.first_key[place], end = cycle_.first_key[place + 1];
      picks_.clear();
      for (int64_t i = 0; i < n; ++i) {
        if (keys[i] < first || keys[i] >= end) continue;
        if (picks_.empty()) std::fill_n(uses_.begin(), end - first, 0.0f);
        picks_.push_back(static_cast<int32_t>(keys[i] - first));
        uses_[picks_.back()] = counts == nullptr ? 1.0f : static_cast<float>(counts[i]);
      }
      if (picks_.empty()) continue;
      demand(place, counts == nullptr, step, num_tokens);
      left -= static_cast<int64_t>(picks_.size());
    }
  }

 private:
  struct Place {
    int64_t stride;  // experts, rounded up to kLanes; what is beyond them stays 0
    bool is_known = false;
    std::vector<float> frequencies;  // [kNumHalfLives, E]
    float means[kNumHalfLives] = {};
    std::vector<float> inputs;  // [kNumInputs, stride]
  };

  int64_t lowest_place(const int32_t *keys, int64_t n) const {
    const int32_t lowest = *std::min_element(keys, keys + n);
    const auto &first = cycle_.first_key;
    return std::upper_bound(first.begin(), first.end(), lowest) - first.begin() - 1;
  }

  int64_t num_experts(int64_t place) const {
    return cycle_.first_key[place + 1] - cycle_.first_key[place];
  }

  // picks_ and uses_ [E] are wanted.
  void demand(int64_t place, bool is_token, int64_t step, int64_t num_tokens) {
    const auto end = uses_.begin() + num_experts(place);
    if (std::all_of(uses_.begin(), end, [](float uses) { return uses == 0.0f; })) return;
    if (place == routed_place_ && step == routed_step_) return;
    const bool is_new = begin(place, step, 1);
    if (is_token && is_new) {
      if (places_[place].is_known) learn(place);
      memory_.add(place, token_, picks_.data(), static_cast<int64_t>(picks_.size()));
    } else if (!is_token) {
      memory_.forget_likeness();
    }
    const float prior = count(place, num_tokens, is_new);
    predict(place, prior, is_token || num_tokens > 1);
  }

  // A demand; false: the rest of one that came in parts, which adds to the first part.
  bool begin(int64_t place, int64_t step, int64_t num_tokens) {
    if (token_ < 0 || (place <= event_place_ && step != event_step_)) {
      token_ += num_tokens;
      memory_.begin_tokens(token_, num_tokens);
    }
    const bool is_new = place != event_place_ || step != event_step_;
    event_place_ = place;
    event_step_ = step;
    return is_new;
  }

  void weigh_ages(int64_t num_tokens) {
    num_ages_ = num_tokens;
    ages_.clear();
    for (const double half_life : kHalfLives) {
      for (int64_t age = num_tokens - 1; age >= 0; --age) {
        const double exponent = -static_cast<double>(age) / half_life;
        ages_.push_back(static_cast<float>(std::pow(base_, exponent)));
      }
    }
  }

  // Adds uses_ to the frequencies, spread evenly over the tokens; returns the mean use.
  float count(int64_t place, int64_t num_tokens, bool is_new) {
    const int64_t n = num_experts(place);
    Place &each = places_[place];
    float sum = 0.0f;
    for (int64_t e = 0; e < n; ++e) sum += uses_[e];
    const float mean = sum / static_cast<float>(n);
    for (int i = 0; i < kNumHalfLives; ++i) {
      float decay = static_cast<float>(decay_[i]), weight = 1.0f;
      if (num_tokens > 1) {
        const double num = static_cast<double>(num_tokens);
        const double left = std::pow(base_, -num / kHalfLives[i]);
        weight = static_cast<float>((1.0 - left) / (1.0 - decay_[i]) / num);
        decay = static_cast<float>(left);
      }
      if (!is_new) decay = 1.0f;
      float *frequency = &each.frequencies[i * n];
      for (int64_t e = 0; e < n; ++e) frequency[e] = frequency[e] * decay + uses_[e] * weight;
      each.means[i] = each.means[i] * decay + mean * weight;
    }
    return mean / static_cast<float>(num_tokens);
  }

  void predict(int64_t place, float prior, bool can_tell = true) {
    if (can_tell && !has_bias_) {
      has_bias_ = true;
      weights_[kOne] = log2_of(prior / std::max(1.0f - prior, 0x1p-10f));
    }
    const int64_t n = num_experts(place), first = cycle_.first_key[place];
    Place &each = places_[place];
    float *const inputs = each.inputs.data();
    if (!each.is_known) std::fill_n(inputs + kOne * each.stride, n, 1.0f);
    each.is_known = true;
    for (int i = 0; i < kNumHalfLives; ++i) {
      const float mean = log2_of(each.means[i] + prior);
      const float *frequency = &each.frequencies[i * n];
      float *input = inputs + i * each.stride;
      for (int64_t e = 0; e < n; ++e) input[e] = log2_of(frequency[e] + prior) - mean;
    }
    weigh(inputs, each.stride, n);
    const float *frequency = &each.frequencies[(kNumHalfLives - 1) * n];
    const float mean = each.means[kNumHalfLives - 1] + prior;
    for (int64_t e = 0; e < n; ++e) habits_[e] = (frequency[e] + prior) / mean * prior;
    for (int time = 0; time < kNumTimes; ++time) {
      std::copy_n(z_.begin(), n, chances_.begin() + time * each.stride);
    }
    for (int kind = 0; kind < kNumKinds; ++kind) {
      Match matches[kMaxMatches];
      const int num_matches = memory_.matches(token_, kind, matches);
      std::fill_n(votes_.begin(), kNumTimes * each.stride, 0.0f);
      const std::array<float, kNumTimes> sums =
          memory_.followers(place, token_, matches, num_matches, each.stride, votes_.data());
      const float weight = weights_[kMemory + kind];
      for (int time = 0; time < kNumTimes; ++time) {
        float *const found =
            time == kNext ? inputs + (kMemory + kind) * each.stride : found_.data();
        answer(&votes_[time * each.stride], sums[time], n, found);
        float *const z = &chances_[time * each.stride];
        for (int64_t e = 0; e < n; ++e) z[e] = z[e] + weight * found[e];
      }
    }
    for (float &chance : chances_) chance = probability(chance);
    const float *chances = chances_.data(), *later = chances + kLater * each.stride,
                *far = chances + kFar * each.stride;
    for (int64_t e = 0; e < n; ++e) value_[first + e] = worth(chances[e], later[e], far[e]);
    blocks_.change_place(place);
  }

  // What votes [E], which sum up to `total`, say beyond habits_.
  void answer(const float *votes, float total, int64_t n, float *found) const {
    if (!(total > 0.0f)) {
      std::fill_n(found, n, 0.0f);
      return;
    }
    const float doubt = total * kDoubt, sum = total + doubt;
    for (int64_t e = 0; e < n; ++e) {
      found[e] = log2_of((votes[e] + doubt * habits_[e]) / sum) - log2_of(habits_[e]);
    }
  }

  // z_ [E]: the weighted inputs, but for the memory's.
  void weigh(const float *inputs, int64_t stride, int64_t n) {
    for (int64_t e = 0; e < n; ++e) z_[e] = weights_[0] * inputs[e];
    for (int i = 1; i < kNumHalfLives; ++i) {
      const float *input = inputs + i * stride;
      for (int64_t e = 0; e < n; ++e) z_[e] = z_[e] + weights_[i] * input[e];
    }
    for (int64_t e = 0; e < n; ++e) z_[e] = z_[e] + weights_[kOne];
  }

  static float worth(float chance, float later, float far) {
    constexpr float kept = static_cast<float>(kKept);
    const float unused = kept * (1.0f - later);
    const float at_last = kept * far / (1.0f - kept * (1.0f - far));
    const float behind =
        kept * later * (1.0f + unused + unused * unused) + unused * unused * unused * at_last;
    return chance + (1.0f - chance) * behind;
  }

  // One AdaGrad step towards uses_ of what the inputs foretold.
  void learn(int64_t place) {
    const int64_t n = num_experts(place), stride = places_[place].stride;
    const float *inputs = places_[place].inputs.data();
    weigh(inputs, stride, n);
    for (int kind = 0; kind < kNumKinds; ++kind) {
      const float *memory = inputs + (kMemory + kind) * stride;
      for (int64_t e = 0; e < n; ++e) z_[e] = z_[e] + weights_[kMemory + kind] * memory[e];
    }
    std::fill_n(errors_.begin(), stride, 0.0f);
    for (int64_t e = 0; e < n; ++e) errors_[e] = probability(z_[e]) - uses_[e];
    for (int i = 0; i < kNumInputs; ++i) {
      const float *input = inputs + i * stride;
      float lanes[kLanes] = {};
      for (int64_t e = 0; e < stride; e += kLanes) {
        for (int lane = 0; lane < kLanes; ++lane) lanes[lane] += input[e + lane] * errors_[e + lane];
      }
      float gradient = lanes[0];
      for (int lane = 1; lane < kLanes; ++lane) gradient += lanes[lane];
      gradient = gradient / static_cast<float>(picks_.size());
      squares_[i] += gradient * gradient;
      weights_[i] -= kRate * gradient / std::sqrt(squares_[i]);
    }
  }

  const double base_ = 2.0, kept_ = kKept;
  Memory memory_;
  std::vector<Place> places_;
  std::array<double, kNumHalfLives> decay_ = {};  // of one token
  std::array<float, kNumInputs> weights_ = {}, squares_ = {};
  bool has_bias_ = false;
  int64_t token_ = -1, event_place_ = -1, event_step_ = -1;  // of the last demand
  int64_t routed_place_ = -1, routed_step_ = -1;  // of the last demand told token by token
  int64_t num_ages_ = 0;
  std::vector<float> ages_;  // weights [kNumHalfLives, num_ages_] of a chunk's tokens
  std::vector<int32_t> picks_;
  std::vector<float> uses_, z_, errors_, found_, habits_;
  std::vector<float> votes_, chances_;  // [kNumTimes, stride]
};

}  // namespace

std::unique_ptr<Policy> make_forecast(const Cycle &cycle) {
  return std::make_unique<Forecast>(cycle);
}

}  // namespace em
