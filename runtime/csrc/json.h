// A strict reader of JSON that looks at a text once, front to back, and copies nothing. After the
// first error every call fails; the caller looks at failed() where it matters.
#pragma once
#include <cstdint>
#include <string_view>

namespace em {

class JsonReader {
 public:
  explicit JsonReader(std::string_view text) : text_(text) {}

  bool failed() const { return failed_; }
  int64_t position() const { return static_cast<int64_t>(at_); }

  // for (json.enter('['); json.next(']');) read one value;
  // for (json.enter('{'); json.next('}');) read key(), then one value.
  void enter(char bracket) {
    expect(bracket);
    is_first_ = true;
  }
  bool next(char bracket) {
    const bool is_first = is_first_;
    is_first_ = false;
    if (failed_ || take(bracket)) return false;
    if (!is_first) expect(',');
    return !failed_;
  }
  std::string_view key() {
    const std::string_view name = string();
    expect(':');
    return name;
  }
  // As it stands in the text: escapes are checked but stay.
  std::string_view string();
  // A whole number that fits.
  int64_t integer();
  // Any value; nested no deeper than a few dozen levels.
  void skip() { skip_nested(0); }
  // Nothing but white space may follow.
  void finish() {
    skip_space();
    if (at_ != text_.size()) failed_ = true;
  }

 private:
  int peek() const { return at_ < text_.size() ? static_cast<unsigned char>(text_[at_]) : -1; }
  void skip_space();
  bool take(char wanted);
  void expect(char wanted) {
    if (!take(wanted)) failed_ = true;
  }
  int64_t skip_digits();
  void skip_number();
  void skip_escape();
  void skip_nested(int depth);

  std::string_view text_;
  size_t at_ = 0;
  bool failed_ = false, is_first_ = false;
};

// Reads the fields of an object; one that is named twice is an error.
class JsonFields {
 public:
  explicit JsonFields(JsonReader *json) : json_(json) { json->enter('{'); }
  bool next() {
    if (!json_->next('}')) return false;
    name_ = json_->key();
    return true;
  }
  bool is(std::string_view name, int number) {
    if (name_ != name) return false;
    is_repeated_ = is_repeated_ || (seen_ >> number & 1) != 0;
    seen_ |= 1u << number;
    return true;
  }
  // All of the first `count` numbers were there, and none twice.
  bool has_all(int count) const {
    const unsigned all = (1u << count) - 1;
    return !is_repeated_ && (seen_ & all) == all;
  }

 private:
  JsonReader *json_;
  std::string_view name_;
  unsigned seen_ = 0;
  bool is_repeated_ = false;
};

// A whole number written as JSON writes it, the whole of `text`.
bool parse_integer(std::string_view text, int64_t *value);

}  // namespace em
