// The k largest entries of each row, in the order of their ids: the kth largest is found by 8 bits at a time of a key that
// orders as float32 does, then what reaches it is written out.
#include "gpu_row.cuh"

namespace fastkd {
namespace gpu {

constexpr int BINS = 256, COPIES = 4;  // of the histogram, so that threads seldom meet in one bin

struct Histogram {
  uint32_t bin[COPIES][BINS];
  uint32_t prefix, wanted;   // the kth largest key as far as it is known; its place among those that share that prefix
  uint32_t warp[MAX_WARPS];  // entries of each warp: above the kth largest in the low half, equal to it in the high one
};

FASTKD_DEVICE float ordered(float z) { return z != z ? INF : z + 0.f; }  // NaN as infinity, -0 as 0

FASTKD_DEVICE uint32_t key_of(float z) {  // grows with z
  const uint32_t bits = as_bits(ordered(z));
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

// The next 8 bits of the kth largest key; by one warp
FASTKD_DEVICE void next_digit(Histogram& h, int shift) {
  constexpr int OWN = BINS / WARP;
  const int lane = threadIdx.x;
  uint32_t count[OWN], total = 0;
#pragma unroll
  for (int i = 0; i < OWN; i++) {  // the first lane has the largest
    count[i] = 0;
    for (int copy = 0; copy < COPIES; copy++) count[i] += h.bin[copy][BINS - 1 - lane * OWN - i];
    total += count[i];
  }
  uint32_t before = total;
#pragma unroll
  for (int d = 1; d < WARP; d *= 2) {
    const uint32_t lower = __shfl_up_sync(0xffffffffu, before, d);
    if (lane >= d) before += lower;
  }
  before -= total;
  const uint32_t wanted = h.wanted, prefix = h.prefix;
  __syncwarp();
#pragma unroll
  for (int i = 0; i < OWN; i++) {
    if (before < wanted && wanted <= before + count[i]) {
      h.prefix = prefix | (uint32_t)(BINS - 1 - lane * OWN - i) << shift;
      h.wanted = wanted - before;
    }
    before += count[i];
  }
}

// How many of the threads before this one, and of all: two counts of 16 bits
FASTKD_DEVICE uint32_t sum_before(Histogram& h, uint32_t mine, uint32_t& all) {
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
  uint32_t sum = mine;
#pragma unroll
  for (int d = 1; d < WARP; d *= 2) {
    const uint32_t lower = __shfl_up_sync(0xffffffffu, sum, d);
    if (lane >= d) sum += lower;
  }
  if (lane == WARP - 1) h.warp[warp] = sum;
  __syncthreads();
  uint32_t before = sum - mine;
  all = 0;
  for (int w = 0; w < warps; w++) before += w < warp ? h.warp[w] : 0, all += h.warp[w];
  __syncthreads();
  return before;
}

template <int S>
__global__ void __launch_bounds__(GENERAL_THREADS, 1) top_kernel(const __grid_constant__ Top a) {
  Histogram& h = *(Histogram*)shared_memory();
  const int64_t row = blockIdx.x;
  const int offset = offset_of(row_of<S>(a.s.raw, row), size_of(S));
  const Span span(a.vocab, offset, 0, 1);
  const Row<S, false> s(a.s, row, offset, false);
  const int vocab = (int)a.vocab;
  if (threadIdx.x == 0) h.prefix = 0, h.wanted = (uint32_t)a.k;

  for (int shift = 24; shift >= 0; shift -= 8) {
    for (int i = threadIdx.x; i < COPIES * BINS; i += blockDim.x) h.bin[i / BINS][i % BINS] = 0;
    __syncthreads();
    const uint32_t prefix = h.prefix, known = shift == 24 ? 0 : 0xffffffffu << (shift + 8);
    uint32_t* bins = h.bin[threadIdx.x / WARP % COPIES];
    for_groups<false>(span, [&](int g) {
      float z[GROUP];
      s.load(span, g, z);
#pragma unroll
      for (int k = 0; k < GROUP; k++) {
        const uint32_t key = key_of(z[k]);
        const int i = span.entry(g) + k;
        if ((key & known) == prefix && i >= 0 && i < vocab) atomicAdd(bins + (key >> shift & (BINS - 1)), 1u);
      }
    });
    __syncthreads();
    if (threadIdx.x < WARP) next_digit(h, shift);
    __syncthreads();
  }

  // entries above the kth largest, and of its equals as many as are wanted, the lower ids first
  const uint32_t least = h.prefix;
  const int64_t wanted = h.wanted;
  int64_t above = 0, equal = 0;  // of the groups before
  for (int first = span.begin; first < span.end; first += blockDim.x) {
    const int g = first + (int)threadIdx.x;
    float z[GROUP];
    uint32_t is_above = 0, is_equal = 0;
    if (g < span.end) {
      s.load(span, g, z);
#pragma unroll
      for (int k = 0; k < GROUP; k++) {
        const uint32_t key = key_of(z[k]);
        const int i = span.entry(g) + k;
        if (i < 0 || i >= vocab) continue;
        is_above |= (uint32_t)(key > least) << k, is_equal |= (uint32_t)(key == least) << k;
      }
    }
    uint32_t all;
    const uint32_t before = sum_before(h, (uint32_t)__popc(is_above) | (uint32_t)__popc(is_equal) << 16, all);
    int64_t n_above = above + (before & 0xffffu), n_equal = equal + (before >> 16);
#pragma unroll
    for (int k = 0; k < GROUP; k++) {
      const bool takes = is_above >> k & 1, ties = is_equal >> k & 1;
      if (takes || (ties && n_equal < wanted)) {
        const int64_t to = row * a.k + n_above + (n_equal < wanted ? n_equal : wanted);
        a.ids[to] = span.entry(g) + k, a.values[to] = ordered(z[k]);
      }
      n_above += takes, n_equal += ties;
    }
    above += all & 0xffffu, equal += all >> 16;
  }
}

void top(const Launch& launch, const Top& a) {
  const Current current(launch.device);
  constexpr int64_t bytes = sizeof(Histogram);
  if (a.s.raw.dtype == Float32) return start<top_kernel<Float32>>(launch, a, 0, GENERAL_THREADS, bytes);
  if (a.s.raw.dtype == BFloat16) return start<top_kernel<BFloat16>>(launch, a, 0, GENERAL_THREADS, bytes);
  return start<top_kernel<Float16>>(launch, a, 0, GENERAL_THREADS, bytes);
}

}  // namespace gpu
}  // namespace fastkd
