// Divergence of two dense rows and its gradient, for a student of one dtype; see fastkd/rows_torch.py.
#pragma once
#include "gpu_row.cuh"

namespace fastkd {
namespace gpu {

// The closed forms need one pass for the loss and one for the gradient, any other sum one more between them.
enum class Form { ForwardKL, ReverseKL, CrossEntropy, General };

// Both softmaxes, x and y in units of ln 2 from their tops, and
// ForwardKL: sum 2^y (y - x)   ReverseKL: sum 2^x (x - y)   CrossEntropy: sum 2^y (-x)
template <Form F>
struct Pair {
  Softmax s, t;
  float cross = 0.f;

  // ds and dt may be infinite where nothing is summed up yet
  FASTKD_DEVICE void raise(float s_top, float t_top, float cs, float ct) {
    const float ds = distance(s_top, s.top, cs), ws = Softmax::weight(s.top, s_top, cs);
    const float dt = distance(t_top, t.top, ct), wt = Softmax::weight(t.top, t_top, ct);
    if constexpr (F == Form::ForwardKL) cross = wt == 0.f || t.sum == 0.f ? 0.f : wt * (cross + t.sum * (ds - dt));
    if constexpr (F == Form::CrossEntropy) cross = wt == 0.f || t.sum == 0.f ? 0.f : wt * (cross + t.sum * ds);
    if constexpr (F == Form::ReverseKL) cross = ws == 0.f || s.sum == 0.f ? 0.f : ws * (cross + s.sum * (dt - ds));
    s.sum *= ws, s.top = s_top, t.sum *= wt, t.top = t_top;
  }
  FASTKD_DEVICE void add(Pair o, float cs, float ct) {
    const float s_top = fmaxf(s.top, o.s.top), t_top = fmaxf(t.top, o.t.top);
    raise(s_top, t_top, cs, ct), o.raise(s_top, t_top, cs, ct);
    s.sum += o.s.sum, t.sum += o.t.sum, cross += o.cross;
  }
  FASTKD_DEVICE void add_group(const float (&zs)[GROUP], const float (&zt)[GROUP], float cs, float ct, bool normalized) {
    const float s_top = fmaxf(s.top, largest_of(zs)), t_top = normalized ? fmaxf(t.top, largest_of(zt)) : 0.f;
    if (s_top > s.top || t_top > t.top) raise(s_top, t_top, cs, ct);
#pragma unroll
    for (int k = 0; k < GROUP; k++) {
      const float x = distance(zs[k], s.top, cs), y = distance(zt[k], t.top, ct), q = exp2_fast(x), p = exp2_fast(y);
      s.sum += q, t.sum += p;
      if constexpr (F == Form::ForwardKL) cross = p == 0.f ? cross : fmaf(p, y - x, cross);
      if constexpr (F == Form::CrossEntropy) cross = p == 0.f ? cross : fmaf(-p, x, cross);
      if constexpr (F == Form::ReverseKL) cross = q == 0.f ? cross : fmaf(q, x - y, cross);
    }
  }
};

struct Sums {  // of weight * phi and weight * h
  float loss = 0.f, h = 0.f;
  FASTKD_DEVICE void add(const Sums& o) { loss += o.loss, h += o.h; }
};

// What the row's statistics make of x and y: loss, and gradient with respect to the student's logits
template <Form F>
struct Comparison {
  Pair<F> both;
  float weight, inv, log_s, log_t;  // of the sums, from their tops; in units of ln 2 for General
  float cq, cp, shift, none;        // none: the gradient where there is no mass
  float loss, total;

  FASTKD_DEVICE Comparison(const Pair<F>& pair, float weight, float inv, bool normalized)
      : both(pair), weight(weight), inv(inv), loss(0.f), total(0.f) {
    const float s = both.s.sum, t = both.t.sum, unit = normalized ? t : 1.f, mass = normalized ? 1.f : t;
    const float cross = LN2 * both.cross;
    if constexpr (F == Form::General) {
      log_s = log2f(s), log_t = log2f(unit);
      return;
    }
    cq = weight * inv * mass / s, cp = -weight * inv / unit, shift = 0.f;
    if constexpr (F == Form::ForwardKL) loss = cross / unit + mass * logf(s / unit);
    if constexpr (F == Form::CrossEntropy) loss = cross / unit + mass * logf(s);
    if constexpr (F == Form::ReverseKL) {
      loss = cross / s - logf(s / unit);
      cq = weight * inv * LN2 / s;
      none = 0.f * (cq / unit);  // NaN where a row has no mass at all, or a NaN
      shift = both.cross / s + none;
    }
    loss *= weight;
  }

