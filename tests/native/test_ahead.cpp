// What is ahead, cut into pieces.
#include <vector>

#include "ahead.h"
#include "check.h"

TEST(pieces_cover_the_first_bytes_in_order) {
  std::vector<char> memory(300000);
  const char *const begin = memory.data();
  const std::vector<em::Span> spans = {{begin + 100000, 100000}, {begin, 1}, {begin, 0}, {begin, 90000}};
  for (const int64_t most : {int64_t{0}, int64_t{32769}, int64_t{100001}, int64_t{1} << 40}) {
    int64_t num_bytes = 0;
    std::vector<em::Span> joined;
    for (const em::Span &piece : em::pieces_of(spans, most)) {
      CHECK(piece.num_bytes > 0 && piece.num_bytes <= 1 << 16);
      num_bytes += piece.num_bytes;
      em::fetch(piece);
      if (!joined.empty() && joined.back().begin + joined.back().num_bytes == piece.begin) {
        joined.back().num_bytes += piece.num_bytes;
      } else {
        joined.push_back(piece);
      }
    }
    CHECK_EQUAL(num_bytes, most < 190001 ? most : 190001);
    for (size_t i = 0; i < joined.size(); ++i) CHECK(joined[i].begin == spans[i < 2 ? i : 3].begin);
  }
}
