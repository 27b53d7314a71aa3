#include "prefetch.h"

#include <algorithm>
#include <memory>

#include "cache.h"
#include "decoder.h"
#include "platform.h"
#include "predict.h"
#include "store.h"

namespace em {
namespace {

constexpr int64_t kMaxBacklogGuesses = 2;  // records: the one being read and the one behind it
// Of all bytes read while decoding, those of guesses that nobody wanted: no more than so.
constexpr double kMaxWastedShare = 0.3;
// Tokens, one of which is predicted whether it pays or not; prime, so that few are a trial's without guesses.
constexpr int64_t kProbe = 61;
constexpr int64_t kEnoughBytes = int64_t{1} << 20;
constexpr int64_t kFreeWaste = int64_t{16} << 20;  // that a start may cost

}  // namespace

Prefetcher::Prefetcher(const em_prefetch_options &options) : options_(options) {
  if (options.tables != nullptr) {
    tables_.assign(options.tables, options.tables + options.num_places);
  }
}

bool Prefetcher::bind(const Decoder &decoder) {
  if (decoder.identity() == bound_) return true;
  const auto is_changed = [&decoder](const Place &each) {
    return each.num_experts != decoder.routing_of(each.layer).num_bodies();
  };
  if (places_.empty() || std::any_of(places_.begin(), places_.end(), is_changed)) {
    places_.clear();
    for (int64_t number = 0; number < decoder.model().num_layers; ++number) {
      const em_block &layer = decoder.layer(number);
      if (layer.router.rows != 0) {
        const int64_t num_bodies = decoder.routing_of(number).num_bodies();
        places_.push_back({layer.first_key, num_bodies, number});
        scores_.resize(std::max(scores_.size(), static_cast<size_t>(num_bodies)));
      }
    }
    top_k_ = decoder.model().top_k;
    num_ranks_ = 2 * top_k_;
    ranked_.resize(static_cast<size_t>(num_ranks_));
    lists_.assign(places_.size() * kMaxDepth, List());
    payoffs_.assign(places_.size() * options_.depth, Payoff());
    shifts_.clear();
    for (int depth = 1; is_router() && depth <= options_.depth; ++depth) {
      for (int64_t place = 0; place < num_places(); ++place) {
        const Place &from = places_[std::max<int64_t>(0, place - depth)];
        shifts_.emplace_back(from.num_experts, places_[place].num_experts);
      }
    }
    previous_.assign(places_.size() * static_cast<size_t>(top_k_), -1);
    gate_.assign(1, Gate(static_cast<int64_t>(places_.size()), has_scores() ? kNumMargins : num_ranks_));
  }
  const bool has_tables = options_.predictor != EM_PREDICT_PROFILE ||
                          tables_.size() == places_.size();
  const bool is_good = !places_.empty() && has_tables && top_k_ == decoder.model().top_k;
  if (is_good) bound_ = decoder.identity();
  return is_good;
}

void Prefetcher::begin_token(Cache *cache, Decoder *decoder, const em_decode_args &args) {
  cache_ = cache;
  store_ = cache->store();
  guesses_ = options_.predictor == EM_PREDICT_GIVEN ? args.guesses : nullptr;
  num_guesses_ = args.num_guesses;
  token_id_ = args.token_id;
  ++num_tokens_;
  counts_ = cache->guess_counts();
  is_probe_ = num_tokens_ <= kLearningTokens || num_tokens_ % kProbe == 0 || !trial_.is_on();
  const auto pays = [](const Payoff &each) { return each.is_paying(); };
  is_watched_ = is_probe_ || options_.is_forced || std::any_of(payoffs_.begin(), payoffs_.end(), pays);
  has_guesses_ = is_watched_ && (trial_.begin() || options_.is_forced);
  if (!is_watched_) return;
  em_store_get_stats(store_, &reads_);
  begin_ns_ = monotonic_ns();
  num_absent_ = num_absent();
  waited_ns_ = 0;
  has_absent_ = false;
  set_guess_bytes(store_, gate_[0].request_bytes());
  // Before the first router, of those predictors that need no residual.
  place_ = -1;
  spoken_ns_ = begin_ns_;
  if (!is_router()) predict(decoder, place_, nullptr);
}

// Records that were demanded so far when they were absent, or a guess.
int64_t Prefetcher::num_absent() const {
  int64_t num = 0;
  for (int64_t place = 0; place < num_places(); ++place) {
    const em_place_stats &each = cache_->stats_of(place);
    num += each.num_misses + each.num_guessed;
  }
  return num;
}

void Prefetcher::end_token(bool is_whole) {
  if (!is_whole) cache_->drop_all_guesses();
  if (is_watched_) learn(is_whole);
  const em_prefetch_stats &now = cache_->guess_counts();
  stats_.num_guesses += now.num_guesses - counts_.num_guesses;
  stats_.guess_bytes += now.guess_bytes - counts_.guess_bytes;
  stats_.num_in_time += now.num_in_time - counts_.num_in_time;
  stats_.num_late += now.num_late - counts_.num_late;
  stats_.num_dropped += now.num_dropped - counts_.num_dropped;
  stats_.num_failed += now.num_failed - counts_.num_failed;
  stats_.wasted_bytes += now.wasted_bytes - counts_.wasted_bytes;
  has_candidates_ = false;
  cache_ = nullptr;
}

// What the token that ends tells of the drive, and of whether guesses pay.
void Prefetcher::learn(bool is_whole) {
  em_store_stats reads;
  em_store_get_stats(store_, &reads);
  const int64_t num_bytes = reads.num_bytes - reads_.num_bytes;
  busy_bytes_ += num_bytes;
  busy_ns_ += monotonic_ns() - begin_ns_ - (reads.idle_ns - reads_.idle_ns);
  if (busy_bytes_ >= kEnoughBytes) {  // to tell how fast the drive is
    gate_[0].saw_reading(busy_bytes_, busy_ns_);
    busy_bytes_ = busy_ns_ = 0;
  }
  decoded_bytes_ += num_bytes;
  const int64_t num_guesses = cache_->guess_counts().num_guesses - counts_.num_guesses;
  if (is_whole) trial_.end(monotonic_ns() - begin_ns_, num_guesses, num_absent() - num_absent_);
  stats_.wasted_bytes += reads.cancelled_bytes - reads_.cancelled_bytes;
}

void Prefetcher::spoken(const Decoder &decoder, int64_t place, const int32_t *ids,
                        const float *weights, int64_t num_ids) {
  const int32_t first = static_cast<int32_t>(places_[place].first_key);
  if (options_.predictor == EM_PREDICT_PREVIOUS) remember(place, ids, weights, num_ids);
  if (!has_guesses_) return;
  const int64_t now = monotonic_ns();
  if (place_ == place - 1) {
    const bool has_waited = waited_ns_ > 0;
    gate_[0].saw_interval(place, now - (has_waited ? waited_ns_ : spoken_ns_), has_waited);
  }
  place_ = place;
  spoken_ns_ = now;
  waited_ns_ = 0;
  const auto is_chosen = [&](int32_t key) {
    return std::find(ids, ids + num_ids, key - first) != ids + num_ids;
  };
  bool is_wrong = false;
  for (int depth = 1; depth <= options_.depth; ++depth) {
    List &made = list(depth, place);
    if (!made.is_made) continue;
    is_wrong = is_wrong || (!made.candidates.empty() && !is_chosen(made.candidates[0].key));
    const int64_t before = monotonic_ns();
    if (is_router() && decoder.router_shares() != nullptr) {
      shift(depth, place).learn(decoder.router_shares());
    }
    for (const Candidate &each : made.candidates) {
      gate_[0].score(depth, place, each.grade, is_chosen(each.key));
    }
    made.taken_ns += monotonic_ns() - before;
    if (are_odds_known()) {
      payoff(depth, place).add(made.promised_ns, static_cast<double>(made.taken_ns));
    }
    made.reset();
  }
  wanted_.clear();
  has_absent_ = false;
  for (int64_t k = 0; k < num_ids; ++k) {
    const int32_t key = first + ids[k];
    wanted_.push_back(key);
    if (!cache_->is_absent(key) && !cache_->is_guess(key)) continue;
    has_absent_ = has_absent_ || status_of(store_, key) != EM_READY;
  }
  if (is_wrong) gate_[0].saw_wrong(has_absent_);
  const int32_t end = first + static_cast<int32_t>(places_[place].num_experts);
  cache_->drop_guesses(first, end, wanted_.data(), num_ids);
  chosen_[1].swap(chosen_[0]);
  chosen_[0].assign(ids, ids + num_ids);
  weights_.assign(weights, weights + num_ids);
}

// The experts of a place for the next token, most weight first.
void Prefetcher::remember(int64_t place, const int32_t *ids, const float *weights,
                          int64_t num_ids) {
  int32_t *row = previous_.data() + place * top_k_;
  rank_largest(weights, num_ids, num_ids, row);
  for (int64_t k = 0; k < num_ids; ++k) row[k] = ids[row[k]];
  std::fill(row + num_ids, row + top_k_, -1);
}

bool Prefetcher::has_absent(const Decoder &decoder, int64_t place) const {
  const Place &at = places_[place];
  for (int64_t e = 0; e < at.num_experts; ++e) {
    if (cache_->is_absent(static_cast<int32_t>(at.first_key + e)) &&
        decoder.routing_of(at.layer).may_choose(e)) {
      return true;
    }
  }
  return false;
}

int32_t Prefetcher::predict(Decoder *decoder, int64_t place, const float *x) {
  has_candidates_ = false;
  if (!has_guesses_) return 0;
  for (int depth = 1; depth <= options_.depth; ++depth) {
    if (place + depth >= num_places()) break;
    if (!is_predicted(depth, place + depth)) continue;
    const int32_t status = predict_place(decoder, place + depth, depth, x);
    if (status != 0) return status;
  }
  step();
  return 0;
}

int32_t Prefetcher::predict_place(Decoder *decoder, int64_t place, int depth, const float *x) {
  List &made = list(depth, place);
  made.reset();
  if (decoder->is_foreseen(places_[place].layer)) return 0;
  const int64_t begin = monotonic_ns();
  if (!has_absent(*decoder, place)) {
    if (are_odds_known()) payoff(depth, place).add(0.0, static_cast<double>(monotonic_ns() - begin));
    return 0;
  }
  int32_t status = 0;
  const int64_t num = rank_experts(decoder, place, depth, x, &status);
  if (status != 0) return status;
  for (int64_t rank = 0; rank < num; ++rank) {
    if (ranked_[rank] < 0 || ranked_[rank] >= places_[place].num_experts) continue;  // none, or given
    if (!decoder->routing_of(places_[place].layer).may_choose(ranked_[rank])) continue;
    const int32_t key = static_cast<int32_t>(places_[place].first_key) + ranked_[rank];
    if (cache_->is_absent(key)) made.candidates.push_back({key, grade_of(rank, num)});
  }
  made.is_made = true;
  made.taken_ns = has_absent_ ? 0 : monotonic_ns() - begin;  // while demands are read it takes no time
  if (made.candidates.empty()) return 0;
  has_candidates_ = true;
  if (depth == 1) ++stats_.num_layers;
  return 0;
}

// Of ranked_[rank] of `num`: how sure it is, where scores say so, or else its rank. All are chosen
// where there are no more of them.
int32_t Prefetcher::grade_of(int64_t rank, int64_t num) const {
  if (!has_scores()) return static_cast<int32_t>(num_ranks_ - 1 - rank);
  if (num <= top_k_) return kNumMargins - 1;
  return margin_of(scores_[ranked_[rank]], scores_[ranked_[top_k_ - 1]], scores_[ranked_[top_k_]]);
}

// Fills ranked_ with expert ids, the likeliest first; returns their number.
int64_t Prefetcher::rank_experts(Decoder *decoder, int64_t place, int depth, const float *x,
                                 int32_t *status) {
  const Place &at = places_[place];
  const int64_t num = std::min(num_ranks_, at.num_experts);
  switch (options_.predictor) {
    case EM_PREDICT_GIVEN:
      if (guesses_ == nullptr) return 0;
      std::copy_n(guesses_ + place * num_guesses_, std::min(num, num_guesses_), ranked_.data());
      return std::min(num, num_guesses_);
    case EM_PREDICT_PREVIOUS:
      if (num_tokens_ < 2) return 0;
      std::copy_n(previous_.data() + place * top_k_, top_k_, ranked_.data());
      return top_k_;
    case EM_PREDICT_PROFILE:
      if (depth == 1) {
        profile_scores(tables_[place], options_.back_off, at.num_experts, chosen_[1].data(),
                       static_cast<int64_t>(chosen_[1].size()), chosen_[0].data(),
                       static_cast<int64_t>(chosen_[0].size()), token_id_, scores_.data());
      } else {  // the layer between has not spoken
        profile_scores(tables_[place], options_.back_off, at.num_experts, nullptr, 0, nullptr, 0,
                       token_id_, scores_.data());
      }
      break;
    default:
      *status = decoder->look_ahead(at.layer, x, scores_.data());
      if (*status != 0) return 0;
      if (decoder->router_shares() != nullptr) {
        shift(depth, place).apply(chosen_[0].data(), weights_.data(),
                                  static_cast<int64_t>(chosen_[0].size()), scores_.data());
      }
  }
  for (int64_t e = 0; e < at.num_experts; ++e) {
    if (!decoder->routing_of(at.layer).may_choose(e)) scores_[e] = 0.0f;
  }
  rank_largest(scores_.data(), at.num_experts, num, ranked_.data());
  int64_t num_likely = num;
  while (num_likely > 0 && scores_[ranked_[num_likely - 1]] == 0.0f) --num_likely;  // never chosen
  return num_likely;
}

void Prefetcher::finish(int64_t num_misses, int64_t stall_ns) {
  is_full_ = false;  // what the layer held may go now
  if (has_guesses_) gate_[0].saw_layer(num_misses, stall_ns);
}

bool Prefetcher::may_waste() const {
  return stats_.wasted_bytes < kFreeWaste ||
         static_cast<double>(stats_.wasted_bytes) <
             kMaxWastedShare * static_cast<double>(decoded_bytes_);
}

// Whether the layer that is running still lacks a record.
bool Prefetcher::is_waiting() const {
  if (!has_absent_) return false;
  const auto is_reading = [this](int32_t key) { return status_of(store_, key) == EM_READING; };
  return std::any_of(wanted_.begin(), wanted_.end(), is_reading);
}

// Not behind demands under way: a drive may tell of its requests all together, when none is left.
void Prefetcher::read_next() {
  if (is_waiting()) return;
  // A guess would have to wait for what others do beside their arithmetic.
  if (cache_->has_lesson()) return;
  for (;;) {
    bool has_read = false, is_left = false;
    const Load load = load_of(store_);
    if (load.waiting_bytes > 0 || cache_->num_reading_guesses() >= kMaxBacklogGuesses) return;
    const int64_t now = monotonic_ns();
    for (int depth = 1; depth <= options_.depth && !has_read; ++depth) {
      const int64_t place = place_ + depth;
      if (place >= num_places()) break;
      List &made = list(depth, place);
      if (!made.is_made) continue;
      has_read = read_one(depth, place, now, load);
      is_left = is_left || made.next < made.candidates.size();
      if (is_full_) return;
    }
    if (!has_read) {
      has_candidates_ = is_left;
      return;
    }
  }
}

// Until the router `depth` layers ahead speaks, as far as it is known. A layer that waits for records
// goes on when they are there.
double Prefetcher::window_ns(int depth, int64_t now, const Load &load) const {
  const Gate &gate = gate_[0];
  double window;
  if (!has_absent_) {
    window = gate.interval_ns(place_ + 1) - static_cast<double>(now - spoken_ns_);
  } else if (waited_ns_ == 0) {
    window = gate.read_ns(static_cast<double>(load.backlog_bytes)) + gate.tail_ns(place_ + 1);
  } else {
    window = gate.tail_ns(place_ + 1) - static_cast<double>(now - waited_ns_);
  }
  for (int ahead = 2; ahead <= depth; ++ahead) window += gate.interval_ns(place_ + ahead);
  return window;
}

// The next candidate of a list that is worth it; false where there is none now.
bool Prefetcher::read_one(int depth, int64_t place, int64_t now, const Load &load) {
  List &made = list(depth, place);
  Gate &gate = gate_[0];
  const double window = window_ns(depth, now, load);
  for (; made.next < made.candidates.size(); ++made.next) {
    const Candidate &each = made.candidates[made.next];
    if (!cache_->is_absent(each.key)) continue;  // guessed meanwhile for another reason
    double worth_ns = 0.0;
    if (!options_.is_forced) {
      const double odds = gate.odds(depth, place, each.grade);
      const double backlog = static_cast<double>(load.backlog_bytes);
      const double num_bytes = static_cast<double>(records_of(store_)[each.key].num_bytes);
      worth_ns = gate.worth_ns(odds, num_bytes, backlog, window);
      if (!may_waste() || worth_ns <= 0.0) {
        made.next = made.candidates.size();  // the others are less likely, and time runs out
        return false;
      }
    }
    if (is_only_learning(depth, place)) {
      made.promised_ns = worth_ns;
      made.next = made.candidates.size();
      return false;
    }
    const int64_t before = monotonic_ns();
    if (!cache_->guess(each.key)) {
      is_full_ = true;
      return false;
    }
    gate.saw_asking(monotonic_ns() - before);
    ++made.next;
    if (!made.is_open && depth == 1) ++stats_.num_open;
    made.is_open = true;
    made.promised_ns += worth_ns;
    return true;
  }
  return false;
}

}  // namespace em

em_prefetch *em_prefetch_create(const em_prefetch_options *options) {
  if (options == nullptr || options->predictor < EM_PREDICT_PREVIOUS ||
      options->predictor > EM_PREDICT_GIVEN || options->depth < 1 ||
      options->depth > em::kMaxDepth || options->num_places < 0 ||
      (options->predictor == EM_PREDICT_PROFILE) != (options->tables != nullptr)) {
    return nullptr;
  }
  try {
    return new em_prefetch(*options);
  } catch (...) {
    return nullptr;
  }
}

void em_prefetch_destroy(em_prefetch *prefetch) { delete prefetch; }

void em_prefetch_get_stats(const em_prefetch *prefetch, em_prefetch_stats *stats) {
  *stats = prefetch->stats();
}
