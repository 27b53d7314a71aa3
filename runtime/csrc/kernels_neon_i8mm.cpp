// The level of Arm processors with 8-bit dot products and matrix products.
#include "gemm.h"

#if defined(__aarch64__) && defined(__ARM_FEATURE_DOTPROD) && defined(__ARM_FEATURE_MATMUL_INT8)
#include <arm_neon.h>

namespace em {
namespace {

constexpr const char *kName = "neon-i8mm";

#include "kernels_neon.h"

#include "kernels_impl.h"

}  // namespace

const Kernels *kernels_neon_i8mm() {
  static const Kernels table = [] {
    Kernels made = kTable;
    made.panels = panels_neon_i8mm();
    return made;
  }();
  return &table;
}

}  // namespace em
#else
namespace em {
const Kernels *kernels_neon_i8mm() { return nullptr; }
}  // namespace em
#endif
