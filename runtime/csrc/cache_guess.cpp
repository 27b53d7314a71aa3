// Guesses in the expert cache: records that somebody expects to be demanded soon.
//
// From `guess` until the router of its place has spoken a guess is held as if pinned, but its
// memory goes to a demand that has no other room. Afterwards it is a record like any other, which
// is remembered as unused until it is demanded or evicted.
#include <algorithm>

#include "cache.h"
#include "platform.h"
#include "store.h"

namespace em {
namespace {

constexpr int kMaxVictims = 4;  // that one guess may cost, where records differ in size

}  // namespace

bool Cache::guess(int32_t key) {
  if (!is_absent(key) || !start_guess(key, Guess::kHeld)) return false;
  ++guess_counts_.num_guesses;
  guess_counts_.guess_bytes += slots_.num_bytes_of(key);
  return true;
}

// Of an absent record; false where there is no room.
bool Cache::start_guess(int32_t key, Guess kind) {
  if (has_lesson()) {
    const Deciding deciding(*this);
    learn();
  }
  if (!unsettled_.empty()) settle(false);
  for (int turn = 0; !slots_.place(key); ++turn) {
    const int32_t victim = turn < kMaxVictims ? victims_.next(place_, num_tokens_) : -1;
    if (victim < 0) return false;
    if (slots_.num_bytes_of(victim) == slots_.num_bytes_of(key)) {
      slots_.take_over(victim, key);
      forget(victim);
      break;
    }
    evict(victim);
  }
  void *const dst = reinterpret_cast<void *>(slots_.address(key));
  const int64_t before = monotonic_ns();
  const int32_t status = em_store_submit(store_, 1, &key, &dst, 1);
  submit_ns_ += monotonic_ns() - before;
  if (status != 0) {
    drop(key);
    return false;
  }
  policy_->insert(key);
  guesses_.push_back(key);
  guess_of_[key] = kind;
  return true;
}

int64_t Cache::foresee(int64_t n, const int32_t *keys, int64_t most_bytes) {
  if (n == 0) drop_all_guesses();
  int64_t num_bytes = n > 0 ? foreseen_bytes() : 0;
  for (int64_t i = 0; i < n; ++i) {
    const int32_t key = keys[i];
    const bool is_gone = is_absent(key);
    if (!is_gone && blocked_[key]) continue;  // held already
    num_bytes += slots_.num_bytes_of(key);
    if (num_bytes > most_bytes) return i;
    if (!is_gone) {
      block(key);
      foreseen_.push_back(key);
    } else if (start_guess(key, Guess::kForeseen)) {
      ++num_foreseen_;
    } else {
      return i;
    }
  }
  return n;
}

int64_t Cache::foreseen_bytes() const {
  int64_t sum = 0;
  for (const int32_t key : foreseen_) sum += slots_.num_bytes_of(key);
  for (const int32_t key : guesses_) {
    if (guess_of_[key] == Guess::kForeseen) sum += slots_.num_bytes_of(key);
  }
  return sum;
}

int64_t Cache::num_reading_guesses() const {
  return std::count_if(guesses_.begin(), guesses_.end(),
                       [this](int32_t key) { return status_of(store_, key) == EM_READING; });
}

void Cache::drop_guesses(int32_t first, int32_t end, const int32_t *wanted, int64_t num_wanted) {
  size_t num_left = 0;
  for (const int32_t key : guesses_) {
    const bool stays =
        key < first || key >= end || std::find(wanted, wanted + num_wanted, key) != wanted + num_wanted;
    if (stays) {
      guesses_[num_left++] = key;
    } else {
      let_go(key);
    }
  }
  guesses_.resize(num_left);
}

void Cache::drop_all_guesses() {
  drop_guesses(0, static_cast<int32_t>(num_keys()), nullptr, 0);
  unblock_all(foreseen_);
}

void Cache::drop_uncertain_guesses() {
  std::vector<int32_t> certain;
  for (const int32_t key : guesses_) {
    if (guess_of_[key] == Guess::kForeseen) certain.push_back(key);
  }
  drop_guesses(0, static_cast<int32_t>(num_keys()), certain.data(),
               static_cast<int64_t>(certain.size()));
}

// Of a held guess that nobody wants.
void Cache::let_go(int32_t key) {
  if (status_of(store_, key) == EM_READING) em_store_cancel(store_, 1, &key);
  guess_of_[key] = guess_of_[key] == Guess::kForeseen ? Guess::kNone : Guess::kUnused;
  add_unsettled(key);  // which takes its memory back, or leaves it to the policy
}

// The record loses its memory, or its read has failed, before it was demanded.
void Cache::count_lost_guess(int32_t key) {
  const int32_t status = status_of(store_, key);
  if (guess_of_[key] == Guess::kForeseen) {  // read again, by the demand that tells of a failure
  } else if (status == EM_READY) {
    guess_counts_.wasted_bytes += slots_.num_bytes_of(key);
  } else if (status < 0) {
    ++guess_counts_.num_failed;
  } else {
    ++guess_counts_.num_dropped;
  }
  guess_of_[key] = Guess::kNone;
}

// Demand for what was guessed: true where its read is a demand's now, or has ended well.
bool Cache::take_guess(int32_t key) {
  if (is_unsettled_[key] && status_of(store_, key) == EM_READING) {
    em_store_wait(store_, key);  // it was cancelled: what is under way of it ends first
    settle(false);
  }
  guesses_.erase(std::remove(guesses_.begin(), guesses_.end(), key), guesses_.end());
  if (is_absent(key)) return false;  // counted as lost by then
  const int32_t status = status_of(store_, key);
  if (status != EM_READY && status != EM_READING) {
    drop(key);
    policy_->remove(key);
    return false;
  }
  if (guess_of_[key] == Guess::kForeseen) {
    num_foreseen_in_time_ += status == EM_READY;
  } else {
    ++(status == EM_READY ? guess_counts_.num_in_time : guess_counts_.num_late);
  }
  guess_of_[key] = Guess::kNone;
  if (status == EM_READING) {
    const int64_t before = monotonic_ns();
    em_store_promote(store_, 1, &key, 0);  // which hands its requests over
    submit_ns_ += monotonic_ns() - before;
    taken_.push_back(key);
  }
  add_unsettled(key);  // should it not be pinned after all
  return true;
}

}  // namespace em
