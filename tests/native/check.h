// What the tests of the core stand on: TEST, CHECK, random numbers, a temporary folder.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <sstream>
#include <string>
#include <type_traits>
#include <vector>

namespace check {

struct Test {
  Test(const char *name, void (*run)());
  const char *name;
  void (*run)();
  Test *next;
};

// Runs the tests whose name contains `part`; 0 where some ran and none failed.
int run_all(const char *part);

void fail(const char *file, int line, const std::string &what);

template <class T>
auto shown(const T &value) {
  if constexpr (std::is_arithmetic_v<T>) return +value;  // a byte as a number
  else return value;
}
template <class A, class B>
void equal(const A &a, const B &b, const char *text, const char *file, int line) {
  if (a == b) return;
  std::ostringstream what;
  what << text << ": " << shown(a) << " and " << shown(b);
  fail(file, line, what.str());
}

// Numbers in [0, 2^64), the same on every machine.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t next();
  int64_t below(int64_t limit) { return static_cast<int64_t>(next() % limit); }
  float uniform();  // [-1, 1)
  std::vector<float> floats(int64_t num, float scale = 1.0f);

 private:
  uint64_t state_;
};

// Adds results to the digest that the program prints at its end: equal for all instruction sets.
void digest(const float *values, int64_t num);
inline void digest(const std::vector<float> &values) {
  digest(values.data(), static_cast<int64_t>(values.size()));
}

// Largest |a - b| / max |b|.
double relative_error(const std::vector<float> &a, const std::vector<double> &b);
bool same_bits(const std::vector<float> &a, const std::vector<float> &b);

const std::string &folder();  // of this run, removed at its end

}  // namespace check

#define TEST(NAME)                                            \
  static void NAME();                                         \
  static const check::Test registered_##NAME(#NAME, NAME);    \
  static void NAME()
#define CHECK(...) \
  ((__VA_ARGS__) ? void() : check::fail(__FILE__, __LINE__, #__VA_ARGS__))
#define CHECK_EQUAL(A, B) check::equal(A, B, #A " == " #B, __FILE__, __LINE__)
// For what the rest of the test stands on.
#define REQUIRE(...)                                    \
  do {                                                  \
    if (__VA_ARGS__) break;                             \
    check::fail(__FILE__, __LINE__, #__VA_ARGS__);      \
    return;                                             \
  } while (false)
