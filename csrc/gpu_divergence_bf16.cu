// Divergences of a student in BFloat16
#include "gpu_divergence.cuh"

namespace fastkd {
namespace gpu {

void divergence_bf16(const Launch& launch, const Divergence& a) { run_dtype<BFloat16>(launch, a); }

}  // namespace gpu
}  // namespace fastkd
