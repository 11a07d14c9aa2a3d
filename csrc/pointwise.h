// phi and h of every divergence, for C++ and CUDA: h = d phi / d log q. fastkd/divergences.py is the definition.
// lp, lq: log-probabilities; p, q: their exponentials, 0 where they underflow. 0 times anything is 0.
#pragma once

#ifndef FASTKD_FN
#include "vector_math.h"
#define FASTKD_FN static inline
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

struct Point {
  float phi, h;
};

// a, b: the divergence's parameters
template <Kind K>
FASTKD_FN Point point(float lp, float lq, float p, float q, float a, float b) {
  if constexpr (K == Kind::ForwardKL) {
    return {p == 0.f ? 0.f : p * (lp - lq), -p};
  } else if constexpr (K == Kind::ReverseKL) {
    return {q == 0.f ? 0.f : q * (lq - lp), q == 0.f ? 0.f : q * (lq - lp + 1.f)};
  } else if constexpr (K == Kind::JensenShannon) {
    const float c = 1.f - a, lm = FASTKD_LOG(a * p + c * q);
    const float right = q == 0.f ? 0.f : c * q * (lq - lm);
    return {(p == 0.f ? 0.f : a * p * (lp - lm)) + right, right};
  } else if constexpr (K == Kind::SkewKL) {
    const float c = 1.f - a, m = a * p + c * q;
    return {p == 0.f ? 0.f : p * (lp - FASTKD_LOG(m)), p == 0.f ? 0.f : -c * p * (q / m)};
  } else if constexpr (K == Kind::SkewReverseKL) {
    const float m = a * q + (1.f - a) * p, phi = q == 0.f ? 0.f : q * (lq - FASTKD_LOG(m));
    return {phi, q == 0.f ? 0.f : phi + q - a * q * (q / m)};
  } else if constexpr (K == Kind::TotalVariation) {
    const float d = p - q;
    return {0.5f * (d < 0.f ? -d : d), d > 0.f ? -0.5f * q : d < 0.f ? 0.5f * q : 0.f * d};
  } else if constexpr (K == Kind::SquaredHellinger) {
    const float root = FASTKD_SQRT(q), d = FASTKD_SQRT(p) - root;
    return {0.5f * d * d, -0.5f * root * d};
  } else if constexpr (K == Kind::ChiSquare) {
    const float r = FASTKD_EXP(lp - lq);  // not p / q: q may underflow where p^2 / q does not overflow
    return {p == 0.f ? q : (p - q) * (r - 1.f), p == 0.f ? q : q - p * r};
  } else if constexpr (K == Kind::NeymanChiSquare) {
    const float r = FASTKD_EXP(lq - lp);
    return {q == 0.f ? p : (q - p) * (r - 1.f), q == 0.f ? 0.f : 2.f * q * (r - 1.f)};
  } else if constexpr (K == Kind::AlphaBeta) {
    const float c = a + b, cross = FASTKD_EXP(a * lp + b * lq), pc = FASTKD_EXP(c * lp), qc = FASTKD_EXP(c * lq);
    const bool neither = lp == -__builtin_inff() && lq == -__builtin_inff();
    return {neither ? 0.f : ((a / c) * pc + (b / c) * qc - cross) / (a * b), neither ? 0.f : (qc - cross) / a};
  } else if constexpr (K == Kind::CrossEntropy) {
    return {p == 0.f ? 0.f : -p * lq, -p};
  } else {
    const float v = q == 0.f ? 0.f : -q * lp;
    return {v, v};
  }
}
