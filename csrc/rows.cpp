// The row ops on a CPU. Compiled once for each instruction set, each into a namespace of its own (FASTKD_ISA).
// Rows are handed to threads; a row is walked in tiles of float32 that stay in the first-level cache.
#include "rows.h"
#include "vector_math.h"
#include "pointwise.h"

#include <cmath>
#include <cstdlib>
#ifdef __F16C__
#include <immintrin.h>
#endif

namespace fastkd {
namespace FASTKD_ISA {
namespace {

constexpr int64_t TILE = 1024;
constexpr float INF = __builtin_inff();

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// ---- loads and stores: x[0..n) of a dtype <-> float32 ----

void half_to_float(const uint16_t* x, int64_t n, float* out) {
  int64_t i = 0;
#ifdef __F16C__
  for (; i + 8 <= n; i += 8) _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(x + i))));
#endif
  for (; i < n; i++) {
    _Float16 h;
    __builtin_memcpy(&h, x + i, 2);
    out[i] = (float)h;
  }
}

void float_to_half(const float* x, int64_t n, uint16_t* out) {
  int64_t i = 0;
#ifdef __F16C__
  for (; i + 8 <= n; i += 8)
    _mm_storeu_si128((__m128i*)(out + i), _mm256_cvtps_ph(_mm256_loadu_ps(x + i), _MM_FROUND_TO_NEAREST_INT));
#endif
  for (; i < n; i++) {
    const _Float16 h = (_Float16)x[i];
    __builtin_memcpy(out + i, &h, 2);
  }
}

void load(const void* data, int dtype, int64_t offset, int64_t n, float* out) {
  if (dtype == Float32) {
    __builtin_memcpy(out, (const float*)data + offset, n * sizeof(float));
  } else if (dtype == BFloat16) {
    const uint16_t* x = (const uint16_t*)data + offset;
#pragma omp simd
    for (int64_t i = 0; i < n; i++) out[i] = bits_to_float((uint32_t)x[i] << 16);
  } else {
    half_to_float((const uint16_t*)data + offset, n, out);
  }
}

void store(void* data, int dtype, int64_t offset, int64_t n, const float* x) {
  if (dtype == Float32) {
    __builtin_memcpy((float*)data + offset, x, n * sizeof(float));
  } else if (dtype == BFloat16) {
    uint16_t* out = (uint16_t*)data + offset;
#pragma omp simd
    for (int64_t i = 0; i < n; i++) {
      const uint32_t u = float_to_bits(x[i]);
      const uint32_t even = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
      out[i] = (uint16_t)(x[i] != x[i] ? 0x7fc0u : even);
    }
  } else {
    float_to_half(x, n, (uint16_t*)data + offset);
  }
}

// z[0..n) = effective logits of columns [v, v + n) of a row
void load_logits(const Source& src, int64_t row, int64_t v, int64_t n, float* z) {
  const Matrix& m = src.raw;
  const int64_t own = v >= m.width ? 0 : smaller(n, m.width - v);
  load(m.data, m.dtype, row * m.stride + v, own, z);
  const float scale = src.scale, cap = src.softcap;
  if (cap != 0.f) {
    const float inner = scale / cap;
#pragma omp simd
    for (int64_t i = 0; i < own; i++) z[i] = cap * fastkd_tanh(z[i] * inner);
  } else if (scale != 1.f) {
#pragma omp simd
    for (int64_t i = 0; i < own; i++) z[i] *= scale;
  }
  for (int64_t i = own; i < n; i++) z[i] = -INF;
}

// writes g * dz/draw * factor for the columns that the matrix has
void store_gradient(const Matrix& g, const Source& src, float factor, int64_t row, int64_t v, int64_t n, const float* z, float* grad) {
  n = v >= g.width ? 0 : smaller(n, g.width - v);
  const float f = factor * src.scale, cap = src.softcap;
  if (cap != 0.f) {
    const float inverse = 1.f / cap;
#pragma omp simd
    for (int64_t i = 0; i < n; i++) {
      const float y = z[i] * inverse;
      grad[i] *= f * (1.f - y * y);
    }
  } else {
#pragma omp simd
    for (int64_t i = 0; i < n; i++) grad[i] *= f;
  }
  store(g.data, g.dtype, row * g.stride + v, n, grad);
}

