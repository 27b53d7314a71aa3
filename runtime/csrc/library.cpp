// Version, layout constants, and the choice of the instruction set.
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "edgemoe_core.h"
#include "kernels.h"

#if defined(__x86_64__) || defined(_M_X64)
#if defined(_MSC_VER)
#include <intrin.h>
#else
#include <cpuid.h>
#endif
#define EM_X86 1
#endif

namespace em {
namespace {

#if defined(EM_X86)
struct Cpuid {
  uint32_t a = 0, b = 0, c = 0, d = 0;
};

Cpuid cpuid(uint32_t leaf) {
  Cpuid r;
#if defined(_MSC_VER)
  int words[4];
  __cpuid(words, 0);
  if (static_cast<uint32_t>(words[0]) < leaf) return r;
  __cpuidex(words, static_cast<int>(leaf), 0);
  r.a = words[0], r.b = words[1], r.c = words[2], r.d = words[3];
#else
  if (!__get_cpuid_count(leaf, 0, &r.a, &r.b, &r.c, &r.d)) return {};
#endif
  return r;
}

// Register state the operating system saves; a set bit in CPUID alone does not make it usable.
uint64_t saved_state() {
#if defined(_MSC_VER)
  return _xgetbv(0);
#else
  uint32_t low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return static_cast<uint64_t>(high) << 32 | low;
#endif
}

int best_level() {
  const auto has = [](uint32_t word, int bit) { return (word >> bit & 1) != 0; };
  const Cpuid one = cpuid(1), seven = cpuid(7);
  constexpr int kOsxsave = 27, kFma = 12, kF16c = 29, kAvx = 28, kAvx2 = 5;
  if (!has(one.c, kOsxsave) || !has(one.c, kAvx)) return 0;
  const uint64_t state = saved_state();
  if ((state & 0x6) != 0x6 || !has(one.c, kFma) || !has(one.c, kF16c) || !has(seven.b, kAvx2))
    return 0;
  constexpr int kF = 16, kDq = 17, kBw = 30, kVl = 31, kVnni = 11;
  const bool has_512 = (state & 0xe6) == 0xe6 && has(seven.b, kF) && has(seven.b, kDq) &&
                       has(seven.b, kBw) && has(seven.b, kVl) && has(seven.c, kVnni);
  return has_512 ? 2 : 1;
}
#else
int best_level() { return 0; }
#endif

const Kernels *choose() {
  const Kernels *levels[] = {kernels_scalar(), kernels_avx2(), kernels_avx512vnni()};
  int best = best_level();
  while (levels[best] == nullptr) --best;
  const char *wanted = std::getenv("EDGEMOE_ISA");
  if (wanted == nullptr || *wanted == '\0') return levels[best];
  for (int level = 0; level <= best; ++level) {
    if (levels[level] != nullptr && std::strcmp(levels[level]->name, wanted) == 0)
      return levels[level];
  }
  std::fprintf(stderr, "error: `EDGEMOE_ISA=%s` is unknown or not available here; using `%s`\n",
               wanted, levels[best]->name);
  return levels[best];
}

}  // namespace

const Kernels &kernels() {
  static const Kernels *const chosen = choose();
  return *chosen;
}

}  // namespace em

extern "C" {

int32_t em_abi_version(void) { return EM_ABI_VERSION; }
const int32_t em_format_version = 1;
const int32_t em_page_bytes = 4096;
const int32_t em_tile_rows = em::kTileRows;
const int32_t em_line_bytes = em::kLineBytes;
const int32_t em_act_group = em::kActGroup;

const char *em_isa(void) { return em::kernels().name; }

}  // extern "C"
