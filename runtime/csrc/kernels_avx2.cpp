// AVX2.
#include "kernels.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
namespace em {
namespace {
constexpr const char *kName = "avx2";
}
}  // namespace em

#include "kernels_avx2_lanes.h"

namespace em {
const Kernels *kernels_avx2() { return &kTable; }
}  // namespace em
#else
namespace em {
const Kernels *kernels_avx2() { return nullptr; }
}  // namespace em
#endif
