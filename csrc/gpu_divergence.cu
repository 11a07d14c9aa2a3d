// Divergences by the student's dtype
#include "gpu_launch.h"

namespace fastkd {
namespace gpu {

void divergence(const Launch& launch, const Divergence& a) {
  const Current current(launch.device);
  if (a.s.raw.dtype == Float32) return divergence_f32(launch, a);
  if (a.s.raw.dtype == BFloat16) return divergence_bf16(launch, a);
  return divergence_f16(launch, a);
}

}  // namespace gpu
}  // namespace fastkd
