// exp, log and tanh that the compiler vectorises; float32, within about 2 ulp. Coefficients: Cephes (Moshier), expf,
// logf and tanhf. Results below the smallest normal number are 0.
#pragma once
#include <cstdint>

#define FASTKD_INLINE __attribute__((always_inline)) static inline

FASTKD_INLINE float bits_to_float(uint32_t i) {
  float f;
  __builtin_memcpy(&f, &i, 4);
  return f;
}
FASTKD_INLINE uint32_t float_to_bits(float f) {
  uint32_t i;
  __builtin_memcpy(&i, &f, 4);
  return i;
}

FASTKD_INLINE float fastkd_exp(float x) {
  const float low = -87.33654f, high = 88.72283f;
  float y = x < low ? low : x;  // NaN stays NaN
  y = y > high ? high : y;
  const float n = __builtin_rintf(y * 1.44269504088896341f);
  float r = y - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  // 2^n in two factors, so that n = 128 does not overflow on the way
  const int32_t k = (int32_t)n, half = k >> 1;
  const float e = p * bits_to_float((uint32_t)(half + 127) << 23) * bits_to_float((uint32_t)(k - half + 127) << 23);
  return x < low ? 0.f : x > high ? __builtin_inff() : e;
}

// x >= 0; 0 gives -inf
FASTKD_INLINE float fastkd_log(float x) {
  const float tiny = 1.17549435e-38f;
  const float y = x < tiny ? tiny : x;
  int32_t i = (int32_t)float_to_bits(y);
  int32_t e = ((i - 0x3f3504f3) >> 23);  // so that the mantissa lies in [sqrt(1/2), sqrt(2))
  const float m = bits_to_float((uint32_t)(i - (e << 23))) - 1.0f, n = (float)e;
  float p = 7.0376836292e-2f;
  p = p * m - 1.1514610310e-1f;
  p = p * m + 1.1676998740e-1f;
  p = p * m - 1.2420140846e-1f;
  p = p * m + 1.4249322787e-1f;
  p = p * m - 1.6668057665e-1f;
  p = p * m + 2.0000714765e-1f;
  p = p * m - 2.4999993993e-1f;
  p = p * m + 3.3333331174e-1f;
  const float z = m * m;
  float r = m * z * p - n * 2.12194440e-4f - 0.5f * z;
  r = m + r + n * 0.693359375f;
  return x < tiny ? -__builtin_inff() : x == __builtin_inff() ? x : x != x ? x : r;
}

FASTKD_INLINE float fastkd_tanh(float x) {
  const float a = x < 0.f ? -x : x, z = x * x;
  float p = -5.70498872745e-3f;
  p = p * z + 2.06390887954e-2f;
  p = p * z - 5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z - 3.33332819422e-1f;
  const float near = p * z * x + x;
  const float far = 1.0f - 2.0f / (fastkd_exp(2.0f * a) + 1.0f);
  return a < 0.625f ? near : x < 0.f ? -far : far;
}