void zero_gradient(const Matrix& g, int64_t row) {
  const int64_t size = g.dtype == Float32 ? 4 : 2;
  __builtin_memset((char*)g.data + row * g.stride * size, 0, g.width * size);
}

float largest(const Source& src, int64_t row, int64_t vocab, float* z) {
  float top = -INF;
  for (int64_t v = 0; v < vocab; v += TILE) {
    const int64_t n = smaller(TILE, vocab - v);
    load_logits(src, row, v, n, z);
#pragma omp simd reduction(max : top)
    for (int64_t i = 0; i < n; i++) top = z[i] > top ? z[i] : top;
  }
  return top;
}

// A row's softmax: x = (z - top) * inv, e^x / sum
struct Softmax {
  float top, inv;
  double sum;
  float log_sum() const { return (float)std::log(sum); }
  float scale() const { return (float)(1.0 / sum); }
};

struct Scratch {
  float zs[TILE], zt[TILE], grad[TILE];
};

// ---- forward and reverse KL, cross-entropy: closed forms in two passes after the maximum ----

template <Kind K>
double closed_sums(const DivergenceArgs& a, int64_t r, Softmax& s, Softmax& t, Scratch& w) {
  double ls = 0, lt = 0, cross = 0;
  for (int64_t v = 0; v < a.vocab; v += TILE) {
    const int64_t n = smaller(TILE, a.vocab - v);
    load_logits(a.s, r, v, n, w.zs);
    load_logits(a.t, r, v, n, w.zt);
    const float ms = s.top, mt = t.top, is = s.inv, it = t.inv;
    float p1 = 0, p2 = 0, p3 = 0;
#pragma omp simd reduction(+ : p1, p2, p3)
    for (int64_t i = 0; i < n; i++) {
      const float x = (w.zs[i] - ms) * is, y = (w.zt[i] - mt) * it;
      const float q = fastkd_exp(x), p = fastkd_exp(y);
      p1 += q;
      p2 += p;
      if constexpr (K == Kind::ForwardKL) p3 += p == 0.f ? 0.f : p * (y - x);
      if constexpr (K == Kind::ReverseKL) p3 += q == 0.f ? 0.f : q * (x - y);
      if constexpr (K == Kind::CrossEntropy) p3 += p == 0.f ? 0.f : -p * x;
    }
    ls += p1, lt += p2, cross += p3;
  }
  s.sum = ls, t.sum = lt;
  return cross;
}

template <Kind K>
void closed_gradient(int64_t n, const Softmax& s, const Softmax& t, float c, double mass, double value, Scratch& w) {
  const float ms = s.top, mt = t.top, is = s.inv, it = t.inv, rs = s.scale(), rt = t.scale();
  const float cq = c * rs * (float)mass, cp = c * rt, shift = (float)(value + std::log(s.sum) - std::log(t.sum));
#pragma omp simd
  for (int64_t i = 0; i < n; i++) {
    const float x = (w.zs[i] - ms) * is, y = (w.zt[i] - mt) * it;
    const float q = fastkd_exp(x);
    if constexpr (K == Kind::ReverseKL)
      w.grad[i] = q == 0.f ? 0.f : c * rs * q * (x - y - shift);  // q (log q - log p - KL)
    else
      w.grad[i] = cq * q - cp * fastkd_exp(y);  // q sum(p) - p
  }
}

// ---- any sum of divergences: h of the row is kept, so that q alone is computed again ----

template <Kind K>
void tile_point(const Term& term, int64_t n, float weight, const float* lp, const float* lq, const float* p, const float* q,
                float* h, double& loss, double& total) {
  const float a = term.a, b = term.b;
  float l = 0, s = 0;
#pragma omp simd reduction(+ : l, s)
  for (int64_t i = 0; i < n; i++) {
    const Point f = point<K>(lp[i], lq[i], p[i], q[i], a, b);
    l += f.phi;
    s += f.h;
    h[i] += weight * f.h;
  }
  loss += (double)weight * l;
  total += (double)weight * s;
}

