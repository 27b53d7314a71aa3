#include "ahead.h"

#include <algorithm>

#include "kernels.h"

#if defined(_MSC_VER) && !defined(__clang__)
#include <intrin.h>
#endif

namespace em {
namespace {

constexpr int64_t kPieceBytes = 32 << 10;

void fetch_line(const char *line) {
#if defined(__GNUC__)
  __builtin_prefetch(line, 0, 2);
#elif defined(_M_X64)
  _mm_prefetch(line, _MM_HINT_T1);
#else
  (void)line;
#endif
}

}  // namespace

std::vector<Span> pieces_of(const std::vector<Span> &spans, int64_t most) {
  std::vector<Span> pieces;
  for (const Span &span : spans) {
    const int64_t end = std::min(span.num_bytes, most);
    for (int64_t at = 0; at < end; at += kPieceBytes) {
      pieces.push_back({span.begin + at, std::min(kPieceBytes, end - at)});
    }
    most -= end;
  }
  return pieces;
}

void fetch(const Span &span) {
  for (int64_t at = 0; at < span.num_bytes; at += kLineBytes) fetch_line(span.begin + at);
}

}  // namespace em
