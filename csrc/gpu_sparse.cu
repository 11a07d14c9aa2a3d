// A dense row against outcomes that are listed: a sparse teacher, log-probabilities of listed entries, the gradient of
// either; see fastkd/rows_torch.py.
#include "gpu_row.cuh"

namespace fastkd {
namespace gpu {

// ---- which entries are listed ----

// A bit for each entry of the block's groups, a byte for each group; entries that the row does not have count as listed.
struct Listing {
  uint32_t* words;

  FASTKD_DEVICE uint32_t of_group(const Span& span, int g) const { return ((const uint8_t*)words)[g - span.begin]; }

  FASTKD_DEVICE uint32_t set(const Span& span, int64_t i) const {  // whether it was set already
    const int64_t at = i + span.offset - (int64_t)span.begin * GROUP;
    const uint32_t bit = 1u << (at % 32);
    return atomicOr(words + at / 32, bit) & bit;
  }

  // whether an entry of the block stands twice in the list
  FASTKD_DEVICE bool build(const Span& span, const int64_t* ids, int64_t k, int64_t vocab) const {
    for (int i = threadIdx.x; i < (span.size() + 3) / 4; i += blockDim.x) words[i] = 0;
    __syncthreads();
    uint32_t twice = 0;
    for (int64_t i = threadIdx.x; i < k; i += blockDim.x)
      if (ids[i] >= 0 && ids[i] < vocab && span.has(ids[i])) twice |= set(span, ids[i]);
    if (threadIdx.x < 2 * GROUP && span.size() > 0) {  // the first and the last group may reach beyond the row
      const int i =
          threadIdx.x < GROUP ? span.entry(span.begin) + (int)threadIdx.x : span.entry(span.end - 1) + (int)threadIdx.x - GROUP;
      if (i < 0 || i >= vocab) set(span, i);
    }
    return __syncthreads_or(twice != 0);
  }
};

FASTKD_DEVICE int64_t listing_bytes(const Span& span) { return (span.size() + 15) / 16 * 16; }

// ---- states ----

// Softmax sums of a row apart: of what is listed, of all others; and of the others how many they are, and the sum of
// z - top in units of 2^31, the largest vocabulary, so that it is finite
struct Split {
  static constexpr float UNIT = 2147483648.f;
  Softmax listed, others;
  float count = 0.f, moved = 0.f;

  FASTKD_DEVICE void raise(float to, float c) {
    if (count != 0.f) moved += count / UNIT * (others.top - to);
    others.raise(to, c);
  }
  FASTKD_DEVICE void add(Split o, float c) {
    const float to = fmaxf(others.top, o.others.top);
    raise(to, c), o.raise(to, c);
    listed.add(o.listed, c);
    others.sum += o.others.sum, count += o.count, moved += o.moved;
  }
  FASTKD_DEVICE void add_other(float z, float c) {
    const float away = z - others.top;
    others.sum += exp2_fast(away * c), moved = fmaf(away, 1.f / UNIT, moved), count += 1.f;
  }
  FASTKD_DEVICE void add_group(const float (&z)[GROUP], float c, uint32_t bits) {
    if (bits == 0) {
      const float top = largest_of(z);
      if (top > others.top) raise(top, c);
#pragma unroll
      for (int k = 0; k < GROUP; k++) add_other(z[k], c);
      return;
    }
#pragma unroll
    for (int k = 0; k < GROUP; k++) {
      if (bits >> k & 1) {
        listed.add_one(z[k], c);
      } else {
        if (z[k] > others.top) raise(z[k], c);
        add_other(z[k], c);
      }
    }
  }
};

struct Outcomes {  // sums of weight * phi and weight * h, and h of what is not listed
  float loss = 0.f, h = 0.f, rest = 0.f;
  FASTKD_DEVICE void add(const Outcomes& o) { loss += o.loss, h += o.h, rest += o.rest; }
};

// ---- one row ----

template <int S, bool STAGED>
struct SparseRow {
  const Sparse& a;
  const Team<STAGED>& team;
  const Span& span;
  const Row<S, STAGED>& s;
  const int64_t *ids, row;
  float inv, c;  // of the natural logarithm and of log2
  Softmax q;     // that log q of a listed entry is measured in
  float log_sum;

  FASTKD_DEVICE float logit(int64_t id) const {
    if constexpr (STAGED) {
      const int64_t at = id + span.offset - (int64_t)span.begin * GROUP;
      if (!s.alone) return id < s.width ? s.effective(element<S>(s.staged, at)) : -INF;
    }
    return s.one(id);
  }
  FASTKD_DEVICE float log_q(float z) const { return distance(z, q.top, inv) - log_sum; }
  FASTKD_DEVICE float q_of(float z) const { return exp2_fast(distance(z, q.top, c)) / q.sum; }
  FASTKD_DEVICE bool mine(int64_t id) const { return id >= 0 && id < a.vocab && span.has(id); }
  FASTKD_DEVICE bool nowhere(int64_t id) const { return id < 0 || id >= a.vocab; }