void tile_terms(const DivergenceArgs& a, int64_t r, int64_t n, const float* lp, const float* lq, const float* p,
                const float* q, float* h, double& loss, double& total) {
  for (int64_t i = 0; i < n; i++) h[i] = 0.f;
  for (int k = 0; k < a.term_count; k++) {
    const Term& term = a.terms[k];
    const float weight = term.weight[r];
    if (weight == 0.f) continue;
    switch ((Kind)term.kind) {
#define X(name, id) \
  case Kind::id:    \
    tile_point<Kind::id>(term, n, weight, lp, lq, p, q, h, loss, total); \
    break;
      FASTKD_DIVERGENCES(X)
#undef X
    }
  }
}

void sum_exponentials(const Source& src, int64_t r, int64_t vocab, Softmax& s, float* z) {
  double sum = 0;
  for (int64_t v = 0; v < vocab; v += TILE) {
    const int64_t n = smaller(TILE, vocab - v);
    load_logits(src, r, v, n, z);
    const float top = s.top, inv = s.inv;
    float part = 0;
#pragma omp simd reduction(+ : part)
    for (int64_t i = 0; i < n; i++) part += fastkd_exp((z[i] - top) * inv);
    sum += part;
  }
  s.sum = sum;
}

// writes h [vocab], returns the loss and sum h
void general_sums(const DivergenceArgs& a, int64_t r, const Softmax& s, const Softmax& t, Scratch& w, float* h, double& loss,
                  double& total) {
  float p[TILE], q[TILE];
  const float ls = s.log_sum(), lt = t.log_sum(), rs = s.scale(), rt = t.scale();
  const float ms = s.top, mt = t.top, is = s.inv, it = t.inv;
  for (int64_t v = 0; v < a.vocab; v += TILE) {
    const int64_t n = smaller(TILE, a.vocab - v);
    load_logits(a.s, r, v, n, w.zs);
    load_logits(a.t, r, v, n, w.zt);
#pragma omp simd
    for (int64_t i = 0; i < n; i++) {
      const float x = (w.zs[i] - ms) * is, y = (w.zt[i] - mt) * it;
      q[i] = fastkd_exp(x) * rs;
      p[i] = fastkd_exp(y) * rt;
      w.zs[i] = x - ls;
      w.zt[i] = y - lt;
    }
    tile_terms(a, r, n, w.zt, w.zs, p, q, h + v, loss, total);
  }
}

void general_gradient(int64_t n, const Softmax& s, float c, double total, const float* h, Scratch& w) {
  const float ms = s.top, is = s.inv, ch = c * s.scale() * (float)total;
#pragma omp simd
  for (int64_t i = 0; i < n; i++) {
    const float q = fastkd_exp((w.zs[i] - ms) * is);
    w.grad[i] = c * h[i] - (q == 0.f ? 0.f : ch * q);
  }
}

// ---- one row ----

struct Row {
  Softmax s, t, hard;
  double loss = 0, total = 0, mass = 1;
};

Kind closed_kind(const DivergenceArgs& a) {
  if (a.t.raw.data == nullptr || a.term_count != 1) return Kind::AlphaBeta;
  const Kind k = (Kind)a.terms[0].kind;
  return k == Kind::ForwardKL || k == Kind::ReverseKL || k == Kind::CrossEntropy ? k : Kind::AlphaBeta;
}

template <Kind K>
void closed_loss(const DivergenceArgs& a, int64_t r, Row& row, Scratch& w) {
  const double cross = closed_sums<K>(a, r, row.s, row.t, w);
  const double ls = std::log(row.s.sum), lt = std::log(row.t.sum);
  if (!a.normalized) {  // t is log w: -sum w log q
    row.mass = row.t.sum, row.t.sum = 1;
    row.loss = cross + row.mass * ls;
  } else if (K == Kind::ForwardKL) {
    row.loss = cross / row.t.sum - lt + ls;
  } else if (K == Kind::ReverseKL) {
    row.loss = cross / row.s.sum - ls + lt;
  } else {
    row.loss = cross / row.t.sum + ls;
  }
}

