// AVX-VNNI: the 256-bit dot product of processors without AVX-512.
#include "kernels.h"

#if defined(__AVXVNNI__) && defined(__FMA__) && defined(__F16C__)
namespace em {
namespace {
constexpr const char *kName = "avxvnni";
}
}  // namespace em

#include "kernels_avx2_lanes.h"

namespace em {
const Kernels *kernels_avxvnni() { return &kTable; }
}  // namespace em
#else
namespace em {
const Kernels *kernels_avxvnni() { return nullptr; }
}  // namespace em
#endif
