// The row ops on a CPU. Compiled once for each instruction set, each into a namespace of its own (FASTKD_ISA).
// Rows are handed to threads; a row is walked in tiles of float32 that stay in the first-level cache.
#include "rows.h"
#include "vector_math.h"
#include "pointwise.h"
#include "transfer.h"

#include <cfloat>
#include <cmath>
#include <cstdlib>

namespace fastkd {
namespace FASTKD_ISA {
namespace {

constexpr int64_t TILE = 1024, BLOCK = 256;  // BLOCK: between requests for what comes next
constexpr float INF = __builtin_inff();

// effective logits of columns [v, v + n) of a row: in z, or the logits themselves where nothing is to be done
const float* load_logits(const Source& src, int64_t row, int64_t v, int64_t n, float* z) {
  const Matrix& m = src.raw;
  const int64_t own = v >= m.width ? 0 : smaller(n, m.width - v);
  const float scale = src.scale, cap = src.softcap;
  if (m.dtype == Float32 && own == n && scale == 1.f && cap == 0.f) return (const float*)m.data + row * m.stride + v;
  load(m.data, m.dtype, row * m.stride + v, own, z);
  if (cap != 0.f) {
    const float inner = scale / cap;
#pragma omp simd
    for (int64_t i = 0; i < own; i++) z[i] = cap * fastkd_tanh(z[i] * inner);
  } else if (scale != 1.f) {
#pragma omp simd
    for (int64_t i = 0; i < own; i++) z[i] *= scale;
  }
  for (int64_t i = own; i < n; i++) z[i] = -INF;
  return z;
}

// Columns [v, v + n) of a row of the gradient, as far as the matrix has them: past the caches where it is not written over
// the logits, which a GEMM is about to read.
void store_tile(const Matrix& g, const Source& src, int64_t row, int64_t v, int64_t n, const float* grad) {
  n = v >= g.width ? 0 : smaller(n, g.width - v);
  const int64_t offset = row * g.stride + v;
  if (g.data == src.raw.data) return store(g.data, g.dtype, offset, n, grad);
  if (g.dtype == Float32) return stream((float*)g.data + offset, grad, n * sizeof(float));
  uint16_t half[TILE];
  store(half, g.dtype, 0, n, grad);
  stream((uint16_t*)g.data + offset, half, n * sizeof(uint16_t));
}

// writes g * dz/draw * factor
void store_gradient(const Matrix& g, const Source& src, float factor, int64_t row, int64_t v, int64_t n, const float* z,
                    float* grad) {
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
  store_tile(g, src, row, v, n, grad);
}

void zero_gradient(const Matrix& g, int64_t row) {
  const int64_t size = size_of(g.dtype);
  __builtin_memset((char*)g.data + row * g.stride * size, 0, g.width * size);
}

float largest(const Source& src, int64_t row, int64_t vocab, float* tile) {
  float top = -INF;
  for (int64_t v = 0; v < vocab; v += TILE) {
    const int64_t n = smaller(TILE, vocab - v);
    const float* z = load_logits(src, row, v, n, tile);
#pragma omp simd reduction(max : top)
    for (int64_t i = 0; i < n; i++) top = z[i] > top ? z[i] : top;
  }
  return top;
}

constexpr float LOG2E = 1.44269504088896341f;
constexpr double LN2 = 0.693147180559945309;

// A row's softmax: x = (z - top) * inv, probability e^x / sum
struct Softmax {
  float top, inv;
  double sum;
  double above(float z) const { return ((double)z - top) * inv; }
  float scale() const { return (float)(1.0 / sum); }
};

Softmax softmax_of(const Source& src, int64_t row, int64_t vocab, float* tile) {
  return {largest(src, row, vocab, tile), 1.f / src.temperature[row], 0};
}

// What one pass over a tile leaves: the largest logits, from which x and y are measured there, and sums; and once the whole
// row is seen, the factors that bring e^x and e^y of the tile to the row's own largest logit, and x - y (in units of ln 2).
struct Tile {
  float ms, mt;
  double ls, lt, cross;
  float ws, wt, gap;
};

// Each thread's memory: tiles, and e^x of a row of the student and of the teacher [vocab]
struct Scratch {
  float zs[TILE], zt[TILE], grad[TILE];
  Tile* tiles;
  float *es, *et;
  explicit Scratch(int64_t vocab) {
    const int64_t count = (vocab + TILE - 1) / TILE;
    tiles = (Tile*)std::malloc(count * sizeof(Tile) + 2 * vocab * sizeof(float));
    if (tiles == nullptr) std::abort();
    es = (float*)(tiles + count), et = es + vocab;
  }
  ~Scratch() { std::free(tiles); }
  Scratch(const Scratch&) = delete;
};

// e[0..vocab) = e^x and its sum
void exponentials(const Source& src, int64_t row, int64_t vocab, Softmax& s, float* tile, float* e) {
  double sum = 0;
  const float top = s.top, inv = s.inv * LOG2E;
  for (int64_t v = 0; v < vocab; v += TILE) {
    const int64_t n = smaller(TILE, vocab - v);
    const float* z = load_logits(src, row, v, n, tile);
    float* out = e + v;
    float part = 0;
#pragma omp simd reduction(+ : part)
    for (int64_t i = 0; i < n; i++) {
      out[i] = fastkd_exp2((z[i] - top) * inv);
      part += out[i];
    }
    sum += part;
  }
  s.sum = sum;
}

// Effective logits of a tile as load_logits gives them, and the largest, from which differences are defined even where all
// are -inf.
const float* load_with_top(const Source& src, int64_t r, int64_t v, int64_t n, float* tile, float& largest) {
  const float* z = tile;
  float top = -INF;
  if (src.raw.dtype == BFloat16 && v + n <= src.raw.width && src.scale == 1.f && src.softcap == 0.f) {
    const uint16_t* x = (const uint16_t*)src.raw.data + r * src.raw.stride + v;
#pragma omp simd reduction(max : top)
    for (int64_t i = 0; i < n; i++) {
      tile[i] = bits_to_float((uint32_t)x[i] << 16);
      top = tile[i] > top ? tile[i] : top;
    }
  } else {
    z = load_logits(src, r, v, n, tile);
#pragma omp simd reduction(max : top)
    for (int64_t i = 0; i < n; i++) top = z[i] > top ? z[i] : top;
  }
  largest = top == -INF ? -FLT_MAX : top;
  return z;
}

// Both softmaxes of a tile, measured from its own largest logits: e^x in es, e^y in et (reverse KL: (x - y) / ln 2), their
// sums, and for the closed forms the sum of the divergence's terms without the logarithms of those sums.
template <Kind K, bool NORMALIZED>
Tile tile_sums(const DivergenceArgs& a, int64_t r, int64_t v, float is, float it, Scratch& w) {
  const int64_t n = smaller(TILE, a.vocab - v);
  float ms, mt;
  const float *zs = load_with_top(a.s, r, v, n, w.zs, ms), *zt = load_with_top(a.t, r, v, n, w.zt, mt);
  float *es = w.es + v, *et = w.et + v;
  if (!NORMALIZED) mt = 0;
  double ls = 0, lt = 0, cross = 0;
  for (int64_t b = 0; b < n; b += BLOCK) {
    const int64_t end = smaller(n, b + BLOCK);
    prefetch(a.s.raw, r, v + b + TILE, BLOCK);
    prefetch(a.t.raw, r, v + b + TILE, BLOCK);
    float p1 = 0, p2 = 0, p3 = 0;
#pragma omp simd reduction(+ : p1, p2, p3)
    for (int64_t i = b; i < end; i++) {
      const float x = (zs[i] - ms) * is, y = (zt[i] - mt) * it;  // in units of ln 2
      const float q = fastkd_exp2(x), p = fastkd_exp2(NORMALIZED ? y : 128.f < y ? 128.f : y);
      p1 += q;
      p2 += p;
      es[i] = q;
      et[i] = K == Kind::ReverseKL ? x - y : p;
      if constexpr (K == Kind::ForwardKL) p3 += p == 0.f ? 0.f : p * (y - x);
      if constexpr (K == Kind::ReverseKL) p3 += q == 0.f ? 0.f : q * (x - y);
      if constexpr (K == Kind::CrossEntropy) p3 += p == 0.f ? 0.f : -p * x;
    }
    ls += p1, lt += p2, cross += p3;
  }
  return {ms, mt, ls, lt, cross * LN2, 0, 0, 0};
}

// The tiles' sums as sums of the row, and their factors; returns the sum of the divergence's terms.
template <Kind K>
double gather_tiles(int64_t vocab, Softmax& s, Softmax& t, Scratch& w) {
  double ls = 0, lt = 0, cross = 0;
  for (int64_t v = 0; v < vocab; v += TILE) {
    Tile& k = w.tiles[v / TILE];
    const double ds = s.above(k.ms), dt = t.above(k.mt), gap = ds - dt;
    k.ws = (float)std::exp(ds), k.wt = (float)std::exp(dt), k.gap = (float)(gap / LN2);
    ls += k.ws * k.ls, lt += k.wt * k.lt;  // a NaN among the logits is in these, whatever the tile's weight
    if (K == Kind::ForwardKL && k.wt != 0.f) cross += k.wt * (k.cross - k.lt * gap);  // cross may be infinite
    if (K == Kind::ReverseKL && k.ws != 0.f) cross += k.ws * (k.cross + k.ls * gap);
    if (K == Kind::CrossEntropy && k.wt != 0.f) cross += k.wt * (k.cross - k.lt * ds);
  }
  // no mass at all, or a NaN: the whole gradient is NaN
  for (int64_t v = 0; v < vocab && !(ls > 0 && lt == lt); v++) w.es[v] = w.et[v] = __builtin_nanf("");
  s.sum = ls, t.sum = lt;
  return cross;
}

// Both softmaxes of a row in one pass over its logits.
template <Kind K, bool NORMALIZED>
double both_sums(const DivergenceArgs& a, int64_t r, Softmax& s, Softmax& t, Scratch& w) {
  s.top = -FLT_MAX, t.top = NORMALIZED ? -FLT_MAX : 0.f;
  for (int64_t v = 0; v < a.vocab; v += TILE) {
    const Tile k = tile_sums<K, NORMALIZED>(a, r, v, s.inv * LOG2E, t.inv * LOG2E, w);
    w.tiles[v / TILE] = k;
    s.top = k.ms > s.top ? k.ms : s.top, t.top = k.mt > t.top ? k.mt : t.top;
  }
  return gather_tiles<K>(a.vocab, s, t, w);
}

// One divergence on a tile: h[0..n) = weight * h (FIRST), or += ; and the sums of phi and of h. h may be et.
template <Kind K, bool FIRST, bool PLAIN = false>
void tile_point(const Term& term, float weight, int64_t n, const Softmax& s, const Softmax& t, const Tile& k, const float* zs,
                const float* zt, const float* es, const float* et, float* h, double& loss, double& total) {
  const float a = term.a, b = term.b, ms = k.ms, mt = k.mt, is = s.inv, it = t.inv;
  const float ls = (float)(std::log(s.sum) - s.above(ms)), lt = (float)(std::log(t.sum) - t.above(mt));
  const float rs = (float)std::exp(-(double)ls), rt = (float)std::exp(-(double)lt);  // p = e^lp also to lp's rounding
  double sum_phi = 0, sum_h = 0;
  for (int64_t b0 = 0; b0 < n; b0 += BLOCK) {
    const int64_t end = smaller(n, b0 + BLOCK);
    float part_phi = 0, part_h = 0;
#pragma omp simd reduction(+ : part_phi, part_h)
    for (int64_t i = b0; i < end; i++) {
      const Point f = point<K, PLAIN>((zt[i] - mt) * it - lt, (zs[i] - ms) * is - ls, et[i] * rt, es[i] * rs, a, b);
      part_phi += f.phi;
      part_h += f.h;
      h[i] = FIRST ? weight * f.h : h[i] + weight * f.h;
    }
    sum_phi += part_phi, sum_h += part_h;
  }
  loss += weight * sum_phi;
  total += weight * sum_h;
}

// Any sum of divergences: h takes the place of e^y in et.
void general_sums(const DivergenceArgs& a, int64_t r, const Softmax& s, const Softmax& t, Scratch& w, double& loss,
                  double& total) {
  for (int64_t v = 0; v < a.vocab; v += TILE) {
    const int64_t n = smaller(TILE, a.vocab - v);
    const float *zs = load_logits(a.s, r, v, n, w.zs), *zt = load_logits(a.t, r, v, n, w.zt);
    float *es = w.es + v, *et = w.et + v, *h = a.term_count == 1 ? et : w.grad;
    const Tile& k = w.tiles[v / TILE];
    bool first = true;
    for (int i = 0; i < a.term_count; i++) {
      const Term& term = a.terms[i];
      const float weight = term.weight[r];
      if (weight == 0.f) continue;
      if (first && is_plain((Kind)term.kind, term.a, term.b)) {
        tile_point<Kind::AlphaBeta, true, true>(term, weight, n, s, t, k, zs, zt, es, et, h, loss, total);
        first = false;
        continue;
      }
      switch ((Kind)term.kind) {
#define X(name, id)                                                                              \
  case Kind::id:                                                                                 \
    first ? tile_point<Kind::id, true>(term, weight, n, s, t, k, zs, zt, es, et, h, loss, total)    \
          : tile_point<Kind::id, false>(term, weight, n, s, t, k, zs, zt, es, et, h, loss, total);  \
    break;
        FASTKD_DIVERGENCES(X)
#undef X
      }
      first = false;
    }
    if (first) __builtin_memset(h, 0, n * sizeof(float));
    if (h != et) __builtin_memcpy(et, h, n * sizeof(float));
  }
}

// ---- one row ----

struct Row {
  Softmax s, t, hard;
  double loss = 0;
  float cs = 0, ct = 0, shift = 0;  // gradient: cs * es + ct * et, or for reverse KL cs * es * (et - shift)
};

bool closed(const DivergenceArgs& a) {
  if (a.term_count != 1) return false;
  const Kind k = (Kind)a.terms[0].kind;
  return k == Kind::ForwardKL || k == Kind::ReverseKL || k == Kind::CrossEntropy;
}

template <Kind K>
void closed_row(const DivergenceArgs& a, int64_t r, float weight, Row& row, Scratch& w) {
  const double cross = a.normalized ? both_sums<K, true>(a, r, row.s, row.t, w) : both_sums<K, false>(a, r, row.s, row.t, w);
  const float c = weight * row.s.inv;
  double ls = std::log(row.s.sum), lt = std::log(row.t.sum), loss;
  if (!a.normalized) {  // t is log w: -sum w log q, gradient q sum(w) - w
    loss = cross + row.t.sum * ls;
    row.cs = c * (float)(row.t.sum / row.s.sum), row.ct = -c;
  } else if (K == Kind::ReverseKL) {  // q (log q - log p - KL)
    loss = cross / row.s.sum - ls + lt;
    row.cs = c * row.s.scale() * (float)LN2, row.shift = (float)((loss + ls - lt) / LN2);
  } else {  // q - p
    loss = cross / row.t.sum + ls - (K == Kind::ForwardKL ? lt : 0);
    row.cs = c * row.s.scale(), row.ct = -c * row.t.scale();
  }
  row.loss = weight * loss;
}

void general_row(const DivergenceArgs& a, int64_t r, Row& row, Scratch& w) {
  double total = 0;
  both_sums<Kind::AlphaBeta, true>(a, r, row.s, row.t, w);
  general_sums(a, r, row.s, row.t, w, row.loss, total);
  row.cs = -row.s.inv * row.s.scale() * (float)total, row.ct = row.s.inv;  // h - q sum h
}

// cross-entropy at the label's own temperature
double label_loss(const DivergenceArgs& a, int64_t r, const Softmax& s, Scratch& w) {
  double sum = 0;
  for (int64_t v = 0; v < a.vocab && a.label_smoothing != 0.f; v += TILE) {
    const int64_t n = smaller(TILE, a.vocab - v);
    const float* z = load_logits(a.s, r, v, n, w.zs);
    float part = 0;
#pragma omp simd reduction(+ : part)
    for (int64_t i = 0; i < n; i++) part += z[i] - s.top;
    sum += part;
  }
  const float z = *load_logits(a.s, r, a.labels[r], 1, w.zs);
  const double eps = a.label_smoothing, ls = std::log(s.sum), x = (double)(z - s.top) * s.inv;
  return (1 - eps) * (ls - x) + (eps == 0 ? 0 : eps * (ls - sum * s.inv / (double)a.vocab));
}

double label_sum(const DivergenceArgs& a, int64_t r, const Softmax& s, Scratch& w) {
  double sum = 0;
  const float top = s.top, inv = s.inv * LOG2E;
  for (int64_t v = 0; v < a.vocab; v += TILE) {
    const int64_t n = smaller(TILE, a.vocab - v);
    const float* z = load_logits(a.s, r, v, n, w.zs);
    float part = 0;
#pragma omp simd reduction(+ : part)
    for (int64_t i = 0; i < n; i++) part += fastkd_exp2((z[i] - top) * inv);
    sum += part;
  }
  return sum;
}

void add_label_gradient(const DivergenceArgs& a, int64_t r, int64_t v, int64_t n, const Softmax& s, float c, const float* z,
                        float* grad) {
  const float top = s.top, inv = s.inv * LOG2E, cq = c * s.scale(), even = c * a.label_smoothing / (float)a.vocab;
#pragma omp simd
  for (int64_t i = 0; i < n; i++) grad[i] += cq * fastkd_exp2((z[i] - top) * inv) - even;
  const int64_t y = a.labels[r] - v;
  if (y >= 0 && y < n) grad[y] -= c * (1.f - a.label_smoothing);
}

// grad[0..n) = factor * gradient with respect to the effective logits of a tile
void divergence_gradient(const Row& row, bool reverse, bool general, float factor, int64_t v, int64_t n, Scratch& w) {
  float* grad = w.grad;
  const float *es = w.es + v, *et = w.et + v;
  const Tile& k = w.tiles[v / TILE];
  const float cs = factor * row.cs * k.ws, ct = factor * row.ct * (general ? 1.f : k.wt), shift = row.shift - k.gap;
  if (reverse && k.ws == 0.f && es[0] == es[0]) {  // et may be infinite there
    __builtin_memset(grad, 0, n * sizeof(float));
  } else if (reverse) {
#pragma omp simd
    for (int64_t i = 0; i < n; i++) grad[i] = es[i] == 0.f ? 0.f : cs * es[i] * (et[i] - shift);
  } else {
#pragma omp simd
    for (int64_t i = 0; i < n; i++) grad[i] = (es[i] == 0.f ? 0.f : cs * es[i]) + ct * et[i];
  }
}

void one_row(const DivergenceArgs& a, int64_t r, Scratch& w) {
  const bool dense = a.t.raw.data != nullptr, general = dense && !closed(a);
  const Kind kind = dense && !general ? (Kind)a.terms[0].kind : Kind::AlphaBeta;
  const float weight = !dense ? 0.f : general ? 1.f : a.terms[0].weight[r];
  Row row;
  if (weight == 0.f) row.s = softmax_of(a.s, r, a.vocab, w.zs);
  if (weight != 0.f) {
    row.s.inv = 1.f / a.s.temperature[r], row.t.inv = 1.f / a.t.temperature[r];
    if (general) general_row(a, r, row, w);
    if (kind == Kind::ForwardKL) closed_row<Kind::ForwardKL>(a, r, weight, row, w);
    if (kind == Kind::ReverseKL) closed_row<Kind::ReverseKL>(a, r, weight, row, w);
    if (kind == Kind::CrossEntropy) closed_row<Kind::CrossEntropy>(a, r, weight, row, w);
  }
  const float hard = a.labels == nullptr ? 0.f : a.label_weight[r];
  if (hard != 0.f) {
    row.hard = {row.s.top, 1.f / a.label_temperature[r], row.s.sum};
    if (weight == 0.f || row.hard.inv != row.s.inv) row.hard.sum = label_sum(a, r, row.hard, w);
    row.loss += hard * label_loss(a, r, row.hard, w);
  }
  a.loss[r] = (float)row.loss;
  if (a.g.data == nullptr) return;
  const bool scaled = hard == 0.f && a.s.softcap == 0.f && weight != 0.f;  // dL/draw is dL/dz times one number
  for (int64_t v = 0; v < a.vocab; v += TILE) {
    const int64_t n = smaller(TILE, a.vocab - v);
    if (scaled) {
      divergence_gradient(row, kind == Kind::ReverseKL, general, a.factor[r] * a.s.scale, v, n, w);
      store_tile(a.g, a.s, r, v, n, w.grad);
      continue;
    }
    const float* z = load_logits(a.s, r, v, n, w.zs);
    if (weight != 0.f)
      divergence_gradient(row, kind == Kind::ReverseKL, general, 1.f, v, n, w);
    else
      __builtin_memset(w.grad, 0, n * sizeof(float));
    if (hard != 0.f) add_label_gradient(a, r, v, n, row.hard, hard * row.hard.inv, z, w.grad);
    store_gradient(a.g, a.s, a.factor[r], r, v, n, z, w.grad);
  }
}

void divergence(const DivergenceArgs& a) {
#pragma omp parallel num_threads(a.threads)
  {
    Scratch w(a.vocab);
#pragma omp for schedule(dynamic, 1)
    for (int64_t r = 0; r < a.n; r++) {
      if (a.factor[r] != 0.f) {
        one_row(a, r, w);
      } else {
        a.loss[r] = 0.f;
        if (a.g.data != nullptr) zero_gradient(a.g, r);
      }
    }
    fence();
  }
}

// g = factor * es * dz/draw, for a whole row
void store_row(const Matrix& g, const Source& src, float factor, int64_t r, int64_t vocab, Scratch& w) {
  for (int64_t v = 0; v < vocab; v += TILE) {
    const int64_t n = smaller(TILE, vocab - v);
    const float* z = src.softcap != 0.f ? load_logits(src, r, v, n, w.zs) : nullptr;
    store_gradient(g, src, factor, r, v, n, z, w.es + v);
  }
}

void select(const SelectArgs& a) {
#pragma omp parallel num_threads(a.threads)
  {
    Scratch w(a.vocab);
#pragma omp for schedule(dynamic, 1)
    for (int64_t r = 0; r < a.n; r++) {
      Softmax s = softmax_of(a.s, r, a.vocab, w.zs);
      exponentials(a.s, r, a.vocab, s, w.zs, w.es);
      const double ls = std::log(s.sum);
      const int64_t* ids = a.ids + r * a.k;
      for (int64_t k = 0; k < a.k; k++) {
        const float z = *load_logits(a.s, r, ids[k], 1, w.zs);
        a.out[r * a.k + k] = (float)((double)(z - s.top) * s.inv - ls);
      }
      if (a.g.data == nullptr) continue;
      const float* cotangent = a.cotangent + r * a.k;
      double mass = 0;
      for (int64_t k = 0; k < a.k; k++) mass += cotangent[k];
      const float c = -(float)mass * s.scale();
      for (int64_t i = 0; i < a.vocab; i++) w.es[i] *= c;
      for (int64_t k = 0; k < a.k; k++) w.es[ids[k]] += cotangent[k];
      store_row(a.g, a.s, s.inv, r, a.vocab, w);
    }
    fence();
  }
}

int64_t index_of(const Source& src, int64_t row, int64_t vocab, float top, float* tile) {
  for (int64_t v = 0; v < vocab; v += TILE) {
    const int64_t n = smaller(TILE, vocab - v);
    const float* z = load_logits(src, row, v, n, tile);
    for (int64_t i = 0; i < n; i++)
      if (z[i] == top) return v + i;
  }
  return 0;
}

bool has_nan(const Source& src, int64_t row, int64_t vocab, float* tile) {
  for (int64_t v = 0; v < vocab; v += TILE) {
    const int64_t n = smaller(TILE, vocab - v);
    const float* z = load_logits(src, row, v, n, tile);
    for (int64_t i = 0; i < n; i++)
      if (z[i] != z[i]) return true;
  }
  return false;
}

// sum e^x x, with 0 where e^x is 0
double first_moment(const StatsArgs& a, int64_t r, const Softmax& s, Scratch& w) {
  double moment = 0;
  for (int64_t v = 0; v < a.vocab; v += TILE) {
    const int64_t n = smaller(TILE, a.vocab - v);
    const float *z = load_logits(a.s, r, v, n, w.zs), *e = w.es + v;
    float part = 0;
#pragma omp simd reduction(+ : part)
    for (int64_t i = 0; i < n; i++) part += e[i] == 0.f ? 0.f : e[i] * ((z[i] - s.top) * s.inv);
    moment += part;
  }
  return moment;
}

void stats(const StatsArgs& a) {
#pragma omp parallel num_threads(a.threads)
  {
    Scratch w(a.vocab);
#pragma omp for schedule(dynamic, 1)
    for (int64_t r = 0; r < a.n; r++) {
      Softmax s = softmax_of(a.s, r, a.vocab, w.zs);
      exponentials(a.s, r, a.vocab, s, w.zs, w.es);
      const double ls = std::log(s.sum), entropy = ls - first_moment(a, r, s, w) / s.sum;
      const int64_t top = index_of(a.s, r, a.vocab, s.top, w.zs);
      a.lse[r] = s.top == -INF && !has_nan(a.s, r, a.vocab, w.zs) ? -INF : (float)((double)s.top * s.inv + ls);
      a.entropy[r] = (float)entropy;
      a.max_log_prob[r] = (float)-ls;
      a.argmax[r] = top;
      if (a.g.data == nullptr) continue;
      const float d_lse = a.cotangent[0][r], d_entropy = a.cotangent[1][r], d_max = a.cotangent[2][r];
      const float c = s.scale(), even = d_lse - d_max - d_entropy * (float)(entropy - ls);
      for (int64_t v = 0; v < a.vocab; v += TILE) {
        const int64_t n = smaller(TILE, a.vocab - v);
        const float* z = load_logits(a.s, r, v, n, w.zs);
        float* e = w.es + v;
#pragma omp simd
        for (int64_t i = 0; i < n; i++)  // q (d_lse - d_max - d_entropy (log q + entropy))
          e[i] = e[i] == 0.f ? 0.f : c * e[i] * (even - d_entropy * ((z[i] - s.top) * s.inv));
      }
      w.es[top] += d_max;
      store_row(a.g, a.s, s.inv, r, a.vocab, w);
    }
    fence();
  }
}

float join(uint16_t high, uint8_t low) { return bits_to_float((uint32_t)high << 16 | (uint32_t)low << 8); }

void accumulate(const AccumulateArgs& a) {
#pragma omp parallel num_threads(a.threads)
  {
    float part[TILE];
    const bool first = a.first;  // a copy: a store to bytes might change whatever is read through a pointer
#pragma omp for schedule(static)
    for (int64_t v = 0; v < a.n; v += TILE) {
      const int64_t n = smaller(TILE, a.n - v);
      load(a.part, a.dtype, v, n, part);
      if (a.low == nullptr) {
        float* acc = (float*)a.acc + v;
#pragma omp simd
        for (int64_t i = 0; i < n; i++) acc[i] = first ? part[i] : acc[i] + part[i];
        continue;
      }
      uint16_t* __restrict high = (uint16_t*)a.acc + v;
      uint8_t* __restrict low = a.low + v;
#pragma omp simd
      for (int64_t i = 0; i < n; i++) {
        const float sum = first ? part[i] : join(high[i], low[i]) + part[i];
        const uint32_t u = float_to_bits(sum), even = u + 0x7fu + (u >> 8 & 1u), bits = sum != sum ? 0x7fc00000u : even;
        high[i] = (uint16_t)(bits >> 16);
        low[i] = (uint8_t)(bits >> 8);
      }
    }
  }
}

void round_sum(const AccumulateArgs& a) {
#pragma omp parallel num_threads(a.threads)
  {
    float sum[TILE];
#pragma omp for schedule(static)
    for (int64_t v = 0; v < a.n; v += TILE) {
      const int64_t n = smaller(TILE, a.n - v);
      const uint16_t* __restrict high = (const uint16_t*)a.acc + v;
      const uint8_t* __restrict low = a.low + v;
#pragma omp simd
      for (int64_t i = 0; i < n; i++) sum[i] = join(high[i], low[i]);
      store(a.acc, BFloat16, v, n, sum);
    }
  }
}

double kl_div_sum(const KLDivArgs& a) {
  double sum = 0;
#pragma omp parallel num_threads(a.threads) reduction(+ : sum)
  {
    float zs[TILE], zt[TILE];
#pragma omp for schedule(static)
    for (int64_t v = 0; v < a.n; v += TILE) {
      const int64_t n = smaller(TILE, a.n - v);
      load(a.x, a.dtype, v, n, zs);
      load(a.t, a.dtype, v, n, zt);
      float part = 0;
      if (a.log_target) {
#pragma omp simd reduction(+ : part)
        for (int64_t i = 0; i < n; i++) {
          const float t = fastkd_exp(zt[i]);
          part += t == 0.f ? 0.f : t * (zt[i] - zs[i]);
        }
      } else {
#pragma omp simd reduction(+ : part)
        for (int64_t i = 0; i < n; i++) {
          const float t = zt[i], l = t < 0.f ? __builtin_nanf("") : fastkd_log(t);
          part += t >= 0.f && t < 1.17549435e-38f ? 0.f : t * (l - zs[i]);
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
    float zs[TILE], zt[TILE];
#pragma omp for schedule(static)
    for (int64_t v = 0; v < a.n; v += TILE) {
      const int64_t n = smaller(TILE, a.n - v);
      load(a.t, a.dtype, v, n, zt);
      const float scale = -a.scale;
      if (a.log_target) {
#pragma omp simd
        for (int64_t i = 0; i < n; i++) zs[i] = scale * fastkd_exp(zt[i]);
      } else {
#pragma omp simd
        for (int64_t i = 0; i < n; i++) zs[i] = scale * zt[i];
      }
      store(a.out, a.dtype, v, n, zs);
    }
  }
}

#define FASTKD_STRING_(x) #x
#define FASTKD_STRING(x) FASTKD_STRING_(x)

}  // namespace

extern const Kernels kernels = {FASTKD_STRING(FASTKD_ISA), divergence, select, stats, accumulate, round_sum, kl_div_sum, kl_div_grad};

}  // namespace FASTKD_ISA
}  // namespace fastkd
