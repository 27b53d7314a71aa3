// The expert cache: which records are in memory, and where. Twin of runtime/cache.py.
//
// A record is absent, being read, or resident. `hint` takes the records that the router has just
// demanded: it counts hits and misses, pins the records, makes room and starts the reads; `release`
// unpins them. A pinned record or one being read is never evicted or moved, so an address is good
// from hint to release. Serves one thread at a time.
#pragma once
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "cache_policy.h"
#include "cache_victims.h"
#include "edgemoe_core.h"
#include "platform.h"
#include "slots.h"

namespace em {

// Never the same twice in a process, never 0: to know again what was checked once.
uint64_t new_identity();

class Cache {
 public:
  Cache(em_store *store, const em_cache_config &config);  // valid: see is_valid
  static bool is_valid(em_store *store, const em_cache_config &config);

  em_store *store() const { return store_; }
  uint64_t identity() const { return identity_; }
  int64_t num_keys() const { return cycle_.num_keys(); }
  int64_t num_places() const { return cycle_.num_places(); }
  int64_t first_key(int64_t place) const { return cycle_.first_key[place]; }
  int64_t max_capacity_bytes() const { return arena_bytes_; }
  const uint64_t *addresses() const { return slots_.addresses(); }
  const uint8_t *data(int32_t key) const {
    return reinterpret_cast<const uint8_t *>(slots_.address(key));
  }
  bool is_absent(int32_t key) const { return slots_.address(key) == 0; }
  bool is_pinned(int32_t key) const { return pins_[key] > 0; }
  em_place_stats &stats_of(int64_t place) { return place_stats_[place]; }
  em_place_stats *place_stats() { return place_stats_.data(); }
  em_cache_stats stats() const;

  // Counts the time of its scope in one of the sums, but for what is counted elsewhere: handing reads
  // to the store, and decisions between guesses.
  class Counted {
   public:
    Counted(const Counted &) = delete;
    ~Counted() { sum_ += monotonic_ns() - start_ - (others_ns() - others_ns_); }

   protected:
    Counted(Cache &cache, int64_t &sum)
        : cache_(cache), sum_(sum), start_(monotonic_ns()), others_ns_(others_ns()) {}

   private:
    int64_t others_ns() const {
      return cache_.submit_ns_ + (&sum_ == &cache_.decide_ns_ ? 0 : cache_.decide_ns_);
    }

    Cache &cache_;
    int64_t &sum_;
    const int64_t start_, others_ns_;
  };
  struct Deciding : Counted {
    explicit Deciding(Cache &cache) : Counted(cache, cache.decide_ns_) {}
  };
  struct Guessing : Counted {
    explicit Guessing(Cache &cache) : Counted(cache, cache.guess_ns_) {}
  };
  // What the policy learns from a demand by one token changes nothing before the next decision: it
  // is left to whoever computes or waits meanwhile, and done at the latest by then.
  bool has_lesson() const { return !lesson_.empty(); }
  void learn();
  void learn_ahead() {  // and what the next decision will look for
    learn();
    victims_.measure();
  }
  int64_t decide_ns() const { return decide_ns_; }
  void count_deciding(int64_t ns) { decide_ns_ += ns; }
  // Which place the following hints belong to, and how many tokens go through it. wanted [n]: all
  // records that it will need, in the order of use, where they come in more than one hint: those
  // resident are kept for their turn as long as there is other room.
  void begin_layer(int64_t place, int64_t num_tokens, int64_t n = 0,
                   const int32_t *wanted = nullptr);
  // A demand on the place is near: what it goes through has left the processor's caches.
  void fetch_ahead(int64_t place) const;
  // What the hints that follow will sum up: experts [num_tokens, top_k], -1: none. 0 or EM_ERR_ARG.
  int32_t route(int64_t num_tokens, int64_t top_k, const int32_t *experts);
  // Pin the records (each once), most urgent first, and start reading those absent. 1; 0 and
  // nothing changed but evictions where they do not fit now; EM_ERR_ARG, or what a submit returned.
  // counts [n]: how many tokens want each record, null: one token's demand.
  int32_t hint(int64_t n, const int32_t *keys, const double *counts, em_cache_demand *demand);
  // Unpin what one hint pinned. A record whose read failed loses its memory.
  void release(int64_t n, const int32_t *keys);
  // Releases what was hinted when it goes out of scope.
  class Held {
   public:
    Held(Cache &cache, int64_t n, const int32_t *keys) : cache_(cache), n_(n), keys_(keys) {}
    Held(const Held &) = delete;
    ~Held() {
      const Deciding deciding(cache_);
      cache_.release(n_, keys_);
    }