  FASTKD_DEVICE bool compares() const { return a.log_p != nullptr || a.given != nullptr; }

  // weighted phi and h of an outcome
  FASTKD_DEVICE Point outcome(float lp, float lq, float q) const {
    Point sum = {0.f, 0.f};
    const float p = exp2_fast(lp * LOG2E);
#pragma unroll 1
    for (int i = 0; i < a.terms.count; i++) {
      const float weight = team.shared.weight[i];
      if (weight == 0.f) continue;
      const Point x = point_of(a.terms.term[i], lp, lq, p, q);
      sum.phi = fmaf(weight, x.phi, sum.phi), sum.h = fmaf(weight, x.h, sum.h);
    }
    return sum;
  }
  FASTKD_DEVICE Point listed(int64_t k, float z) const {
    if (a.given != nullptr) return {0.f, a.given[row * a.k + k]};
    return outcome(a.log_p[row * a.k + k], log_q(z), q_of(z));
  }

  // sums over the listed entries of the block, and log q of them
  FASTKD_DEVICE Outcomes sums() const {
    Outcomes sums;
    for (int64_t k = threadIdx.x; k < a.k; k += blockDim.x) {
      const bool own = mine(ids[k]);
      if (!own && !(nowhere(ids[k]) && team.rank == 0)) continue;
      const float z = own ? logit(ids[k]) : NAN;
      if (a.log_q != nullptr) a.log_q[row * a.k + k] = log_q(z);
      if (ids[k] == -1 || !compares()) continue;
      const Point x = own ? listed(k, z) : Point{NAN, NAN};
      sums.loss += x.phi, sums.h += x.h, sums.rest += own ? 0.f : NAN;
    }
    return sums;
  }

  // what is not listed: one more outcome, or the same log-probability for each
  FASTKD_DEVICE void add_rest(const Split& split, float log_q_rest, Outcomes& sums) const {
    if (a.rest == Rest::One && compares()) {
      const Point x = a.given != nullptr ? Point{0.f, a.given_rest[row]}
                                         : outcome(a.log_rest[row], log_q_rest, exp2_fast(log_q_rest * LOG2E));
      sums.loss += x.phi, sums.h += x.h, sums.rest += x.h;
    }
    if (a.rest != Rest::Each || a.log_rest[row] == -INF || split.count == 0.f) return;
    const float log_u = a.log_rest[row], u = exp2_fast(log_u * LOG2E);
    const float mean = log_q(split.others.top) + split.moved / split.count * Split::UNIT * inv;  // of log q
    for (int i = 0; i < a.terms.count; i++) {
      const float weight = team.shared.weight[i], mass = weight * u * split.count;
      if (weight == 0.f) continue;
      sums.loss += mass * (((Kind)a.terms.term[i].kind == Kind::ForwardKL ? log_u : 0.f) - mean);
      sums.h -= mass, sums.rest -= weight * u;
    }
  }

