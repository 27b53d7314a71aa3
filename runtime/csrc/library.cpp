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
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace em {
namespace {

#if defined(EM_X86)
struct Cpuid {
  uint32_t a = 0, b = 0, c = 0, d = 0;
};

Cpuid cpuid(uint32_t leaf, uint32_t subleaf = 0) {
  Cpuid r;
#if defined(_MSC_VER)
  int words[4];
  __cpuid(words, 0);
  if (static_cast<uint32_t>(words[0]) < leaf) return r;
  __cpuidex(words, static_cast<int>(leaf), static_cast<int>(subleaf));
  r.a = words[0], r.b = words[1], r.c = words[2], r.d = words[3];
#else
  if (!__get_cpuid_count(leaf, subleaf, &r.a, &r.b, &r.c, &r.d)) return {};
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

// The registers of AMX are large: Linux saves them only for a process that asked for it.
bool may_use_tiles() {
#if defined(__linux__) && defined(SYS_arch_prctl)
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

// Levels that this machine runs, best first.
int find_levels(const Kernels **levels) {
  int num = 0;
  const auto has = [](uint32_t word, int bit) { return (word >> bit & 1) != 0; };
  const Cpuid one = cpuid(1), seven = cpuid(7);
  constexpr int kOsxsave = 27, kFma = 12, kF16c = 29, kAvx = 28, kAvx2 = 5;
  constexpr int kF = 16, kDq = 17, kBw = 30, kVl = 31, kVnni = 11, kAvxVnni = 4;
  constexpr int kAmxTile = 24, kAmxInt8 = 25;
  if (has(one.c, kOsxsave) && has(one.c, kAvx)) {
    const uint64_t state = saved_state();
    const bool has_avx2 = (state & 0x6) == 0x6 && has(one.c, kFma) && has(one.c, kF16c) &&
                          has(seven.b, kAvx2);
    const bool has_512 = (state & 0xe6) == 0xe6 && has(seven.b, kF) && has(seven.b, kDq) &&
                         has(seven.b, kBw) && has(seven.b, kVl) && has(seven.c, kVnni);
    constexpr uint64_t kTileState = 3 << 17;
    const bool has_amx = has_avx2 && has_512 && has(seven.d, kAmxTile) && has(seven.d, kAmxInt8) &&
                         (state & kTileState) == kTileState;
    if (has_amx && may_use_tiles()) levels[num++] = kernels_amx();
    if (has_avx2 && has_512) levels[num++] = kernels_avx512vnni();
    const bool has_avxvnni = has_avx2 && seven.a >= 1 && has(cpuid(7, 1).a, kAvxVnni);
    if (has_avxvnni) levels[num++] = kernels_avxvnni();
    if (has_avx2) levels[num++] = kernels_avx2();
  }
  levels[num++] = kernels_scalar();
  return num;
}
#elif defined(__aarch64__) && (defined(__linux__) || defined(__APPLE__))
int find_levels(const Kernels **levels) {
  int num = 0;
#if defined(__linux__)
  constexpr int kDotprod = 20, kI8mm = 13;  // bits that the kernel's interface fixes
  const bool has_dotprod = (getauxval(AT_HWCAP) >> kDotprod & 1) != 0;
  const bool has_i8mm = (getauxval(AT_HWCAP2) >> kI8mm & 1) != 0;
#else
  const auto has = [](const char *name) {
    int value = 0;
    size_t size = sizeof value;
    return sysctlbyname(name, &value, &size, nullptr, 0) == 0 && value != 0;
  };
  const bool has_dotprod = has("hw.optional.arm.FEAT_DotProd");
  const bool has_i8mm = has("hw.optional.arm.FEAT_I8MM");
#endif
  if (has_dotprod && has_i8mm) levels[num++] = kernels_neon_i8mm();
  if (has_dotprod) levels[num++] = kernels_neon_dotprod();
  levels[num++] = kernels_scalar();
  return num;
}
#else
int find_levels(const Kernels **levels) {
  levels[0] = kernels_scalar();
  return 1;
}
#endif

const Kernels *choose() {
  const Kernels *levels[kMaxLevels];
  const int num_levels = available_levels(levels);
  const char *wanted = std::getenv("EDGEMOE_ISA");
  if (wanted == nullptr || *wanted == '\0') return levels[0];
  for (int i = 0; i < num_levels; ++i) {
    if (std::strcmp(levels[i]->name, wanted) == 0) return levels[i];
  }
  std::fprintf(stderr, "note: `EDGEMOE_ISA=%s` is unknown or not available here; using `%s`\n",
               wanted, levels[0]->name);
  return levels[0];
}

}  // namespace

int available_levels(const Kernels **levels) {
  const int num_found = find_levels(levels);
  int num_levels = 0;
  for (int i = 0; i < num_found; ++i) {
    if (levels[i] != nullptr) levels[num_levels++] = levels[i];  // the compiler knew it
  }
  return num_levels;
}

const Kernels &kernels() {
  static const Kernels *const chosen = choose();
  return *chosen;
}

}  // namespace em

extern "C" {

int32_t em_abi_version(void) { return EM_ABI_VERSION; }
const int32_t em_format_version = 2;
const int32_t em_page_bytes = 4096;
const int32_t em_tile_rows = em::kTileRows;
const int32_t em_line_bytes = em::kLineBytes;
const int32_t em_act_group = em::kActGroup;

const char *em_isa(void) { return em::kernels().name; }

}  // extern "C"