// cross-entropy at the label's own temperature
double label_loss(const DivergenceArgs& a, int64_t r, Softmax& s, Scratch& w) {
  double sum = 0;
  if (a.label_smoothing != 0.f) {
    for (int64_t v = 0; v < a.vocab; v += TILE) {
      const int64_t n = smaller(TILE, a.vocab - v);
      load_logits(a.s, r, v, n, w.zs);
      float part = 0;
      const float top = s.top;
#pragma omp simd reduction(+ : part)
      for (int64_t i = 0; i < n; i++) part += w.zs[i] - top;
      sum += part;
    }
  }
  load_logits(a.s, r, a.labels[r], 1, w.zs);
  const double eps = a.label_smoothing, ls = std::log(s.sum), x = (double)(w.zs[0] - s.top) * s.inv;
  return (1 - eps) * (ls - x) + (eps == 0 ? 0 : eps * (ls - sum * s.inv / (double)a.vocab));
}

void add_label_gradient(const DivergenceArgs& a, int64_t r, int64_t v, int64_t n, const Softmax& s, float c, Scratch& w) {
  const float top = s.top, inv = s.inv, cq = c * s.scale(), even = c * a.label_smoothing / (float)a.vocab;
#pragma omp simd
  for (int64_t i = 0; i < n; i++) w.grad[i] += cq * fastkd_exp((w.zs[i] - top) * inv) - even;
  const int64_t y = a.labels[r] - v;
  if (y >= 0 && y < n) w.grad[y] -= c * (1.f - a.label_smoothing);
}

void one_row(const DivergenceArgs& a, int64_t r, Scratch& w, float* h) {
  const Kind kind = closed_kind(a);
  const bool dense = a.t.raw.data != nullptr, general = dense && kind == Kind::AlphaBeta;
  Row row;
  row.s = {largest(a.s, r, a.vocab, w.zs), 1.f / a.s.temperature[r], 0};
  const float weight = dense && !general ? a.terms[0].weight[r] : 1.f;
  if (dense) {
    row.t = {a.normalized ? largest(a.t, r, a.vocab, w.zt) : 0.f, 1.f / a.t.temperature[r], 0};
    if (general) {
      sum_exponentials(a.s, r, a.vocab, row.s, w.zs);
      sum_exponentials(a.t, r, a.vocab, row.t, w.zt);
      general_sums(a, r, row.s, row.t, w, h, row.loss, row.total);
    } else if (weight != 0.f) {
      if (kind == Kind::ForwardKL) closed_loss<Kind::ForwardKL>(a, r, row, w);
      if (kind == Kind::ReverseKL) closed_loss<Kind::ReverseKL>(a, r, row, w);
      if (kind == Kind::CrossEntropy) closed_loss<Kind::CrossEntropy>(a, r, row, w);
    }
  }
  double loss = weight == 0.f ? 0.0 : weight * row.loss;
  const float hard = a.labels == nullptr ? 0.f : a.label_weight[r];
  if (hard != 0.f) {
    row.hard = {row.s.top, 1.f / a.label_temperature[r], row.s.sum};
    if (row.hard.inv != row.s.inv || row.s.sum == 0) sum_exponentials(a.s, r, a.vocab, row.hard, w.zs);
    loss += hard * label_loss(a, r, row.hard, w);
  }
  a.loss[r] = (float)loss;
  if (a.g.data == nullptr) return;
  const float c = weight * row.s.inv;
  for (int64_t v = 0; v < a.vocab; v += TILE) {
    const int64_t n = smaller(TILE, a.vocab - v);
    load_logits(a.s, r, v, n, w.zs);
    if (general) {
      general_gradient(n, row.s, c, row.total, h + v, w);
    } else if (dense && weight != 0.f) {
      load_logits(a.t, r, v, n, w.zt);
      if (kind == Kind::ReverseKL)
        closed_gradient<Kind::ReverseKL>(n, row.s, row.t, c, row.mass, row.loss, w);
      else
        closed_gradient<Kind::ForwardKL>(n, row.s, row.t, c, row.mass, row.loss, w);
    } else {
      for (int64_t i = 0; i < n; i++) w.grad[i] = 0.f;
    }
    if (hard != 0.f) add_label_gradient(a, r, v, n, row.hard, hard * row.hard.inv, w);
    store_gradient(a.g, a.s, a.factor[r], r, v, n, w.zs, w.grad);
  }
}

