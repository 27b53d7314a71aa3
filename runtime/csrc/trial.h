// Whether guesses make tokens faster, found out by trying: now and then a token goes without them, or,
// where they do not pay, with them, and is compared with its neighbours. Whatever guesses cost that no
// estimate knows of is in it.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>

#include "gate.h"

namespace em {

class Trial {
 public:
  // A token begins: whether it is to have guesses.
  bool begin() {
    ++num_tokens_;
    const int64_t period = num_compared_ < kFirst ? 2 : is_on_ ? kWithout : kWith;
    is_trial_ = num_tokens_ % period == 0;
    return is_on_ != is_trial_;
  }

  // It took so long, and so many guesses were read.
  void end(int64_t ns, int64_t num_guesses) {
    const double time = static_cast<double>(ns);
    if (!is_trial_) {
      usual_ns_ = usual_ns_ > 0.0 ? (usual_ns_ + time) / 2.0 : time;
      num_usual_guesses_ = num_guesses;
      return;
    }
    // Where none were read in either, the two do not differ.
    if (usual_ns_ <= 0.0 || num_guesses + num_usual_guesses_ == 0) return;
    const double saved = (is_on_ ? time - usual_ns_ : usual_ns_ - time) / usual_ns_;
    const double gain = std::clamp(saved, -kMostSaved, kMostSaved);
    gain_.add(gain);
    square_.add(gain * gain);
    if (++num_compared_ < kFirst) return;
    // Tokens differ by more than guesses save: what stays within the error of the mean decides nothing.
    const double variance = std::max(0.0, square_.value() - gain_.value() * gain_.value());
    const double error = std::sqrt(variance / static_cast<double>(gain_.num()));
    if (std::fabs(gain_.value()) > error) is_on_ = gain_.value() > 0.0;
  }

  double gain() const { return gain_.value(); }  // share of a token's time

 private:
  static constexpr int64_t kFirst = 16, kWithout = 8, kWith = 16;
  static constexpr double kMostSaved = 0.5;

  Mean gain_, square_;
  int64_t num_tokens_ = 0, num_compared_ = 0, num_usual_guesses_ = 0;
  double usual_ns_ = 0.0;
  bool is_on_ = true, is_trial_ = false;
};

}  // namespace em
