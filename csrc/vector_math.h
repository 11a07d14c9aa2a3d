// exp, log and tanh that the compiler vectorises; float32. log and tanh have the coefficients of Cephes (Moshier), within
// about 2 ulp; exp is within 1.5 ulp and the rounding of its argument. Results below the smallest normal number are 0.
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

// 2^x for x <= 128: n = round(x) sits in the low bits of x + 1.5 * 2^23 + 127, where the exponent is taken from; x - n is
// exact; the polynomial is minimax for 2^f on [-1/2, 1/2] with 2^0 = 1. n = -127 makes the factor 0, n = 128 infinity.
FASTKD_INLINE float fastkd_exp2(float x) {
  const float low = -127.f, magic = 12582912.f + 127.f;
  const float y = low > x ? low : x;  // NaN stays NaN
  const float t = y + magic;
  const float f = y - (t - magic);
  float p = 1.5353354683611542e-4f;
  p = p * f + 1.3398875016719103e-3f;
  p = p * f + 9.618437848985195e-3f;
  p = p * f + 5.5503323674201965e-2f;
  p = p * f + 2.4022647738456726e-1f;
  p = p * f + 6.931471824645996e-1f;
  p = p * f + 1.0f;
  return p * bits_to_float(float_to_bits(t) << 23);
}

FASTKD_INLINE float fastkd_exp(float x) {
  const float y = x * 1.44269504088896341f;
  return fastkd_exp2(128.f < y ? 128.f : y);
}

// x >= 0; 0 gives -inf
FASTKD_INLINE float fastkd_log(float x) {
  const float tiny = 1.17549435e-38f;
  const float y = x < tiny ? tiny : x;
  int32_t i = (int32_t)float_to_bits(y);
  int32_t e = ((i - 0x3f3504f3) >> 23);  // so that the mantissa lies in [sqrt(1/2), sqrt(2))
  const float m = bits_to_float((uint32_t)i - ((uint32_t)e << 23)) - 1.0f, n = (float)e;
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
