#include "json.h"

namespace em {
namespace {

bool is_digit(int c) { return c >= '0' && c <= '9'; }

}  // namespace

bool parse_integer(std::string_view text, int64_t *value) {
  const bool is_negative = !text.empty() && text[0] == '-';
  if (is_negative) text.remove_prefix(1);
  if (text.empty() || (text.size() > 1 && text[0] == '0')) return false;
  int64_t result = 0;  // counted downwards, where one more number fits
  for (const char c : text) {
    if (!is_digit(c)) return false;
    const int digit = c - '0';
    if (result < (INT64_MIN + digit) / 10) return false;
    result = result * 10 - digit;
  }
  if (!is_negative && result == INT64_MIN) return false;
  *value = is_negative ? result : -result;
  return true;
}

void JsonReader::skip_space() {
  while (peek() == ' ' || peek() == '\n' || peek() == '\r' || peek() == '\t') ++at_;
}

bool JsonReader::take(char wanted) {
  skip_space();
  if (failed_ || peek() != wanted) return false;
  ++at_;
  return true;
}

void JsonReader::skip_escape() {
  const int kind = peek();
  if (kind < 0 || std::string_view("\"\\/bfnrtu").find(static_cast<char>(kind)) == std::string_view::npos) {
    failed_ = true;
    return;
  }
  ++at_;
  for (int i = 0; kind == 'u' && i < 4; ++i, ++at_) {
    const int c = peek();
    if (!is_digit(c) && !(c >= 'a' && c <= 'f') && !(c >= 'A' && c <= 'F')) {
      failed_ = true;
      return;
    }
  }
}

std::string_view JsonReader::string() {
  expect('"');
  const size_t begin = at_;
  while (!failed_) {
    const int c = peek();
    if (c < ' ') {  // the end too
      failed_ = true;
      break;
    }
    ++at_;
    if (c == '"') return text_.substr(begin, at_ - 1 - begin);
    if (c == '\\') skip_escape();
  }
  return {};
}

int64_t JsonReader::skip_digits() {
  const size_t begin = at_;
  while (is_digit(peek())) ++at_;
  return static_cast<int64_t>(at_ - begin);
}

void JsonReader::skip_number() {
  if (peek() == '-') ++at_;
  const bool is_zero = peek() == '0';
  const int64_t num_digits = skip_digits();
  if (num_digits == 0 || (is_zero && num_digits > 1)) failed_ = true;
  if (peek() == '.') {
    ++at_;
    if (skip_digits() == 0) failed_ = true;
  }
  if (peek() == 'e' || peek() == 'E') {
    ++at_;
    if (peek() == '+' || peek() == '-') ++at_;
    if (skip_digits() == 0) failed_ = true;
  }
}

int64_t JsonReader::integer() {
  skip_space();
  const size_t begin = at_;
  int64_t value = 0;
  if (!failed_) skip_number();
  if (!failed_ && !parse_integer(text_.substr(begin, at_ - begin), &value)) failed_ = true;
  return failed_ ? 0 : value;
}

void JsonReader::skip_nested(int depth) {
  constexpr int kMaxDepth = 48;
  skip_space();
  const int c = peek();
  if (failed_ || depth > kMaxDepth) {
    failed_ = true;
  } else if (c == '{') {
    for (enter('{'); next('}');) {
      key();
      skip_nested(depth + 1);
    }
  } else if (c == '[') {
    for (enter('['); next(']');) skip_nested(depth + 1);
  } else if (c == '"') {
    string();
  } else if (c == '-' || is_digit(c)) {
    skip_number();
  } else {
    for (const std::string_view word : {"true", "false", "null"}) {
      if (text_.substr(at_, word.size()) != word) continue;
      at_ += word.size();
      return;
    }
    failed_ = true;
  }
}

}  // namespace em
