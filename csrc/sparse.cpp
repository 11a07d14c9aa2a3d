// Row ops against a teacher that lists k entries of a row, and the k likeliest entries of a row.
// One pass over the logits leaves e^x in es; what is listed is taken out of it, and et holds the gradient of the listed
// entries, and zeros.
#include "tiles.h"

#include <algorithm>

namespace fastkd {
namespace FASTKD_ISA {
namespace {

// Entries that a row lists, and perhaps all others as one more: log-probabilities, probabilities, h = dL/dlog q.
struct Outcomes {
  int64_t n = 0;
  int64_t* id;
  float *lp, *lq, *p, *q, *h;
  bool* again;  // stands in the list already
  explicit Outcomes(int64_t k) {
    id = (int64_t*)std::malloc((k + 1) * (sizeof(int64_t) + 5 * sizeof(float) + 1));
    if (id == nullptr) std::abort();
    lp = (float*)(id + k + 1), lq = lp + k + 1, p = lq + k + 1, q = p + k + 1, h = q + k + 1;
    again = (bool*)(h + k + 1);
  }
  ~Outcomes() { std::free(id); }
  Outcomes(const Outcomes&) = delete;
};

constexpr float LISTED = 1.f;  // in et

// e^x of a row, tile by tile from the tile's own largest logit, the row's softmax and the sum of x; logits into z if given
double online(const Source& src, int64_t r, int64_t vocab, Softmax& s, Scratch& w, float* keep) {
  s.top = -FLT_MAX, s.inv = 1.f / src.temperature[r], s.sum = 0;
  const float inv = s.inv * LOG2E;
  for (int64_t v = 0; v < vocab; v += TILE) {
    const int64_t n = smaller(TILE, vocab - v);
    Tile& k = w.tiles[v / TILE];
    const float* z = load_with_top(src, r, v, n, w.zs, k.ms);
    float* es = w.es + v;
    const float ms = k.ms;
    double ls = 0, xs = 0;
    for (int64_t b = 0; b < n; b += BLOCK) {
      const int64_t end = smaller(n, b + BLOCK);
      prefetch(src.raw, r, v + b + TILE, BLOCK);
      float part = 0, moved = 0;
#pragma omp simd reduction(+ : part, moved)
      for (int64_t i = b; i < end; i++) {
        const float x = (z[i] - ms) * inv;
        es[i] = fastkd_exp2(x);
        part += es[i];
        moved += x;
      }
      ls += part, xs += moved;
    }
    k.ls = ls, k.cross = xs * LN2;
    s.top = ms > s.top ? ms : s.top;
    if (keep != nullptr) __builtin_memcpy(keep + v, z, n * sizeof(float));
  }
  double xs = 0;
  for (int64_t v = 0; v < vocab; v += TILE) {
    Tile& k = w.tiles[v / TILE];
    const double d = s.above(k.ms);
    k.ws = (float)std::exp(d);
    s.sum += k.ws * k.ls;
    xs += k.cross + (double)smaller(TILE, vocab - v) * d;
  }
  for (int64_t v = 0; v < vocab && !(s.sum > 0); v++) w.es[v] = __builtin_nanf("");  // no mass at all, or a NaN
  return xs;
}

// Takes an entry out of es and marks it; its log q
float take(const Source& src, int64_t r, int64_t id, const Softmax& s, double log_sum, Scratch& w) {
  w.es[id] = 0.f, w.et[id] = LISTED;
  float z;
  return (float)(s.above(*load_logits(src, r, id, 1, &z)) - log_sum);
}

// Mass in es of what is not listed, relative to the row's top, and its log q. Where it is too small for that, e^x is made
// again from the largest logit that is not listed.
double unlisted(const Source& src, int64_t r, int64_t vocab, const Softmax& s, double log_sum, Scratch& w, float& log_q) {
  double rest = 0;
  for (int64_t v = 0; v < vocab; v += TILE) {
    const float* es = w.es + v;
    double sum = 0;
    for (int64_t b = 0, n = smaller(TILE, vocab - v); b < n; b += BLOCK) {
      const int64_t end = smaller(n, b + BLOCK);
      float part = 0;
#pragma omp simd reduction(+ : part)
      for (int64_t i = b; i < end; i++) part += es[i];
      sum += part;
    }
    rest += w.tiles[v / TILE].ws * sum;
  }
  log_q = (float)(std::log(rest) - log_sum);
  if (!(rest < 1e-25 * s.sum)) return rest;
  float top = -INF;
  for (int64_t v = 0; v < vocab; v += TILE) {
    const int64_t n = smaller(TILE, vocab - v);
    const float *z = load_logits(src, r, v, n, w.zs), *et = w.et + v;
    for (int64_t i = 0; i < n; i++) top = et[i] == 0.f && z[i] > top ? z[i] : top;
  }
  log_q = -INF;
  if (top == -INF) return 0;
  rest = 0;
  for (int64_t v = 0; v < vocab; v += TILE) {
    const int64_t n = smaller(TILE, vocab - v);
    const float *z = load_logits(src, r, v, n, w.zs), *et = w.et + v;
    float *es = w.es + v, part = 0;
    for (int64_t i = 0; i < n; i++) {
      es[i] = et[i] == 0.f ? fastkd_exp2((z[i] - top) * s.inv * LOG2E) : 0.f;
      part += es[i];
    }
    rest += part;
    w.tiles[v / TILE].ws = 1.f;
  }
  log_q = (float)(s.above(top) + std::log(rest) - log_sum);
  return rest;
}

// f (c e + even), and f times what et holds of the listed entries, as the gradient of a whole row; f has all factors
// already where dL/draw is dL/dz times one number (plain)
template <class Args>
void store_sparse(const Args& a, int64_t r, bool plain, float factor, float f, float c, float even, const Label* label,
                  Scratch& w) {
  for (int64_t v = 0; v < a.vocab; v += TILE) {
    const int64_t n = smaller(TILE, a.vocab - v);
    const float *es = w.es + v, *et = w.et + v, ce = f * c * w.tiles[v / TILE].ws, constant = f * even;
    float* grad = w.grad;
#pragma omp simd
    for (int64_t i = 0; i < n; i++) grad[i] = (es[i] == 0.f ? 0.f : ce * es[i]) + constant + f * et[i];
    if (plain) {
      store_tile(a.g, a.s, r, v, n, grad);
      continue;
    }
    const float* z = load_logits(a.s, r, v, n, w.zs);
    if (label != nullptr) label->add_gradient(v, n, z, grad);
    store_gradient(a.g, a.s, factor, r, v, n, z, grad);
  }
}

template <Kind K>
void add_term(const Term& term, float weight, Outcomes& o, double& loss, double& total) {
  const float a = term.a, b = term.b;
  const float *lp = o.lp, *lq = o.lq, *p = o.p, *q = o.q;
  float* h = o.h;
  double sum_phi = 0, sum_h = 0;
  for (int64_t start = 0; start < o.n; start += BLOCK) {
    const int64_t end = smaller(o.n, start + BLOCK);
    float part_phi = 0, part_h = 0;
#pragma omp simd reduction(+ : part_phi, part_h)
    for (int64_t i = start; i < end; i++) {
      const Point f = point<K>(lp[i], lq[i], p[i], q[i], a, b);
      part_phi += f.phi;
      part_h += f.h;
      h[i] += weight * f.h;
    }
    sum_phi += part_phi, sum_h += part_h;
  }
  loss += weight * sum_phi;
  total += weight * sum_h;
}

// The listed entries that are there, with log q measured in the student's softmax, over the row or over them alone.
void gather(const SparseArgs& a, int64_t r, const Softmax& s, Outcomes& o, Scratch& w) {
  const int64_t* ids = a.ids + r * a.k;
  const float* log_p = a.log_p + r * a.k;
  const double log_sum = a.rest == Rest::Out ? 0 : std::log(s.sum);
  o.n = 0;
  for (int64_t k = 0; k < a.k; k++) {
    if (ids[k] < 0) continue;
    // nearer to q than e^(log q), rounded
    const float e = a.rest == Rest::Out ? 0.f : w.es[ids[k]] * w.tiles[ids[k] / TILE].ws * s.scale();
    o.id[o.n] = ids[k], o.lp[o.n] = log_p[k], o.again[o.n] = w.et[ids[k]] != 0.f;
    o.lq[o.n] = take(a.s, r, ids[k], s, log_sum, w);
    o.q[o.n] = o.again[o.n] ? fastkd_exp(o.lq[o.n]) : e;
    o.n++;
  }
}

// log q of the listed entries alone; x is in lq
void renormalize(Outcomes& o) {
  float top = -INF;
  for (int64_t i = 0; i < o.n; i++) top = o.lq[i] > top ? o.lq[i] : top;
  double sum = 0;
  for (int64_t i = 0; i < o.n; i++) sum += std::exp((double)o.lq[i] - (top == -INF ? 0 : top));
  const double lse = top + std::log(sum);
  for (int64_t i = 0; i < o.n; i++) {
    o.lq[i] = top == -INF ? __builtin_nanf("") : (float)(o.lq[i] - lse);
    o.q[i] = fastkd_exp(o.lq[i]);
  }
}

// sum of log q over what is not listed; xs: the sum of x over the row
double rest_of_logs(const SparseArgs& a, int64_t r, const Softmax& s, double xs, const Outcomes& o, Scratch& w) {
  const double log_sum = std::log(s.sum);
  double listed = 0;
  for (int64_t i = 0; i < o.n; i++) listed += o.lq[i];
  const double all = (double)a.vocab * log_sum;
  double sum = xs - all - listed;
  // not where little is left of large sums, nor where an infinity is listed
  if (std::fabs(sum) > 0.01 * (std::fabs(xs) + std::fabs(all) + std::fabs(listed)) && std::isfinite(sum)) return sum;
  sum = 0;
  for (int64_t v = 0; v < a.vocab; v += TILE) {
    const int64_t n = smaller(TILE, a.vocab - v);
    const float *z = load_logits(a.s, r, v, n, w.zs), *et = w.et + v;
    for (int64_t i = 0; i < n; i++) sum += et[i] == 0.f ? s.above(z[i]) - log_sum : 0;
  }
  return sum;
}

void one_row(const SparseArgs& a, int64_t r, Outcomes& o, Scratch& w) {
  Softmax s{0.f, 1.f / a.s.temperature[r], 1.0};
  const bool whole = a.rest != Rest::Out;
  const double xs = whole ? online(a.s, r, a.vocab, s, w, nullptr) : 0;
  const double log_sum = std::log(s.sum);
  gather(a, r, s, o, w);
  const int64_t k = o.n;
  if (!whole) renormalize(o);
  double rest = s.sum, loss = 0, total = 0;
  if (a.rest == Rest::One) {
    rest = unlisted(a.s, r, a.vocab, s, log_sum, w, o.lq[k]);
    o.lp[k] = a.log_rest[r], o.q[k] = fastkd_exp(o.lq[k]), o.n = k + 1;
  }
  for (int64_t i = 0; i < o.n; i++) o.p[i] = fastkd_exp(o.lp[i]), o.h[i] = 0.f;
  float even = 0;  // h of each entry that is not listed, for Rest::Each
  for (int i = 0; i < a.term_count; i++) {
    const Term& term = a.terms[i];
    const float weight = term.weight[r];
    if (weight == 0.f) continue;
    switch ((Kind)term.kind) {
#define X(name, id)                                    \
  case Kind::id:                                       \
    add_term<Kind::id>(term, weight, o, loss, total);  \
    break;
      FASTKD_DIVERGENCES(X)
#undef X
    }
    if (a.rest == Rest::Each && a.log_rest[r] != -INF && k < a.vocab) {
      const double u = std::exp((double)a.log_rest[r]), others = (double)(a.vocab - k);
      const double entropy = (Kind)term.kind == Kind::ForwardKL ? others * u * a.log_rest[r] : 0;
      loss += weight * (entropy - u * rest_of_logs(a, r, s, xs, o, w));
      total -= weight * u * others;
      even -= weight * (float)u;
    }
  }
  if (!whole && k == 0) loss = __builtin_nan("");
  const Label label(a, r, whole ? &s : nullptr, w.zs);
  if (label.weight != 0.f) loss += label.loss(a.s, r, w.zs);
  a.loss[r] = (float)loss;
  if (a.g.data != nullptr) {
    const float H = (float)total;
    double c = whole ? -total / s.sum : 0;  // q_j (-H)
    if (a.rest == Rest::One) c = rest == 0 ? 0 : (o.h[k] - o.q[k] * total) / rest;  // q_j (h_rest / q_rest - H)
    for (int64_t i = 0; i < k; i++) {
      const float value = o.h[i] - (o.again[i] ? 0.f : o.q[i] * H) - (o.again[i] ? 0.f : even);
      w.et[o.id[i]] = o.again[i] ? w.et[o.id[i]] + value : value;
    }
    if (!whole) {  // what is not listed has no part, and where nothing is listed there is no softmax
      for (int64_t v = 0; v < a.vocab; v++) w.es[v] = k == 0 ? __builtin_nanf("") : 0.f;
      for (int64_t v = 0; v < a.vocab; v += TILE) w.tiles[v / TILE].ws = 0.f;
    }
    const bool hard = label.weight != 0.f, plain = !hard && a.s.softcap == 0.f;
    const float f = plain ? s.inv * a.factor[r] * a.s.scale : s.inv;
    store_sparse(a, r, plain, a.factor[r], f, (float)c, even, hard ? &label : nullptr, w);
  }
  for (int64_t i = 0; i < k; i++) w.et[o.id[i]] = 0.f;
}

// ---- the k likeliest entries ----

// A number such that at least k of z [n] reach it, and few more: the kth largest of the largest of equal stretches
struct Threshold {
  int64_t stretch, count;
  float *tops, *sorted;
  Threshold(int64_t n, int64_t k) {
    stretch = smaller(64, n / (4 * k) > 1 ? n / (4 * k) : 1), count = (n + stretch - 1) / stretch;
    tops = (float*)std::malloc(2 * count * sizeof(float));
    if (tops == nullptr) std::abort();
    sorted = tops + count;
  }
  ~Threshold() { std::free(tops); }
  Threshold(const Threshold&) = delete;

