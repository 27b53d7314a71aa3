// Whether guesses make tokens faster, found out by trying: now and then a token goes without them, or,
// where they do not pay, with them, and is compared with its neighbours. Whatever guesses cost that no
// estimate knows of is in it.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>

#include "gate.h"

namespace em {

constexpr int64_t kLearningTokens = 64;  // in which odds become known

class Trial {
 public:
  // A token begins: whether it is to have guesses.
  bool begin() {
    if (++num_tokens_ <= kLearningTokens) return true;
    const int64_t period = num_compared_ < kFirst ? kEarly : is_on_ ? kWithout : kWith;
    is_trial_ = num_tokens_ % period == 0;
    return is_on_ != is_trial_;
  }

  // It took so long, so many guesses were read, and so many records were demanded that were not there
  // or had been guessed: most of what tokens differ by, so that it is taken out before they are
  // compared.
  void end(int64_t ns, int64_t num_guesses, int64_t num_absent) {
    const double absent = static_cast<double>(num_absent);
    time_.add(static_cast<double>(ns));
    absent_.add(absent);
    product_.add(absent * static_cast<double>(ns));
    absent_square_.add(absent * absent);
    const double spread = absent_square_.value() - absent_.value() * absent_.value();
    const double each =
        spread > 0.1 ? (product_.value() - absent_.value() * time_.value()) / spread : 0.0;
    const double time = static_cast<double>(ns) - each * (absent - absent_.value());
    if (!is_trial_) {
      usual_ns_ = usual_ns_ > 0.0 ? (usual_ns_ + time) / 2.0 : time;
      num_usual_guesses_ = num_guesses;
      return;
    }
    // Where none were read in either, the two do not differ.
    if (usual_ns_ <= 0.0 || num_guesses + num_usual_guesses_ == 0) return;
    const double saved = (is_on_ ? time - usual_ns_ : usual_ns_ - time) / time_.value();
    const double gain = std::clamp(saved, -kMostSaved, kMostSaved);
    gain_.add(gain);
    square_.add(gain * gain);
    if (++num_compared_ < kFirst) return;
    // Tokens differ by more than guesses save: what stays within the error of the mean decides nothing.
    // The gate expects a gain, so that doubt is in favour of guesses.
    const double variance = std::max(0.0, square_.value() - gain_.value() * gain_.value());
    const double error = std::sqrt(variance / static_cast<double>(gain_.num()));
    is_on_ = gain_.value() > -(is_on_ ? kErrorsToStop : kErrorsToGoOn) * error;
  }

  bool is_on() const { return is_on_; }
  double gain() const { return gain_.value(); }  // share of a token's time

 private:
  static constexpr int64_t kFirst = 16, kEarly = 4, kWithout = 12, kWith = 12;
  static constexpr double kMostSaved = 0.25;  // by one token, so that a late drive decides nothing
  static constexpr double kErrorsToStop = 2.5, kErrorsToGoOn = 1.0;

  Mean gain_, square_;
  Mean time_, absent_, product_, absent_square_;  // of all tokens, in ns
  int64_t num_tokens_ = 0, num_compared_ = 0, num_usual_guesses_ = 0;
  double usual_ns_ = 0.0;
  bool is_on_ = true, is_trial_ = false;
};

// Whether guesses for a place promise more than finding them takes. Whoever asks predicts it now and
// then all the same, to learn whether they do again.
class Payoff {
 public:
  bool is_paying() const { return promised_.value() > kMargin * (taken_.value() + kOtherNs); }
  // It was predicted: what the guesses that were read promised, and what predicting took, in ns.
  void add(double promised_ns, double taken_ns) {
    promised_.add(promised_ns);
    taken_.add(taken_ns);
  }

 private:
  static constexpr double kMargin = 1.2;   // promises are estimates, and what they cost is certain
  static constexpr double kOtherNs = 7e2;  // to keep account of a layer, beside predicting it

  Mean promised_, taken_;
};

}  // namespace em
