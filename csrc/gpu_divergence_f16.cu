// Divergences of a student in Float16
#include "gpu_divergence.cuh"

namespace fastkd {
namespace gpu {

void divergence_f16(const Launch& launch, const Divergence& a) { run_dtype<Float16>(launch, a); }

}  // namespace gpu
}  // namespace fastkd
