// What the kernels are made of: numbers, dtypes, asynchronous copies, clusters. The emulator of the tests
// (tests/cuda_cpu.h) has its own version of what is written here in PTX.
#pragma once
#include <cfloat>
#include <cstdint>

#include "gpu.h"

#define FASTKD_DEVICE __device__ __forceinline__

namespace fastkd {
namespace gpu {

constexpr float INF = __builtin_inff(), LOG2E = 1.44269504088896341f, LN2 = 0.693147180559945309f;
constexpr float LOWEST = -FLT_MAX;  // as a maximum: differences from it are defined, where all are -inf too
constexpr int GROUP = 8;            // entries that a thread takes at a time
constexpr int ANY = 3;              // a dtype that is known at run time alone

#ifndef FASTKD_EMULATED
FASTKD_DEVICE float exp2_fast(float x) {  // within 2 ulp; results below the smallest normal number are 0
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
FASTKD_DEVICE float divide_fast(float x, float y) { return __fdividef(x, y); }  // within 2 ulp for y in [2^-126, 2^126]
FASTKD_DEVICE float low_half(uint32_t x) {                                      // of two float16
  float y;
  asm("{.reg .b16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, l;}" : "=f"(y) : "r"(x));
  return y;
}
FASTKD_DEVICE float high_half(uint32_t x) {
  float y;
  asm("{.reg .b16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, h;}" : "=f"(y) : "r"(x));
  return y;
}
FASTKD_DEVICE uint32_t pack_halves(float low, float high) {
  uint32_t y;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}
FASTKD_DEVICE uint32_t pack_bfloats(float low, float high) {
  uint32_t y;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}
// 16 bytes from global to shared memory; each thread waits for its own copies, in the order of their batches
FASTKD_DEVICE void copy_async(void* shared, const void* global) {
  const uint32_t to = (uint32_t)__cvta_generic_to_shared(shared);
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(__cvta_generic_to_global(global)) : "memory");
}
FASTKD_DEVICE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING>
FASTKD_DEVICE void copy_wait() {  // until at most PENDING batches are on their way
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}
#if __CUDA_ARCH__ >= 900
FASTKD_DEVICE int cluster_rank() { return (int)__clusterRelativeBlockRank(); }
FASTKD_DEVICE void cluster_arrive() { __cluster_barrier_arrive(); }
FASTKD_DEVICE void cluster_arrive_relaxed() { __cluster_barrier_arrive_relaxed(); }
FASTKD_DEVICE void cluster_wait() { __cluster_barrier_wait(); }
template <class T>
FASTKD_DEVICE const T* of_block(const T* shared, int rank) {  // where another block of the cluster keeps it
  return (const T*)__cluster_map_shared_rank(shared, (unsigned)rank);
}
#else  // such kernels are never launched there
FASTKD_DEVICE int cluster_rank() { return 0; }
FASTKD_DEVICE void cluster_arrive() {}
FASTKD_DEVICE void cluster_arrive_relaxed() {}
FASTKD_DEVICE void cluster_wait() {}
template <class T>
FASTKD_DEVICE const T* of_block(const T* shared, int) {
  return shared;
}
#endif
FASTKD_DEVICE char* shared_memory() {
  extern __shared__ __align__(16) char memory[];
  return memory;
}
#endif

FASTKD_DEVICE float as_float(uint32_t x) {
  float y;
  memcpy(&y, &x, 4);
  return y;
}
FASTKD_DEVICE uint32_t as_bits(float x) {
  uint32_t y;
  memcpy(&y, &x, 4);
  return y;
}

FASTKD_DEVICE int smaller(int a, int b) { return a < b ? a : b; }
FASTKD_DEVICE int larger(int a, int b) { return a > b ? a : b; }

__host__ __device__ constexpr int size_of(int dtype) { return dtype == Float32 ? 4 : 2; }

// Calls f with the dtype as a type, that the compiler or the machine chooses by.
template <int D>
struct DtypeIs {
  static constexpr int value = D;
};
template <int D, class F>
FASTKD_DEVICE void with_dtype(int dtype, F f) {
  if constexpr (D != ANY) {
    f(DtypeIs<D>());
  } else if (dtype == Float32) {
    f(DtypeIs<Float32>());
  } else if (dtype == BFloat16) {
    f(DtypeIs<BFloat16>());
  } else {
    f(DtypeIs<Float16>());
  }
}

// A group as it lies in memory: 32 bytes of float32, 16 of the others
template <int D>
struct Packed {
  static constexpr int WORDS = D == Float32 ? 8 : 4, QUADS = WORDS / 4;
  uint4 quad[QUADS];
};

template <int D>
FASTKD_DEVICE void unpack(const Packed<D>& x, float (&z)[GROUP]) {
#pragma unroll
  for (int q = 0; q < Packed<D>::QUADS; q++) {
    const uint32_t w[4] = {x.quad[q].x, x.quad[q].y, x.quad[q].z, x.quad[q].w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
      if constexpr (D == Float32) z[4 * q + i] = as_float(w[i]);
      if constexpr (D == BFloat16) z[2 * i] = as_float(w[i] << 16), z[2 * i + 1] = as_float(w[i] & 0xffff0000u);
      if constexpr (D == Float16) z[2 * i] = low_half(w[i]), z[2 * i + 1] = high_half(w[i]);
    }
  }
}

template <int D>
FASTKD_DEVICE Packed<D> pack(const float (&z)[GROUP]) {
  Packed<D> x;
#pragma unroll
  for (int q = 0; q < Packed<D>::QUADS; q++) {
    uint32_t w[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      if constexpr (D == Float32) w[i] = as_bits(z[4 * q + i]);
      if constexpr (D == BFloat16) w[i] = pack_bfloats(z[2 * i], z[2 * i + 1]);
      if constexpr (D == Float16) w[i] = pack_halves(z[2 * i], z[2 * i + 1]);
    }
    x.quad[q] = make_uint4(w[0], w[1], w[2], w[3]);
  }
  return x;
}

template <int D>
FASTKD_DEVICE float element(const void* data, int64_t i) {
  if constexpr (D == Float32) return ((const float*)data)[i];
  if constexpr (D == BFloat16) return as_float((uint32_t)((const uint16_t*)data)[i] << 16);
  if constexpr (D == Float16) return low_half(((const uint16_t*)data)[i]);
}

template <int D>
FASTKD_DEVICE void put_element(void* data, int64_t i, float z) {
  if constexpr (D == Float32) ((float*)data)[i] = z;
  if constexpr (D == BFloat16) ((uint16_t*)data)[i] = (uint16_t)pack_bfloats(z, 0.f);
  if constexpr (D == Float16) ((uint16_t*)data)[i] = (uint16_t)pack_halves(z, 0.f);
}

FASTKD_DEVICE float tanh_of(float x) {  // the polynomial is Cephes' (Moshier)
  const float a = fabsf(x), z = x * x;
  float p = -5.70498872745e-3f;
  p = fmaf(p, z, 2.06390887954e-2f);
  p = fmaf(p, z, -5.37397155531e-2f);
  p = fmaf(p, z, 1.33314422036e-1f);
  p = fmaf(p, z, -3.33332819422e-1f);
  const float near = fmaf(p * z, x, x);
  const float far = 1.f - divide_fast(2.f, exp2_fast(2.f * LOG2E * fminf(a, 20.f)) + 1.f);  // 1 from 10 on
  return a < 0.625f ? near : x != x ? x : copysignf(far, x);
}

}  // namespace gpu
}  // namespace fastkd

#define FASTKD_FN FASTKD_DEVICE
#define FASTKD_EXP(x) fastkd::gpu::exp2_fast((x) * fastkd::gpu::LOG2E)
#define FASTKD_LOG(x) logf(x)
#define FASTKD_SQRT(x) sqrtf(x)
#include "pointwise.h"