  // the gradient of listed entries: h_k - q_k sum h, once for an id however often it stands there
  FASTKD_DEVICE void put_listed(const Target<S>& g, bool twice, float total, float inv, const Label& label,
                                const Slope& slope) const {
    for (int64_t k = threadIdx.x; k < a.k; k += blockDim.x) {
      const int64_t id = ids[k];
      bool first = mine(id);
      for (int64_t j = 0; twice && first && j < k; j++) first = ids[j] != id;
      if (!first) continue;
      const float z = logit(id), q = q_of(z);
      float h = listed(k, z).h;
      for (int64_t j = k + 1; twice && j < a.k; j++)
        if (ids[j] == id) h += listed(j, z).h;
      float grad = inv * (q == 0.f && total == total ? h : fmaf(-q, total, h));
      if (label.weight != 0.f) grad += label.gradient(z, id);
      g.store_one(id, grad * slope(z));
    }
  }
};

constexpr int threads_of(bool staged) { return staged ? STAGED_GENERAL_THREADS : GENERAL_THREADS; }

template <int S, bool STAGED>
__global__ void __launch_bounds__(threads_of(STAGED), STAGED ? 2 : 1) sparse_kernel(const __grid_constant__ Sparse a) {
  Team<STAGED> team(a.cluster);
  const int64_t row = team.row;
  const int offset = offset_of(row_of<S>(a.s.raw, row), size_of(S));
  const Span span(a.vocab, offset, team.rank, team.size);
  const Target<S> g(a.g, row, offset);
  const float factor = a.factor != nullptr ? a.factor[row] : 1.f;
  if (factor == 0.f) {
    g.zero(span);
    if (team.leader() && a.loss != nullptr) a.loss[row] = 0.f;
    return;
  }

  const Listing listing{(uint32_t*)(shared_memory() + FIXED_BYTES)};
  Row<S, STAGED> s(a.s, row, offset, a.vocab == 1);
  if constexpr (STAGED) {
    s.staged = (char*)listing.words + listing_bytes(span);
    stage(span, s);
  }
  for (int i = threadIdx.x; i < a.terms.count; i += blockDim.x) team.shared.weight[i] = a.terms.term[i].weight[row];
  const int64_t* ids = a.ids + row * a.k;
  const bool twice = listing.build(span, ids, a.k, a.vocab);
  const float inv = 1.f / a.s.temperature[row], c = LOG2E * inv;
  Label label(a, s, row);

  // pass 1: softmax sums
  Split split;
  for_groups<STAGED>(span, [&](int i) {
    float z[GROUP];
    s.load(span, i, z);
    split.add_group(z, c, listing.of_group(span, i));
  });
  split = team.merged(split, c);
  Softmax whole = split.listed;
  whole.add(split.others, c);
  label.normalise(team, s, span, true, c, whole);

  // the listed entries
  const bool apart = a.rest == Rest::Out;
  const Softmax q = apart ? split.listed : whole;
  const SparseRow<S, STAGED> one{a, team, span, s, ids, row, inv, c, q, q.log()};
  const float above = exp2_fast(distance(split.others.top, q.top, c)),
              log_q_rest = split.others.sum == 0.f ? -INF : one.log_q(split.others.top) + split.others.log();
  Outcomes sums = one.sums();
  if (team.leader()) one.add_rest(split, log_q_rest, sums);
  sums = team.merged(sums);
  team.done_reading();
  const bool nothing = apart && (float)a.vocab - split.count == 0.f;  // no outcome at all
  if (team.leader()) {
    if (a.loss != nullptr) a.loss[row] = (nothing ? NAN : sums.loss) + (label.weight != 0.f ? label.loss() : 0.f);
    if (a.log_q_rest != nullptr) a.log_q_rest[row] = log_q_rest;
  }
  if (g.data == nullptr) return team.leave();

  // the gradient: of the others 2^(x - their top) * each + even; the listed entries are left as they are for put_listed
  const Slope slope(a.s, factor);
  float each = 0.f;
  const float even = a.rest == Rest::Each ? sums.rest : 0.f;
  if (a.rest == Rest::One)
    each = split.others.sum == 0.f ? 0.f : sums.rest / split.others.sum - sums.h * above / q.sum;
  else
    each = apart ? sums.rest : -sums.h * above / q.sum;  // apart: 0, or NaN by an id beyond the vocabulary
  if (nothing || (!apart && !(whole.sum > 0.f))) each = NAN;  // no mass, or a NaN
  for_groups_back(span, [&](int i) {
    float z[GROUP], grad[GROUP];
    s.load(span, i, z);
#pragma unroll
    for (int k = 0; k < GROUP; k++) {
      const float e = exp2_fast(distance(z[k], split.others.top, c));
      grad[k] = inv * (even + (each == 0.f || (e == 0.f && each == each) ? 0.f : e * each));
    }
    if (label.weight != 0.f) label.add_gradient(z, span.entry(i), grad);
    slope.apply(z, grad);
    g.store(span.entry(i), grad, listing.of_group(span, i));
  });
  one.put_listed(g, twice, sums.h, inv, label, slope);
  team.leave();
}

template <int S>
void run_sparse(const Launch& launch, Sparse a) {
  const auto listing = [&](int cluster) { return (a.vocab / GROUP + 2 + cluster - 1) / cluster + 32; };
  const auto bytes = [&](int cluster) { return staged_bytes(a.s.raw, cluster, a.vocab) + listing(cluster); };
  a.cluster = cluster_of(launch, bytes);
  if (a.cluster > 0)
    start<sparse_kernel<S, true>>(launch, a, a.cluster, threads_of(true), bytes(a.cluster));
  else
    start<sparse_kernel<S, false>>(launch, a, 0, threads_of(false), listing(1));
}

void sparse(const Launch& launch, const Sparse& a) {
  const Current current(launch.device);
  if (a.s.raw.dtype == Float32) return run_sparse<Float32>(launch, a);
  if (a.s.raw.dtype == BFloat16) return run_sparse<BFloat16>(launch, a);
  return run_sparse<Float16>(launch, a);
}

}  // namespace gpu
}  // namespace fastkd