void divergence(const DivergenceArgs& a) {
  const bool general = a.t.raw.data != nullptr && closed_kind(a) == Kind::AlphaBeta;
#pragma omp parallel num_threads(a.threads)
  {
    Scratch w;
    float* h = general ? (float*)std::malloc(a.vocab * sizeof(float)) : nullptr;
#pragma omp for schedule(dynamic, 1)
    for (int64_t r = 0; r < a.n; r++) {
      if (a.factor[r] == 0.f) {
        a.loss[r] = 0.f;
        if (a.g.data != nullptr) zero_gradient(a.g, r);
      } else {
        one_row(a, r, w, h);
      }
    }
    std::free(h);
  }
}

void select(const SelectArgs& a) {
#pragma omp parallel num_threads(a.threads)
  {
    Scratch w;
#pragma omp for schedule(dynamic, 1)
    for (int64_t r = 0; r < a.n; r++) {
      Softmax s{largest(a.s, r, a.vocab, w.zs), 1.f / a.s.temperature[r], 0};
      sum_exponentials(a.s, r, a.vocab, s, w.zs);
      const double ls = std::log(s.sum);
      double mass = 0;
      for (int64_t k = 0; k < a.k; k++) {
        load_logits(a.s, r, a.ids[r * a.k + k], 1, w.zs);
        a.out[r * a.k + k] = (float)((double)(w.zs[0] - s.top) * s.inv - ls);
        if (a.cotangent != nullptr) mass += a.cotangent[r * a.k + k];
      }
      if (a.g.data == nullptr) continue;
      const float c = -(float)mass * s.inv * s.scale();
      for (int64_t v = 0; v < a.vocab; v += TILE) {
        const int64_t n = smaller(TILE, a.vocab - v);
        load_logits(a.s, r, v, n, w.zs);
#pragma omp simd
        for (int64_t i = 0; i < n; i++) w.grad[i] = c * fastkd_exp((w.zs[i] - s.top) * s.inv);
        for (int64_t k = 0; k < a.k; k++) {
          const int64_t i = a.ids[r * a.k + k] - v;
          if (i >= 0 && i < n) w.grad[i] += a.cotangent[r * a.k + k] * s.inv;
        }
        store_gradient(a.g, a.s, 1.f, r, v, n, w.zs, w.grad);
      }
    }
  }
}

int64_t index_of(const Source& src, int64_t row, int64_t vocab, float top, float* z) {
  for (int64_t v = 0; v < vocab; v += TILE) {
    const int64_t n = smaller(TILE, vocab - v);
    load_logits(src, row, v, n, z);
    for (int64_t i = 0; i < n; i++)
      if (z[i] == top) return v + i;
  }
  return 0;
}

// sum e^x x, with 0 where e^x is 0
double first_moment(const StatsArgs& a, int64_t r, const Softmax& s, Scratch& w) {
  double moment = 0;
  for (int64_t v = 0; v < a.vocab; v += TILE) {
    const int64_t n = smaller(TILE, a.vocab - v);
    load_logits(a.s, r, v, n, w.zs);
    float part = 0;
#pragma omp simd reduction(+ : part)
    for (int64_t i = 0; i < n; i++) {
      const float x = (w.zs[i] - s.top) * s.inv, e = fastkd_exp(x);
      part += e == 0.f ? 0.f : e * x;
    }
    moment += part;
  }
  return moment;
}