  float of(const float* z, int64_t n, int64_t k) {
    for (int64_t b = 0; b < count; b++) {
      const float* x = z + b * stretch;
      const int64_t size = smaller(stretch, n - b * stretch);
      float top = -INF;
#pragma omp simd reduction(max : top)
      for (int64_t i = 0; i < size; i++) top = x[i] > top ? x[i] : top;
      tops[b] = sorted[b] = top;
    }
    std::nth_element(sorted, sorted + k - 1, sorted + count, [](float x, float y) { return x > y; });
    return sorted[k - 1];
  }
};

// ids of the k largest of z [n], largest first and of equals the lower one first; found: memory for n ids
void largest_ids(const float* z, int64_t n, int64_t k, Threshold& t, int64_t* found) {
  const float least = t.of(z, n, k);
  int64_t count = 0;
  for (int64_t b = 0; b < t.count; b++) {
    if (t.tops[b] < least) continue;
    const int64_t end = smaller(n, (b + 1) * t.stretch);
    for (int64_t i = b * t.stretch; i < end; i++)
      if (z[i] >= least) found[count++] = i;
  }
  const auto before = [z](int64_t i, int64_t j) { return z[i] != z[j] ? z[i] > z[j] : i < j; };
  if (count > 2 * k) std::nth_element(found, found + k, found + count, before), count = k;
  std::sort(found, found + count, before);
}

void top_row(const TopArgs& a, int64_t r, float* z, int64_t* found, Threshold& t, Scratch& w) {
  Softmax s;
  online(a.s, r, a.vocab, s, w, z);
#pragma omp simd
  for (int64_t i = 0; i < a.vocab; i++) z[i] = z[i] != z[i] ? INF : z[i];  // so that there is an order
  largest_ids(z, a.vocab, a.k, t, found);
  const double log_sum = std::log(s.sum);
  float *log_q = a.log_probs + r * a.k, tail;
  for (int64_t i = 0; i < a.k; i++) {
    a.ids[r * a.k + i] = found[i];
    log_q[i] = take(a.s, r, found[i], s, log_sum, w);
  }
  const double rest = unlisted(a.s, r, a.vocab, s, log_sum, w, tail);
  a.log_tail[r] = tail;
  if (a.g.data != nullptr) {
    const float *given = a.cotangent[0] + r * a.k, d_tail = a.cotangent[1][r];
    double total = d_tail;
    for (int64_t i = 0; i < a.k; i++) total += given[i];
    for (int64_t i = 0; i < a.k; i++) w.et[found[i]] = given[i] - fastkd_exp(log_q[i]) * (float)total;
    const double c = rest == 0 ? 0 : (d_tail - fastkd_exp(tail) * total) / rest;
    store_sparse(a, r, false, 1.f, s.inv, (float)c, 0.f, nullptr, w);
  }
  for (int64_t i = 0; i < a.k; i++) w.et[found[i]] = 0.f;
}

}  // namespace

void sparse(const SparseArgs& a) {
#pragma omp parallel num_threads(a.threads)
  {
    Scratch w(a.vocab);
    Outcomes o(a.k);
    __builtin_memset(w.et, 0, a.vocab * sizeof(float));
#pragma omp for schedule(dynamic, 1)
    for (int64_t r = 0; r < a.n; r++) {
      if (a.factor[r] != 0.f) {
        one_row(a, r, o, w);
      } else {
        a.loss[r] = 0.f;
        if (a.g.data != nullptr) zero_gradient(a.g, r);
      }
    }
    fence();
  }
}

void top(const TopArgs& a) {
#pragma omp parallel num_threads(a.threads)
  {
    Scratch w(a.vocab);
    Threshold t(a.vocab, a.k);
    int64_t* found = (int64_t*)std::malloc(a.vocab * (sizeof(int64_t) + sizeof(float)));
    if (found == nullptr) std::abort();
    __builtin_memset(w.et, 0, a.vocab * sizeof(float));
#pragma omp for schedule(dynamic, 1)
    for (int64_t r = 0; r < a.n; r++) top_row(a, r, (float*)(found + a.vocab), found, t, w);
    fence();
    std::free(found);
  }
}

}  // namespace FASTKD_ISA
}  // namespace fastkd
