// The row ops on a CPU. Compiled once for each instruction set, each into a namespace of its own (FASTKD_ISA).
// Rows are handed to threads; a row is walked in tiles of float32 that stay in the first-level cache.
#include "tiles.h"

namespace fastkd {
namespace FASTKD_ISA {
namespace {

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
  Softmax s, t;
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
  const bool general = !closed(a);
  const Kind kind = general ? Kind::AlphaBeta : (Kind)a.terms[0].kind;
  const float weight = general ? 1.f : a.terms[0].weight[r];
  Row row;
  if (weight != 0.f) {
    row.s.inv = 1.f / a.s.temperature[r], row.t.inv = 1.f / a.t.temperature[r];
    if (general) general_row(a, r, row, w);
    if (kind == Kind::ForwardKL) closed_row<Kind::ForwardKL>(a, r, weight, row, w);
    if (kind == Kind::ReverseKL) closed_row<Kind::ReverseKL>(a, r, weight, row, w);
    if (kind == Kind::CrossEntropy) closed_row<Kind::CrossEntropy>(a, r, weight, row, w);
  }
  const Label label(a, r, weight != 0.f ? &row.s : nullptr, w.zs);
  if (label.weight != 0.f) row.loss += label.loss(a.s, r, w.zs);
  a.loss[r] = (float)row.loss;
  if (a.g.data == nullptr) return;
  const bool scaled = label.weight == 0.f && a.s.softcap == 0.f && weight != 0.f;  // dL/draw is dL/dz times one number
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
    if (label.weight != 0.f) label.add_gradient(v, n, z, w.grad);
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

extern const Kernels kernels = {FASTKD_STRING(FASTKD_ISA), divergence, sparse, select, stats, top, accumulate, round_sum, kl_div_sum, kl_div_grad};

}  // namespace FASTKD_ISA
}  // namespace fastkd