   private:
    Cache &cache_;
    const int64_t n_;
    const int32_t *keys_;
  };
  // Let the policy start as if each key had been wanted so often just now.
  void seed(int64_t n, const int32_t *keys, const double *counts) {
    learn();
    policy_->seed(keys, n, counts, step_);
  }
  // Start reading those absent that fit without an eviction, in this order; counts neither as
  // demand nor as use. Writes the keys into placed [n]; returns their number, or a negative status.
  int64_t preload(int64_t n, const int32_t *keys, int32_t *placed);
  // Make records evictable whose reads have ended; `wait` for all of them.
  void settle(bool wait);
  // Guesses (cache_guess.cpp): records that somebody expects to be demanded soon. Read with less
  // urgency than demand; neither a hit nor a miss. False where it is not absent or there is no room.
  bool guess(int32_t key);
  // The router has spoken for the keys first .. end - 1: guesses among them other than `wanted` are
  // not read any further, and may be evicted.
  void drop_guesses(int32_t first, int32_t end, const int32_t *wanted, int64_t num_wanted);
  void drop_all_guesses();  // and what is foreseen
  void drop_uncertain_guesses();
  // See em_cache_foresee.
  int64_t foresee(int64_t n, const int32_t *keys, int64_t most_bytes);
  bool is_guess(int32_t key) const { return guess_of_[key] != Guess::kNone; }
  int64_t num_reading_guesses() const;  // that still may be wanted
  const em_prefetch_stats &guess_counts() const { return guess_counts_; }
  // Change the capacity within the arena; what no longer fits is evicted. False while records are
  // pinned.
  bool resize(int64_t capacity_bytes, bool keeps_memory);

  // Counts the time of its scope as native, but for deciding.
  class Native {
   public:
    explicit Native(Cache &cache)
        : cache_(cache), start_(monotonic_ns()), decide_ns_(cache.decide_ns_) {}
    Native(const Native &) = delete;
    ~Native() {
      cache_.native_ns_ += monotonic_ns() - start_ - (cache_.decide_ns_ - decide_ns_);
    }

   private:
    Cache &cache_;
    const int64_t start_, decide_ns_;
  };

 private:
  enum class Guess : uint8_t { kNone, kHeld, kUnused, kForeseen };

  bool start_guess(int32_t key, Guess kind);
  int64_t foreseen_bytes() const;
  void unblock_all(std::vector<int32_t> &keys);

  void let_go(int32_t key);
  void count_lost_guess(int32_t key);
  bool take_guess(int32_t key);
  bool fits(int64_t n, const int32_t *keys) const;
  void pin(int64_t n, const int32_t *keys);
  int32_t read(int64_t n, const int32_t *keys);
  bool place_record(int32_t key);
  int32_t submit(const std::vector<int32_t> &keys);
  void set_share(int64_t capacity_bytes);
  void evict(int32_t key);
  void forget(int32_t key);
  void drop(int32_t key);
  void add_unsettled(int32_t key);
  void unblock_wanted();
  void block(int32_t key) { set_blocked(key, 1); }
  void unblock(int32_t key) { set_blocked(key, 0); }
  void set_blocked(int32_t key, uint8_t is_blocked) {
    blocked_[key] = is_blocked;
    policy_->blocks().turn(key);
  }
  bool is_ours(int32_t key) const;  // an address that nobody knows yet: pinned by this hint alone

  em_store *store_;
  const uint64_t identity_ = new_identity();
  const Cycle cycle_;
  Slots slots_;
  std::unique_ptr<Policy> policy_;
  int64_t arena_bytes_, max_record_bytes_ = 0;
  double max_moved_per_byte_;
  std::vector<uint8_t> blocked_;  // by key: not for the policy to take
  Victims victims_;
  std::vector<int32_t> pins_;
  int64_t pinned_bytes_ = 0;
  std::vector<uint64_t> hint_of_;  // by key: number of the last hint that named it
  uint64_t hint_number_ = 0;
  std::vector<int32_t> unsettled_;  // released while being read, each once
  std::vector<uint8_t> is_unsettled_;  // by key
  std::vector<int32_t> guesses_;       // held
  std::vector<int32_t> taken_;         // guesses that this hint demands, still being read
  std::vector<Guess> guess_of_;        // by key
  em_prefetch_stats guess_counts_ = {};
  std::vector<int32_t> foreseen_;  // resident, demanded later for certain; first needed first
  int64_t num_foreseen_ = 0, num_foreseen_in_time_ = 0;
  std::vector<int32_t> wanted_;     // resident, needed later in this layer; first needed first
  std::vector<int32_t> absent_;     // of this hint
  std::vector<int32_t> lesson_;     // the demand that the policy was not told of yet
  std::vector<void *> dst_;
  int64_t place_ = 0, step_ = 0, num_tokens_ = 1;
  int64_t evictions_ = 0, submit_ns_ = 0, decide_ns_ = 0, guess_ns_ = 0, native_ns_ = 0;
  std::vector<em_place_stats> place_stats_;
};

}  // namespace em

struct em_cache : em::Cache {
  using em::Cache::Cache;
};
