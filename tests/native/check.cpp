#include "check.h"

#include <chrono>
#include <cmath>
#include <cstring>
#include <filesystem>

#include "edgemoe_core.h"

namespace check {
namespace {

Test *first = nullptr;
int num_failures = 0;
uint64_t hash = 0xcbf29ce484222325;

}  // namespace

Test::Test(const char *test_name, void (*body)()) : name(test_name), run(body), next(nullptr) {
  Test **last = &first;
  while (*last != nullptr) last = &(*last)->next;
  *last = this;
}

void fail(const char *file, int line, const std::string &what) {
  constexpr int kShown = 40;
  if (++num_failures <= kShown) std::fprintf(stderr, "%s:%d: %s\n", file, line, what.c_str());
}

uint64_t Random::next() {  // splitmix64
  uint64_t z = state_ += 0x9e3779b97f4a7c15;
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
  z = (z ^ z >> 27) * 0x94d049bb133111eb;
  return z ^ z >> 31;
}

float Random::uniform() {
  return static_cast<float>(static_cast<int64_t>(next() >> 40) - (1 << 23)) * 0x1p-23f;
}

std::vector<float> Random::floats(int64_t num, float scale) {
  std::vector<float> values(static_cast<size_t>(num));
  for (float &value : values) value = uniform() * scale;
  return values;
}

void digest(const float *values, int64_t num) {
  for (int64_t i = 0; i < num; ++i) {
    uint32_t bits;
    std::memcpy(&bits, values + i, 4);
    hash = (hash ^ bits) * 0x100000001b3;
  }
}

double relative_error(const std::vector<float> &a, const std::vector<double> &b) {
  double largest = 0, error = 0;
  for (size_t i = 0; i < b.size(); ++i) {
    largest = std::fmax(largest, std::fabs(b[i]));
    const double difference = std::fabs(a[i] - b[i]);
    error = difference <= error ? error : difference;  // NaN stays
  }
  return largest == 0 ? error : error / largest;
}

bool same_bits(const std::vector<float> &a, const std::vector<float> &b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

const std::string &folder() {
  static const struct Folder {
    Folder() {
      const auto now = std::chrono::steady_clock::now().time_since_epoch().count();
      const auto path = std::filesystem::temp_directory_path() / ("em" + std::to_string(now));
      std::filesystem::create_directories(path);
      name = path.string();
    }
    ~Folder() {
      std::error_code ignored;
      std::filesystem::remove_all(name, ignored);
    }
    std::string name;
  } made;
  return made.name;
}

int run_all(const char *part) {
  int num_run = 0;
  for (const Test *test = first; test != nullptr; test = test->next) {
    if (std::strstr(test->name, part) == nullptr) continue;
    const int before = num_failures;
    test->run();
    ++num_run;
    std::printf("%s %s\n", num_failures == before ? "ok  " : "FAIL", test->name);
    std::fflush(stdout);
  }
  std::printf("%d tests, %d failures, isa %s, digest %016llx\n", num_run, num_failures, em_isa(),
              static_cast<unsigned long long>(hash));
  return num_failures != 0 || num_run == 0;
}

}  // namespace check
