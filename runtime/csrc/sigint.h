// Ctrl-C while the core runs: whoever waits for the core cannot run its handler.
#pragma once
#include <atomic>
#include <cstdint>

namespace em {

// Writes 1 to *flag on SIGINT until it goes out of scope, before the handler that the signal has. Does
// nothing for a null flag, where the signal has no handler, or while another one watches.
class SigintWatch {
 public:
  explicit SigintWatch(std::atomic<int32_t> *flag);
  SigintWatch(const SigintWatch &) = delete;
  SigintWatch &operator=(const SigintWatch &) = delete;
  ~SigintWatch();

 private:
  bool is_set_ = false;
};
}  // namespace em
