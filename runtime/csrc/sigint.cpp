#include "sigint.h"

#if defined(_WIN32)

namespace em {

// Windows runs a handler in a thread of its own, and the caller learns of it after the token: a stop
// between two layers would take a console handler here.

SigintWatch::SigintWatch(std::atomic<int32_t> *) {}
SigintWatch::~SigintWatch() {}

}  // namespace em

#else

#include <signal.h>

#include <atomic>

namespace em {
namespace {

std::atomic<bool> is_watched{false};
std::atomic<std::atomic<int32_t> *> stop_flag{nullptr};
struct sigaction before_watch;  // changes only while nothing points to on_sigint

void on_sigint(int number, siginfo_t *info, void *context) {
  if (std::atomic<int32_t> *flag = stop_flag.load()) flag->store(1);
  if (before_watch.sa_flags & SA_SIGINFO) {
    before_watch.sa_sigaction(number, info, context);
  } else {
    before_watch.sa_handler(number);
  }
}

}  // namespace

SigintWatch::SigintWatch(std::atomic<int32_t> *flag) {
  if (flag == nullptr || is_watched.exchange(true)) return;
  struct sigaction action;
  is_set_ = ::sigaction(SIGINT, nullptr, &before_watch) == 0 &&
            ((before_watch.sa_flags & SA_SIGINFO) ||
             (before_watch.sa_handler != SIG_DFL && before_watch.sa_handler != SIG_IGN));
  if (is_set_) {
    stop_flag = flag;
    action = before_watch;
    action.sa_flags |= SA_SIGINFO;
    action.sa_sigaction = on_sigint;
    is_set_ = ::sigaction(SIGINT, &action, nullptr) == 0;
  }
  if (!is_set_) is_watched = false;
}

SigintWatch::~SigintWatch() {
  if (!is_set_) return;
  ::sigaction(SIGINT, &before_watch, nullptr);
  stop_flag = nullptr;
  is_watched = false;
}

}  // namespace em

#endif