  // grad of closed forms: q - p, or q (log q - log p - KL)
  FASTKD_DEVICE float gradient(float zs, float zt, float cs, float ct) const {
    const float x = distance(zs, both.s.top, cs), y = distance(zt, both.t.top, ct), q = exp2_fast(x);
    if constexpr (F == Form::ReverseKL) return q == 0.f ? none : cq * q * (x - y - shift);
    return fmaf(cq, q, cp * exp2_fast(y));
  }
};

template <Form F, class Args>
FASTKD_DEVICE bool load_weights(const Args& a, int64_t row, Shared& shared) {
  bool any = false;
  for (int i = 0; i < a.terms.count; i++) any |= a.terms.term[i].weight[row] != 0.f;
  if (F == Form::General)
    for (int i = threadIdx.x; i < a.terms.count; i += blockDim.x) shared.weight[i] = a.terms.term[i].weight[row];
  return any;  // a barrier comes before they are read
}

// f(weight, point, k) for each term and entry of a group
template <class F>
FASTKD_DEVICE void for_points(const Terms& terms, const Shared& shared, const Comparison<Form::General>& c,
                              const float (&zs)[GROUP], const float (&zt)[GROUP], float cs, float ct, F f) {
#pragma unroll 1
  for (int i = 0; i < terms.count; i++) {
    const float weight = shared.weight[i];
    if (weight == 0.f) continue;
    const Term term = terms.term[i];
    const auto each = [&](auto kind) {
#pragma unroll
      for (int k = 0; k < GROUP; k++) {
        const float lq = distance(zs[k], c.both.s.top, cs) - c.log_s, lp = distance(zt[k], c.both.t.top, ct) - c.log_t;
        f(weight, point<Kind(decltype(kind)::value)>(LN2 * lp, LN2 * lq, exp2_fast(lp), exp2_fast(lq), term.a, term.b), k);
      }
    };
    switch ((Kind)term.kind) {
#define X(name, id)                 \
  case Kind::id:                    \
    each(DtypeIs<(int)Kind::id>()); \
    break;
      FASTKD_DIVERGENCES(X)
#undef X
    }
  }
}

constexpr int threads_of(Form f, bool staged) {
  if (f == Form::General) return staged ? STAGED_GENERAL_THREADS : GENERAL_THREADS;
  return staged ? STAGED_THREADS : ROW_THREADS;
}

constexpr int blocks_of(bool staged) { return staged ? 2 : 1; }  // that are to live on a multiprocessor

template <int S, int T, Form F, bool STAGED>
__global__ void __launch_bounds__(threads_of(F, STAGED), blocks_of(STAGED))
    divergence_kernel(const __grid_constant__ Divergence a) {
  Team<STAGED> team(a.cluster);
  const int64_t row = team.row;
  const int offset = offset_of(row_of<S>(a.s.raw, row), size_of(S));
  const Span span(a.vocab, offset, team.rank, team.size);
  const Target<S> g(a.g, row, offset);
  const float factor = a.factor[row];
  if (factor == 0.f) {
    g.zero(span);
    if (team.leader()) a.loss[row] = 0.f;
    return;
  }

  Row<S, STAGED> s(a.s, row, offset, a.vocab == 1);
  Row<T, STAGED> t(a.t, row, offset, a.vocab == 1 && a.normalized);
  if constexpr (STAGED) {
    s.staged = shared_memory() + FIXED_BYTES;
    t.staged = s.staged + (int64_t)span.size() * GROUP * size_of(S);
    stage(span, s, t);
  }
  const bool live = load_weights<F>(a, row, team.shared);
  const float inv = 1.f / a.s.temperature[row], cs = LOG2E * inv, ct = LOG2E / a.t.temperature[row];
  Label label(a, s, row);

  // pass 1: both softmaxes, and the closed forms' sum
  Pair<F> both;
  if (!a.normalized) both.t.top = 0.f;
  if (live) {
    for_groups<STAGED>(span, [&](int i) {
      float zs[GROUP], zt[GROUP];
      s.load(span, i, zs), t.load(span, i, zt);
      both.add_group(zs, zt, cs, ct, a.normalized);
    });
    both = team.merged(both, cs, ct);
  }
  label.normalise(team, s, span, live, cs, both.s);
  Comparison<F> compared(both, F == Form::General ? 1.f : a.terms.term[0].weight[row], inv, a.normalized);

  // pass 2: sums of phi and h
  if (F == Form::General && live) {
    Sums sums;
    if constexpr (F == Form::General)
      for_groups_back(span, [&](int i) {
        float zs[GROUP], zt[GROUP];
        s.load(span, i, zs), t.load(span, i, zt);
        for_points(a.terms, team.shared, compared, zs, zt, cs, ct,
                   [&](float w, const Point& x, int) { sums.loss = fmaf(w, x.phi, sums.loss), sums.h = fmaf(w, x.h, sums.h); });
      });
    sums = team.merged(sums);
    compared.loss = sums.loss, compared.total = sums.h;
  }
  team.done_reading();
  if (team.leader()) a.loss[row] = (live ? compared.loss : 0.f) + (label.weight != 0.f ? label.loss() : 0.f);

  // the last pass: the gradient, over the logits where they lie in the same memory
  const Slope slope(a.s, factor);
  const auto gradient = [&](int i) {
    float zs[GROUP], zt[GROUP], grad[GROUP] = {};
    s.load(span, i, zs);
    if (live) {
      t.load(span, i, zt);
      if constexpr (F == Form::General) {
        for_points(a.terms, team.shared, compared, zs, zt, cs, ct,
                   [&](float w, const Point& x, int k) { grad[k] = fmaf(w, x.h, grad[k]); });
#pragma unroll
        for (int k = 0; k < GROUP; k++) {  // h - q sum h
          const float q = exp2_fast(distance(zs[k], both.s.top, cs) - compared.log_s);
          grad[k] = inv * (q == 0.f ? grad[k] : fmaf(-q, compared.total, grad[k]));
        }
      } else {
#pragma unroll
        for (int k = 0; k < GROUP; k++) grad[k] = compared.gradient(zs[k], zt[k], cs, ct);
      }
    }
    if (label.weight != 0.f) label.add_gradient(zs, span.entry(i), grad);
    slope.apply(zs, grad);
    g.store(span.entry(i), grad);
  };
  if (STAGED) copy_wait<0>();
  if (g.data != nullptr && F == Form::General) for_groups<false>(span, gradient);
  if (g.data != nullptr && F != Form::General) for_groups_back(span, gradient);
  team.leave();
}

template <int S, int T, Form F>
void run(const Launch& launch, Divergence a) {
  const auto bytes = [&](int cluster) {
    return staged_bytes(a.s.raw, cluster, a.vocab) + staged_bytes(a.t.raw, cluster, a.vocab);
  };
  a.cluster = cluster_of(launch, bytes);
  if (a.cluster > 0)
    start<divergence_kernel<S, T, F, true>>(launch, a, a.cluster, threads_of(F, true), bytes(a.cluster));
  else
    start<divergence_kernel<S, T, F, false>>(launch, a, 0, threads_of(F, false), 0);
}

template <int S, int T>
void run_form(const Launch& launch, const Divergence& a) {
  const Kind kind = a.terms.count == 1 ? (Kind)a.terms.term[0].kind : Kind::AlphaBeta;
  if (kind == Kind::ForwardKL) return run<S, T, Form::ForwardKL>(launch, a);
  if (kind == Kind::ReverseKL) return run<S, T, Form::ReverseKL>(launch, a);
  if (kind == Kind::CrossEntropy) return run<S, T, Form::CrossEntropy>(launch, a);
  return run<S, ANY, Form::General>(launch, a);
}

template <int S>
void run_dtype(const Launch& launch, const Divergence& a) {
  a.t.raw.dtype == S ? run_form<S, S>(launch, a) : run_form<S, ANY>(launch, a);
}

}  // namespace gpu
}  // namespace fastkd
