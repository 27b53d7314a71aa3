// Guesses: lists of the records that the next MoE layers may want, and reading them one by one while
// storage would idle. Predictions come from a predictor, permission from the gate, memory from the
// cache. Used by the thread that runs em_decode, between two pieces of work.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

#include "edgemoe_core.h"
#include "gate.h"
#include "shift.h"
#include "store.h"
#include "trial.h"

namespace em {

class Cache;
class Decoder;

class Prefetcher {
 public:
  explicit Prefetcher(const em_prefetch_options &options);

  // Whether the tables and lists go with the layers of the decoder; sizes itself at the first call.
  bool bind(const Decoder &decoder);
  // Around every token; `guesses` are those of em_decode_args. The cache stays until end_token.
  void begin_token(Cache *cache, Decoder *decoder, const em_decode_args &args);
  void end_token(bool is_whole);

  // Whether the calls below are to be made for this token.
  bool has_layers() const {
    return has_guesses_ || options_.predictor == EM_PREDICT_PREVIOUS;
  }

  // The router of the place has spoken, and nothing is demanded yet: scores what was predicted, and
  // drops what was wrong.
  void spoken(const Decoder &decoder, int64_t place, const int32_t *ids, const float *weights,
              int64_t num_ids);
  // Demand is on its way: make the lists of the next layers. x [D] is the residual before the MoE.
  int32_t predict(Decoder *decoder, int64_t place, const float *x);
  // The layer has waited for a record of its own, until now.
  void waited(int64_t now) { waited_ns_ = now; }
  // The layer is done.
  void finish(int64_t num_misses, int64_t stall_ns);
  // Read on, and guesses as long as storage would idle and the gate lets them. Cheap where nothing has
  // landed and there is no guess.
  void step() {
    if (cache_ == nullptr) return;
    pump(store_);
    if (has_candidates_ && !is_full_) read_next();
  }

  const em_prefetch_stats &stats() const { return stats_; }

 private:
  struct Candidate {
    int32_t key;
    int32_t grade;  // what its odds are counted by
  };
  struct List {  // for one place, made `depth` layers before it
    bool is_made = false, is_open = false;  // open: something of it was read
    std::size_t next = 0;      // candidates before it were tried
    double promised_ns = 0.0;  // by those read
    int64_t taken_ns = 0;      // by making it
    std::vector<Candidate> candidates;

    void reset() {
      is_made = is_open = false;
      next = 0;
      promised_ns = 0.0;
      taken_ns = 0;
      candidates.clear();
    }
  };
  struct Place {
    int64_t first_key, num_experts, layer;
  };

  int64_t num_places() const { return static_cast<int64_t>(places_.size()); }
  Shift &shift(int depth, int64_t place) { return shifts_[(depth - 1) * places_.size() + place]; }
  List &list(int depth, int64_t place) { return lists_[(depth - 1) * places_.size() + place]; }
  Payoff &payoff(int depth, int64_t place) {
    return payoffs_[(depth - 1) * places_.size() + place];
  }
  // Whether ranked_ goes by scores_.
  bool has_scores() const {
    return options_.predictor == EM_PREDICT_PROFILE || options_.predictor == EM_PREDICT_ROUTER;
  }
  int32_t grade_of(int64_t rank, int64_t num) const;
  bool is_router() const { return options_.predictor == EM_PREDICT_ROUTER; }
  void remember(int64_t place, const int32_t *ids, const float *weights, int64_t num_ids);
  bool has_absent(const Decoder &decoder, int64_t place) const;
  int32_t predict_place(Decoder *decoder, int64_t place, int depth, const float *x);
  int64_t rank_experts(Decoder *decoder, int64_t place, int depth, const float *x, int32_t *status);
  int64_t num_absent() const;
  void learn(bool is_whole);
  bool is_waiting() const;
  void read_next();
  bool read_one(int depth, int64_t place, int64_t now, const Load &load);
  double window_ns(int depth, int64_t now, const Load &load) const;
  bool may_waste() const;
  bool is_predicted(int depth, int64_t place) const {
    return is_probe_ || !is_only_learning(depth, place);
  }
  // Until they are, promises mean nothing.
  bool are_odds_known() const { return num_tokens_ > kLearningTokens / 2; }
  // Of a place that is predicted: to learn whether its guesses would pay, which needs no reading.
  bool is_only_learning(int depth, int64_t place) const {
    return !options_.is_forced && !payoffs_[(depth - 1) * places_.size() + place].is_paying();
  }

  em_prefetch_options options_;
  std::vector<em_place_tables> tables_;
  std::vector<Place> places_;
  std::vector<Gate> gate_;  // one, once bound
  std::vector<List> lists_;
  std::vector<int32_t> previous_;  // [places][K] of the last token, most weight first, then -1
  std::vector<Shift> shifts_;  // as lists_, for looking ahead
  std::vector<float> weights_;      // of chosen_[0]
  std::vector<int32_t> chosen_[2];  // of the last place that has spoken, and of the one before it
  std::vector<int32_t> wanted_;
  std::vector<float> scores_;
  std::vector<int32_t> ranked_;
  int64_t num_ranks_ = 0, top_k_ = 0;
  uint64_t bound_ = 0;  // identity of the decoder

  Cache *cache_ = nullptr;  // during a token
  em_store *store_ = nullptr;
  const int32_t *guesses_ = nullptr;
  int64_t num_guesses_ = 0, token_id_ = 0;
  int64_t place_ = -1, spoken_ns_ = 0;  // of the last router
  int64_t waited_ns_ = 0;               // when its layer waited last; 0: it did not
  int64_t num_absent_ = 0;              // as num_absent, when the token began
  bool has_absent_ = false;             // in the layer that is running
  int64_t num_tokens_ = 0;
  int64_t busy_bytes_ = 0, busy_ns_ = 0;
  int64_t begin_ns_ = 0, decoded_bytes_ = 0;  // decoded: read while decoding, since creation
  em_store_stats reads_ = {};                 // when the token began, as counts_
  em_prefetch_stats counts_ = {};
  Trial trial_;
  std::vector<Payoff> payoffs_;  // as lists_
  bool has_guesses_ = false;     // this token may
  bool is_watched_ = false;      // this token tells something of guesses
  bool is_probe_ = false;        // its layers are predicted whether it pays or not
  bool has_candidates_ = false, is_full_ = false;  // full: the cache has no room for a guess
  em_prefetch_stats stats_ = {};
};

}  // namespace em

struct em_prefetch : em::Prefetcher {
  using em::Prefetcher::Prefetcher;
};
