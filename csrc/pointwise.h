// phi and h of every divergence, for C++ and CUDA: h = d phi / d log q. fastkd/divergences.py is the definition.
// lp, lq: log-probabilities; p, q: their exponentials, 0 where they underflow. 0 times anything is 0.
#pragma once

#ifndef FASTKD_FN
#include "vector_math.h"
#define FASTKD_FN FASTKD_INLINE  // a call in a loop would keep it from being vectorised
#define FASTKD_EXP(x) fastkd_exp(x)
#define FASTKD_LOG(x) fastkd_log(x)
#define FASTKD_SQRT(x) __builtin_sqrtf(x)
#endif

// X(name in divergences.py, enumerator)
#define FASTKD_DIVERGENCES(X)                     \
  X("forward_kl", ForwardKL)                      \
  X("reverse_kl", ReverseKL)                      \
  X("jensen_shannon", JensenShannon)              \
  X("skew_kl", SkewKL)                            \
  X("skew_reverse_kl", SkewReverseKL)             \
  X("total_variation", TotalVariation)            \
  X("squared_hellinger", SquaredHellinger)        \
  X("chi_square", ChiSquare)                      \
  X("neyman_chi_square", NeymanChiSquare)         \
  X("alpha_beta", AlphaBeta)                      \
  X("cross_entropy", CrossEntropy)                \
  X("reverse_cross_entropy", ReverseCrossEntropy)

enum class Kind : int {
#define X(name, id) id,
  FASTKD_DIVERGENCES(X)
#undef X
};

// a mixture of p and q, such that its logarithm is finite
FASTKD_FN float mixed(float m) { return m < 1.17549435e-38f ? 1.17549435e-38f : m; }

// e^x - 1 - x for abs(x) <= 0.1
FASTKD_FN float beyond_linear(float x) {
  return 0.5f * x * x * (1.f + x * (1.f / 3) * (1.f + x * 0.25f * (1.f + x * 0.2f)));
}

struct Point {
  float phi, h;
};

// Alpha-beta with parameters for which nothing cancels or overflows: the plain formula will do.
FASTKD_FN bool is_plain(Kind k, float a, float b) { return k == Kind::AlphaBeta && a > 0.f && b > 0.f && a * b >= 0.1f; }

// a, b: the divergence's parameters; PLAIN: is_plain holds
template <Kind K, bool PLAIN = false>
FASTKD_FN Point point(float lp, float lq, float p, float q, float a, float b) {
  if constexpr (K == Kind::ForwardKL) {
    return {p == 0.f ? 0.f : p * (lp - lq), -p};
  } else if constexpr (K == Kind::ReverseKL) {
    return {q == 0.f ? 0.f : q * (lq - lp), q == 0.f ? 0.f : q * (lq - lp + 1.f)};
  } else if constexpr (K == Kind::JensenShannon) {
    // log(q / m) and log(p / m) by the ratio of the smaller to the larger, which keeps what log q - log m would cancel
    const float c = 1.f - a, d = lp - lq, away = d < 0.f ? d : -d, small = p < q ? p : q, large = p < q ? q : p;
    const float w_small = p < q ? a : c, w_large = 1.f - w_small;
    const float l = FASTKD_LOG(mixed(w_large + w_small * (small / large)));
    const float of_small = small == 0.f ? 0.f : w_small * small * (away - l), of_large = large == 0.f ? 0.f : -w_large * large * l;
    return {of_small + of_large, p < q ? of_large : of_small};
  } else if constexpr (K == Kind::SkewKL) {
    const float c = 1.f - a, m = mixed(a * p + c * q);
    return {p == 0.f ? 0.f : p * (lp - FASTKD_LOG(m)), p == 0.f ? 0.f : -c * p * (q / m)};
  } else if constexpr (K == Kind::SkewReverseKL) {
    const float m = mixed(a * q + (1.f - a) * p), phi = q == 0.f ? 0.f : q * (lq - FASTKD_LOG(m));
    return {phi, q == 0.f ? 0.f : phi + q - a * q * (q / m)};
  } else if constexpr (K == Kind::TotalVariation) {
    const float d = p - q, e = 1e-6f * q;  // equal but for rounding: 0
    return {0.5f * (d < 0.f ? -d : d), d > e ? -0.5f * q : d < -e ? 0.5f * q : 0.f * d};
  } else if constexpr (K == Kind::SquaredHellinger) {
    const float root = FASTKD_SQRT(q), d = FASTKD_SQRT(p) - root;
    return {0.5f * d * d, -0.5f * root * d};
  } else if constexpr (K == Kind::ChiSquare) {
    const float x = lp - lq, ppq = FASTKD_EXP(2.f * lp - lq);  // p^2 / q, where p and q may underflow
    const float near = p == 0.f ? q : (p - q) * (FASTKD_EXP(x) - 1.f);
    return {x > 1.f ? ppq - 2.f * p + q : near, p == 0.f && !(x > 1.f) ? q : q - ppq};
  } else if constexpr (K == Kind::NeymanChiSquare) {
    const float x = lq - lp, qqp = FASTKD_EXP(2.f * lq - lp), r = FASTKD_EXP(x) - 1.f;
    const bool far = x > 1.f, none = q == 0.f;
    return {far ? qqp - 2.f * q + p : none ? p : (q - p) * r, far ? 2.f * (qqp - q) : none ? 0.f : 2.f * q * r};
  } else if constexpr (K == Kind::AlphaBeta) {
    const float c = a + b, cross = FASTKD_EXP(a * lp + b * lq), pc = FASTKD_EXP(c * lp), qc = FASTKD_EXP(c * lq);
    const float over_a = 1.f / a, over_ab = 1.f / (a * b), share = a / c, inf = __builtin_inff();
    if constexpr (PLAIN) return {(share * pc + (1.f - share) * qc - cross) * over_ab, (qc - cross) * over_a};
    float far = (share * pc + (1.f - share) * qc - cross) * over_ab;
    far = (lp == -inf) != (lq == -inf) && far != far ? inf : far;  // the larger of two infinities is positive
    // where p and q are near the powers cancel: q^c (e^cd - 1 - cd) a / c - ..., d = log p - log q
    const float d = lp - lq, ad = a * d, cd = c * d, ea = beyond_linear(ad);
    const bool near = ad < 0.1f && ad > -0.1f && cd < 0.1f && cd > -0.1f, neither = lp == -inf && lq == -inf;
    const float phi = near ? qc * (share * beyond_linear(cd) - ea) * over_ab : far;
    return {neither ? 0.f : phi, neither ? 0.f : (near ? -qc * (ad + ea) : qc - cross) * over_a};
  } else if constexpr (K == Kind::CrossEntropy) {
    return {p == 0.f ? 0.f : -p * lq, -p};
  } else {
    const float v = q == 0.f ? 0.f : -q * lp;
    return {v, v};
  }
}
