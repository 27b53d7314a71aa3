// The order of eviction: of the records that nothing holds, the one whose value times nearness is
// lowest. Part of the twin of runtime/policy_lowest.py.
#pragma once
#include <cstdint>
#include <vector>

#include "cache_policy.h"

namespace em {

// Of every block the lowest value is kept from call to call, and looked for
// again only where values have changed or the record that had it is held now.
class Victims {
 public:
  Victims(const Cycle &cycle, Policy &policy, const std::vector<uint8_t> &blocked);
  // The key with the lowest score of those not blocked while `num_tokens` tokens go through place
  // `running` together, or -1. Those that the policy's guard keeps only where there is no other.
  int32_t next(int64_t running, int64_t num_tokens);
  void measure();  // what has changed, before `next` does

 private:
  void measure(int64_t block);
  void turn(int32_t key);
  int32_t lowest(int64_t running, bool is_free) const;
  int32_t oldest(int64_t block, double lowest, int64_t ahead, bool is_free) const;
  double score(double value, int64_t ahead) const;  // of a place so far behind the running one

  Policy &policy_;
  Blocks &blocks_;
  const std::vector<uint8_t> &blocked_;
  std::vector<double> lowest_;     // by block: the lowest value of those not blocked, else infinite
  std::vector<double> unguarded_;  // the same of those that the policy's guard would not keep
  std::vector<double> nearness_;   // by distance
  int num_squarings_ = 0;
  const int64_t num_places_;
};

}  // namespace em
