// lse, entropy, largest log-probability and its place of each row, and their gradient; see fastkd/rows_torch.py.
#include "gpu_row.cuh"

namespace fastkd {
namespace gpu {

struct Moments {
  Softmax s;
  float moment = 0.f;  // sum of 2^x x
  float largest = -INF, nan = 0.f;
  int at = INT32_MAX;

  FASTKD_DEVICE void raise(float to, float c) {
    const float w = Softmax::weight(s.top, to, c);
    moment = w == 0.f || s.sum == 0.f ? 0.f : w * (moment + s.sum * distance(s.top, to, c));
    s.sum *= w, s.top = to;
  }
  FASTKD_DEVICE void add(Moments o, float c) {
    const float to = fmaxf(s.top, o.s.top);
    raise(to, c), o.raise(to, c);
    s.sum += o.s.sum, moment += o.moment, nan += o.nan;
    if (o.largest > largest || (o.largest == largest && o.at < at)) largest = o.largest, at = o.at;
  }
  FASTKD_DEVICE void add_group(const float (&z)[GROUP], float c, int i) {
    const float top = largest_of(z);
    if (top > s.top) raise(top, c);
#pragma unroll
    for (int k = 0; k < GROUP; k++) {
      const float x = distance(z[k], s.top, c), e = exp2_fast(x);
      s.sum += e;
      moment = e == 0.f ? moment : fmaf(e, x, moment);
      nan += z[k] != z[k] ? 1.f : 0.f;
      if (z[k] > largest) largest = z[k], at = i + k;
    }
  }
};

template <int S>
__global__ void __launch_bounds__(GENERAL_THREADS, 1) stats_kernel(const __grid_constant__ Stats a) {
  Team<false> team(1);
  const int64_t row = team.row;
  const int offset = offset_of(row_of<S>(a.s.raw, row), size_of(S));
  const Span span(a.vocab, offset, 0, 1);
  const Target<S> g(a.g, row, offset);
  const Row<S, false> s(a.s, row, offset, false);
  const float inv = 1.f / a.s.temperature[row], c = LOG2E * inv;

  Moments all;
  for_groups<false>(span, [&](int i) {
    float z[GROUP];
    s.load(span, i, z);
    all.add_group(z, c, span.entry(i));
  });
  all = team.merged(all, c);
  const float log_sum = all.s.log(), sum = all.s.sum, entropy = log_sum - LN2 * all.moment / sum;
  const int at = all.at == INT32_MAX ? 0 : all.at;
  if (team.leader()) {
    a.lse[row] = fabsf(all.largest) == INF && all.nan == 0.f ? all.largest : fmaf(all.s.top, inv, log_sum);
    const float some = a.vocab == 1 ? 0.f : 1.f;  // an entry that has no others has all mass exactly
    a.entropy[row] = some * entropy;
    a.max_log_prob[row] = some * (LN2 * distance(all.largest, all.s.top, c) - log_sum);
    a.argmax[row] = at;
  }
  if (g.data == nullptr) return;
  // q (d_lse - d_max - d_entropy (log q + entropy)), and d_max at the largest
  const float d_lse = a.cotangent[0][row], d_entropy = a.cotangent[1][row], d_max = a.cotangent[2][row];
  const float even = d_lse - d_max - d_entropy * (entropy - log_sum), none = 0.f / sum;
  const Slope slope(a.s, 1.f);
  for_groups_back(span, [&](int i) {
    float z[GROUP], grad[GROUP];
    s.load(span, i, z);
#pragma unroll
    for (int k = 0; k < GROUP; k++) {
      const float x = distance(z[k], all.s.top, c), e = exp2_fast(x);
      const float own = e == 0.f ? none : e / sum * fmaf(-d_entropy, LN2 * x, even);
      grad[k] = inv * (own + (span.entry(i) + k == at ? d_max : 0.f));
    }
    slope.apply(z, grad);
    g.store(span.entry(i), grad);
  });
}

void stats(const Launch& launch, const Stats& a) {
  const Current current(launch.device);
  if (a.s.raw.dtype == Float32) return start<stats_kernel<Float32>>(launch, a, 0, GENERAL_THREADS, 0);
  if (a.s.raw.dtype == BFloat16) return start<stats_kernel<BFloat16>>(launch, a, 0, GENERAL_THREADS, 0);
  return start<stats_kernel<Float16>>(launch, a, 0, GENERAL_THREADS, 0);
}

}  // namespace gpu
}  // namespace fastkd
