// Divergences of a student in Float32
#include "gpu_divergence.cuh"

namespace fastkd {
namespace gpu {

void divergence_f32(const Launch& launch, const Divergence& a) { run_dtype<Float32>(launch, a); }

}  // namespace gpu
}  // namespace fastkd
