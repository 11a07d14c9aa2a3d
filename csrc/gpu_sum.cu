// A float32 sum in 24 bits: the upper 16 as bfloat16, 8 beside them; accumulate and round_sum of csrc/rows.cpp.
#include "gpu_device.cuh"
#include "gpu_launch.h"

namespace fastkd {
namespace gpu {

constexpr int SUM_THREADS = 256;

FASTKD_DEVICE float join(uint32_t high, uint32_t low) { return as_float(high << 16 | low << 8); }

FASTKD_DEVICE uint32_t rounded(float sum) {  // to 24 bits, nearest even
  const uint32_t u = as_bits(sum);
  return sum != sum ? 0x7fc00000u : u + 0x7fu + (u >> 8 & 1u);
}

// word i % 2 of a pair of bfloat16, byte i % 4 of four
FASTKD_DEVICE uint32_t half_of(const uint32_t (&w)[4], int i) { return w[i / 2] >> 16 * (i % 2) & 0xffffu; }
FASTKD_DEVICE uint32_t byte_of(const uint32_t (&w)[2], int i) { return w[i / 4] >> 8 * (i % 4) & 0xffu; }

template <int D>
__global__ void __launch_bounds__(SUM_THREADS) accumulate_kernel(const __grid_constant__ Accumulate a) {
  const int64_t i = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) * GROUP;
  const bool aligned = ((uintptr_t)a.high | (uintptr_t)a.part) % 16 == 0 && (uintptr_t)a.low % 8 == 0;
  if (!aligned || i + GROUP > a.n) {
    for (int64_t k = i; k < i + GROUP && k < a.n; k++) {
      const float part = element<D>(a.part, k);
      const uint32_t bits = rounded(a.first ? part : join(a.high[k], a.low[k]) + part);
      a.high[k] = (uint16_t)(bits >> 16), a.low[k] = (uint8_t)(bits >> 8);
    }
    return;
  }
  float part[GROUP];
  unpack<D>(*(const Packed<D>*)((const char*)a.part + i * size_of(D)), part);
  uint32_t high[4] = {}, low[2] = {};
  if (!a.first) {
    const uint4 h = *(const uint4*)(a.high + i);
    const uint2 l = *(const uint2*)(a.low + i);
    high[0] = h.x, high[1] = h.y, high[2] = h.z, high[3] = h.w, low[0] = l.x, low[1] = l.y;
  }
  uint32_t to_high[4] = {}, to_low[2] = {};
#pragma unroll
  for (int k = 0; k < GROUP; k++) {
    const uint32_t bits = rounded(a.first ? part[k] : join(half_of(high, k), byte_of(low, k)) + part[k]);
    to_high[k / 2] |= (bits >> 16) << 16 * (k % 2), to_low[k / 4] |= (bits >> 8 & 0xffu) << 8 * (k % 4);
  }
  *(uint4*)(a.high + i) = make_uint4(to_high[0], to_high[1], to_high[2], to_high[3]);
  *(uint2*)(a.low + i) = make_uint2(to_low[0], to_low[1]);
}

FASTKD_DEVICE uint16_t nearest(uint32_t high, uint32_t low) {
  const float x = join(high, low);
  const uint32_t u = as_bits(x);
  return (uint16_t)(x != x ? 0x7fc0u : (u + 0x7fffu + (u >> 16 & 1u)) >> 16);
}

__global__ void __launch_bounds__(SUM_THREADS) round_kernel(const __grid_constant__ Accumulate a) {
  const int64_t i = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) * GROUP;
  const bool aligned = (uintptr_t)a.high % 16 == 0 && (uintptr_t)a.low % 8 == 0;
  if (!aligned || i + GROUP > a.n) {
    for (int64_t k = i; k < i + GROUP && k < a.n; k++) a.high[k] = nearest(a.high[k], a.low[k]);
    return;
  }
  const uint4 h = *(const uint4*)(a.high + i);
  const uint2 l = *(const uint2*)(a.low + i);
  const uint32_t high[4] = {h.x, h.y, h.z, h.w}, low[2] = {l.x, l.y};
  uint32_t to[4] = {};
#pragma unroll
  for (int k = 0; k < GROUP; k++) to[k / 2] |= (uint32_t)nearest(half_of(high, k), byte_of(low, k)) << 16 * (k % 2);
  *(uint4*)(a.high + i) = make_uint4(to[0], to[1], to[2], to[3]);
}

template <auto Kernel>
void start_sum(const Launch& launch, const Accumulate& a) {
  const Current current(launch.device);
  constexpr int64_t each = SUM_THREADS * GROUP;
  if (a.n > 0) start_grid<Kernel>(launch, a, (a.n + each - 1) / each, 0, SUM_THREADS, 0);
}

void accumulate(const Launch& launch, const Accumulate& a) {
  if (a.dtype == Float32) return start_sum<accumulate_kernel<Float32>>(launch, a);
  if (a.dtype == BFloat16) return start_sum<accumulate_kernel<BFloat16>>(launch, a);
  if (a.dtype == Float16) return start_sum<accumulate_kernel<Float16>>(launch, a);
  throw std::invalid_argument("part must be float32, bfloat16 or float16, got the dtype " + std::to_string(a.dtype));
}

void round_sum(const Launch& launch, const Accumulate& a) { start_sum<round_kernel>(launch, a); }

}  // namespace gpu
}  // namespace fastkd