void stats(const StatsArgs& a) {
#pragma omp parallel num_threads(a.threads)
  {
    Scratch w;
#pragma omp for schedule(dynamic, 1)
    for (int64_t r = 0; r < a.n; r++) {
      Softmax s{largest(a.s, r, a.vocab, w.zs), 1.f / a.s.temperature[r], 0};
      sum_exponentials(a.s, r, a.vocab, s, w.zs);
      const double ls = std::log(s.sum), entropy = ls - first_moment(a, r, s, w) / s.sum;
      const int64_t top = index_of(a.s, r, a.vocab, s.top, w.zs);
      a.lse[r] = (float)((double)s.top * s.inv + ls);
      a.entropy[r] = (float)entropy;
      a.max_log_prob[r] = (float)-ls;
      a.argmax[r] = top;
      if (a.g.data == nullptr) continue;
      const float d_lse = a.cotangent[0][r], d_entropy = a.cotangent[1][r], d_max = a.cotangent[2][r];
      const float c = s.inv * s.scale(), even = d_lse - d_max - d_entropy * (float)(entropy - ls);
      for (int64_t v = 0; v < a.vocab; v += TILE) {
        const int64_t n = smaller(TILE, a.vocab - v);
        load_logits(a.s, r, v, n, w.zs);
#pragma omp simd
        for (int64_t i = 0; i < n; i++) {  // q (d_lse - d_max - d_entropy (log q + entropy))
          const float x = (w.zs[i] - s.top) * s.inv, q = fastkd_exp(x);
          w.grad[i] = q == 0.f ? 0.f : c * q * (even - d_entropy * x);
        }
        if (top >= v && top < v + n) w.grad[top - v] += d_max * s.inv;
        store_gradient(a.g, a.s, 1.f, r, v, n, w.zs, w.grad);
      }
    }
  }
}

void accumulate(const AccumulateArgs& a) {
#pragma omp parallel num_threads(a.threads)
  {
    float part[TILE];
#pragma omp for schedule(static)
    for (int64_t v = 0; v < a.n; v += TILE) {
      const int64_t n = smaller(TILE, a.n - v);
      if (a.first) {
        load(a.part, a.dtype, v, n, a.acc + v);
        continue;
      }
      load(a.part, a.dtype, v, n, part);
      float* acc = a.acc + v;
#pragma omp simd
      for (int64_t i = 0; i < n; i++) acc[i] += part[i];
    }
  }
}

double kl_div_sum(const KLDivArgs& a) {
  double sum = 0;
#pragma omp parallel num_threads(a.threads) reduction(+ : sum)
  {
    Scratch w;
#pragma omp for schedule(static)
    for (int64_t v = 0; v < a.n; v += TILE) {
      const int64_t n = smaller(TILE, a.n - v);
      load(a.x, a.dtype, v, n, w.zs);
      load(a.t, a.dtype, v, n, w.zt);
      float part = 0;
      if (a.log_target) {
#pragma omp simd reduction(+ : part)
        for (int64_t i = 0; i < n; i++) {
          const float t = fastkd_exp(w.zt[i]);
          part += t == 0.f ? 0.f : t * (w.zt[i] - w.zs[i]);
        }
      } else {
#pragma omp simd reduction(+ : part)
        for (int64_t i = 0; i < n; i++) {
          const float t = w.zt[i], l = t < 0.f ? __builtin_nanf("") : fastkd_log(t);
          part += t == 0.f ? 0.f : t * (l - w.zs[i]);
        }
      }
      sum += part;
    }
  }
  return sum;
}

void kl_div_grad(const KLDivArgs& a) {
#pragma omp parallel num_threads(a.threads)
  {
    Scratch w;
#pragma omp for schedule(static)
    for (int64_t v = 0; v < a.n; v += TILE) {
      const int64_t n = smaller(TILE, a.n - v);
      load(a.t, a.dtype, v, n, w.zt);
      const float scale = -a.scale;
      if (a.log_target) {
#pragma omp simd
        for (int64_t i = 0; i < n; i++) w.grad[i] = scale * fastkd_exp(w.zt[i]);
      } else {
#pragma omp simd
        for (int64_t i = 0; i < n; i++) w.grad[i] = scale * w.zt[i];
      }
      store(a.out, a.dtype, v, n, w.grad);
    }
  }
}

#define FASTKD_STRING_(x) #x
#define FASTKD_STRING(x) FASTKD_STRING_(x)

}  // namespace

extern const Kernels kernels = {FASTKD_STRING(FASTKD_ISA), divergence, select, stats, accumulate, kl_div_sum, kl_div_grad};

}  // namespace FASTKD_ISA
}  // namespace fastkd
