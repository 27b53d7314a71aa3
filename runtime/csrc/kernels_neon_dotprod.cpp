// The level of Arm processors with 8-bit dot products.
#include "kernels.h"

#if defined(__aarch64__) && defined(__ARM_FEATURE_DOTPROD)
#include <arm_neon.h>

namespace em {
namespace {

constexpr const char *kName = "neon-dotprod";

#include "kernels_neon.h"

#include "kernels_impl.h"

}  // namespace

const Kernels *kernels_neon_dotprod() { return &kTable; }

}  // namespace em
#else
namespace em {
const Kernels *kernels_neon_dotprod() { return nullptr; }
}  // namespace em
#endif
