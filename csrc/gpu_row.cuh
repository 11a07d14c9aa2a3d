// A row of logits in the hands of a team: one block, or a cluster of blocks that keep the row in their shared memory.
//
// Entries are taken in groups of 8 that begin, in the student's row, at multiples of 16 bytes: group g holds the entries
// 8 g - offset to 8 g - offset + 7. A thread reads, and writes, the same groups in every pass, so it waits for nobody.
#pragma once
#include "gpu_device.cuh"
#include "gpu_launch.h"

namespace fastkd {
namespace gpu {

// ---- the team ----

constexpr int WARP = 32, MAX_WARPS = 32, STATE_WORDS = 8, BATCHES = 4;
constexpr int STAGED_THREADS = 512, ROW_THREADS = 1024, GENERAL_THREADS = 512;
constexpr int STAGED_GENERAL_THREADS = 256;  // of up to 128 registers, so that two blocks live on a multiprocessor

struct Shared {  // the beginning of a block's shared memory; what a kernel keeps follows
  uint32_t warp[MAX_WARPS][STATE_WORDS];
  uint32_t exchange[2][STATE_WORDS];
  uint32_t total[STATE_WORDS];
  float weight[MAX_TERMS];
};
static_assert(sizeof(Shared) <= FIXED_BYTES, "the launch reserves it");

template <class T>
FASTKD_DEVICE T of_lane(const T& mine, int distance) {
  constexpr int WORDS = sizeof(T) / 4;
  uint32_t w[WORDS];
  memcpy(w, (const void*)&mine, sizeof(T));
#pragma unroll
  for (int i = 0; i < WORDS; i++) w[i] = __shfl_xor_sync(0xffffffffu, w[i], distance);
  T other;
  memcpy((void*)&other, w, sizeof(T));
  return other;
}

template <class T, class... Units>
FASTKD_DEVICE T of_warp(T mine, Units... c) {  // sums in one order, whatever the number of warps
#pragma unroll
  for (int d = WARP / 2; d > 0; d /= 2) mine.add(of_lane(mine, d), c...);
  return mine;
}

// a state in shared memory, of another block too; word by word, as its alignment is not known to the compiler there
template <class T>
FASTKD_DEVICE void put(uint32_t* words, const T& x) {
  uint32_t w[sizeof(T) / 4];
  memcpy(w, (const void*)&x, sizeof(T));
#pragma unroll
  for (int i = 0; i < (int)sizeof(T) / 4; i++) words[i] = w[i];
}
template <class T>
FASTKD_DEVICE T get(const uint32_t* words) {
  uint32_t w[sizeof(T) / 4];
#pragma unroll
  for (int i = 0; i < (int)sizeof(T) / 4; i++) w[i] = words[i];
  T x;
  memcpy((void*)&x, w, sizeof(T));
  return x;
}

template <bool STAGED>
struct Team {
  Shared& shared;
  int size, rank = 0, phase = 0;
  int64_t row;

  FASTKD_DEVICE Team(int cluster) : shared(*(Shared*)shared_memory()), size(STAGED ? cluster : 1) {
    if (STAGED) rank = cluster_rank();
    row = (int64_t)blockIdx.x / size;
  }

  FASTKD_DEVICE bool leader() const { return rank == 0 && threadIdx.x == 0; }

  // The states of all threads of the team as one; ordered as a barrier of the team. c: what add takes beside a state.
  template <class T, class... Units>
  FASTKD_DEVICE T merged(T mine, Units... c) {
    static_assert(sizeof(T) <= sizeof(uint32_t) * STATE_WORDS, "a state must fit its slot");
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    mine = of_warp(mine, c...);
    if (lane == 0) put(shared.warp[warp], mine);
    __syncthreads();
    if (warp == 0) {
      mine = of_warp(lane < warps ? get<T>(shared.warp[lane]) : T(), c...);
      if (lane == 0) put(STAGED ? shared.exchange[phase & 1] : shared.total, mine);
    }
    if (STAGED) {
      cluster_arrive();
      cluster_wait();
      if (warp == 0) {
        mine = of_warp(lane < size ? get<T>(of_block(shared.exchange[phase & 1], lane)) : T(), c...);
        if (lane == 0) put(shared.total, mine);
      }
      phase++;
    }
    __syncthreads();
    return get<T>(shared.total);
  }

  // Between these two a block may still be read by others of its cluster, which must not find it gone. What was read is
  // in use by then, and nothing is written for them: no order of memory is needed.
  FASTKD_DEVICE void done_reading() {
    if (STAGED) cluster_arrive_relaxed();
  }
  FASTKD_DEVICE void leave() {
    if (STAGED) cluster_wait();
  }
};

// ---- softmax ----

// x of a logit: its distance from the largest one in units of ln 2, of which c = LOG2E / temperature has 1. The difference
// is taken first: a product with c of its own rounding may be far from another one, or infinite.
FASTKD_DEVICE float distance(float z, float top, float c) { return (z - top) * c; }

// sum of 2^x over some entries, x from the largest of their logits
struct Softmax {
  float top = LOWEST, sum = 0.f;

  FASTKD_DEVICE static float weight(float from, float to, float c) {
    return from == to ? 1.f : exp2_fast(distance(from, to, c));
  }
  FASTKD_DEVICE void raise(float to, float c) { sum *= weight(top, to, c), top = to; }
  FASTKD_DEVICE void add(const Softmax& o, float c) {
    const float to = fmaxf(top, o.top);
    sum = sum * weight(top, to, c) + o.sum * weight(o.top, to, c);
    top = to;
  }
  FASTKD_DEVICE void add_one(float z, float c) {
    if (z > top) raise(z, c);
    sum += exp2_fast(distance(z, top, c));
  }
  FASTKD_DEVICE float log() const { return logf(sum); }  // of the sum, from top
};

FASTKD_DEVICE float largest_of(const float (&z)[GROUP]) {
  float top = z[0];
#pragma unroll
  for (int i = 1; i < GROUP; i++) top = fmaxf(top, z[i]);
  return top;
}

FASTKD_DEVICE void add_group(Softmax& s, const float (&z)[GROUP], float c) {
  const float top = largest_of(z);
  if (top > s.top) s.raise(top, c);
#pragma unroll
  for (int i = 0; i < GROUP; i++) s.sum += exp2_fast(distance(z[i], s.top, c));
}

// ---- rows ----

// The groups [begin, end) of a row that a block has
struct Span {
  int offset, begin, end;

  FASTKD_DEVICE Span(int64_t vocab, int offset, int rank, int size) : offset(offset) {
    const int64_t groups = (vocab + offset + GROUP - 1) / GROUP;
    begin = (int)(groups * rank / size), end = (int)(groups * (rank + 1) / size);
  }
  FASTKD_DEVICE int entry(int g) const { return GROUP * g - offset; }
  FASTKD_DEVICE int group(int64_t i) const { return (int)((i + offset) / GROUP); }
  FASTKD_DEVICE bool has(int64_t i) const { return group(i) >= begin && group(i) < end; }
  FASTKD_DEVICE int size() const { return end - begin; }
};

// How many entries after a multiple of 16 bytes a row begins
FASTKD_DEVICE int offset_of(const char* data, int size) { return (int)((uintptr_t)data / size % (16 / size)); }

template <int D>
FASTKD_DEVICE int dtype_of(const Matrix& m) {
  return D == ANY ? m.dtype : D;
}

template <int D>
FASTKD_DEVICE char* row_of(const Matrix& m, int64_t row) {
  return (char*)m.data + row * m.stride * size_of(dtype_of<D>(m));
}

// A row of logits: in memory, or staged in shared memory, where whole groups lie
template <int D, bool STAGED>
struct Row {
  const char* data;
  char* staged = nullptr;  // the block's groups
  int width, dtype;
  float scale, cap, inner;  // z = cap tanh(inner raw)
  bool aligned;             // do groups begin at multiples of 16 bytes
  bool alone;               // an entry that has no others: as a logit 0 (or NaN), so that it has all mass exactly

  FASTKD_DEVICE Row(const Source& src, int64_t row, int offset, bool alone)
      : data(row_of<D>(src.raw, row)),
        width((int)src.raw.width),
        dtype(dtype_of<D>(src.raw)),
        scale(src.scale),
        cap(src.softcap),
        alone(alone) {
    inner = scale / cap;
    aligned = (uintptr_t)(data - (int64_t)offset * size_of(dtype)) % 16 == 0;
  }

  // effective logits, in place
  FASTKD_DEVICE float effective(float z) const { return cap != 0.f ? cap * tanh_of(z * inner) : z * scale; }
  FASTKD_DEVICE void effective(float (&z)[GROUP], int i) const {
    if (cap != 0.f) {
#pragma unroll
      for (int k = 0; k < GROUP; k++) z[k] = effective(z[k]);
    } else if (scale != 1.f) {
#pragma unroll
      for (int k = 0; k < GROUP; k++) z[k] *= scale;
    }
    if (i >= 0 && i + GROUP <= width) return;
#pragma unroll
    for (int k = 0; k < GROUP; k++) z[k] = i + k < 0 || i + k >= width ? -INF : alone ? z[k] - z[k] : z[k];
  }

  template <int E>
  FASTKD_DEVICE Packed<E> raw(int i) const {  // the group that begins at entry i; 0 where the row has none
    if (aligned && i >= 0 && i + GROUP <= width) return *(const Packed<E>*)(data + (int64_t)i * size_of(E));
    float z[GROUP];
#pragma unroll
    for (int k = 0; k < GROUP; k++) z[k] = i + k >= 0 && i + k < width ? element<E>(data, i + k) : 0.f;
    return pack<E>(z);
  }

  FASTKD_DEVICE void load(const Span& span, int g, float (&z)[GROUP]) const {
    const int i = span.entry(g);
    with_dtype<D>(dtype, [&](auto is) {
      constexpr int E = decltype(is)::value;
      unpack<E>(STAGED ? ((const Packed<E>*)staged)[g - span.begin] : raw<E>(i), z);
    });
    effective(z, i);
  }

  // one entry of the block's, or of the row's while nothing is written over it
  FASTKD_DEVICE float one(int64_t i) const {
    if (i >= width) return -INF;
    float z = 0.f;
    with_dtype<D>(dtype, [&](auto is) { z = element<decltype(is)::value>(data, i); });
    return alone ? z - z : effective(z);
  }

  FASTKD_DEVICE void stage_group(const Span& span, int g) const {
    const int i = span.entry(g);
    with_dtype<D>(dtype, [&](auto is) {
      constexpr int E = decltype(is)::value;
      Packed<E>* to = (Packed<E>*)staged + (g - span.begin);
      if (aligned && i >= 0 && i + GROUP <= width) {
#pragma unroll
        for (int q = 0; q < Packed<E>::QUADS; q++) copy_async(&to->quad[q], data + (int64_t)i * size_of(E) + 16 * q);
      } else {
        *to = raw<E>(i);
      }
    });
  }
};

// The groups of a thread, in batches that arrive one after the other
struct Batch {
  int begin, end;
  FASTKD_DEVICE Batch(const Span& span, int batch) {
    const int step = (span.size() + BATCHES * (int)blockDim.x - 1) / (BATCHES * (int)blockDim.x) * (int)blockDim.x;
    begin = span.begin + smaller(batch * step, span.size()), end = span.begin + smaller((batch + 1) * step, span.size());
  }
};

template <class... Rows>
FASTKD_DEVICE void stage(const Span& span, const Rows&... rows) {
  for (int b = 0; b < BATCHES; b++) {
    const Batch batch(span, b);
    for (int g = batch.begin + (int)threadIdx.x; g < batch.end; g += blockDim.x) (rows.stage_group(span, g), ...);
    copy_commit();
  }
}

FASTKD_DEVICE void wait_for(int batch) {
  if (batch == 0) copy_wait<BATCHES - 1>();
  if (batch == 1) copy_wait<BATCHES - 2>();
  if (batch == 2) copy_wait<BATCHES - 3>();
  if (batch == 3) copy_wait<0>();
}
static_assert(BATCHES == 4, "wait_for names them");

// f(g) for each group of the thread as it arrives
template <bool STAGED, class F>
FASTKD_DEVICE void for_groups(const Span& span, F f) {
  if constexpr (STAGED) {
    for (int b = 0; b < BATCHES; b++) {
      wait_for(b);
      const Batch batch(span, b);
      for (int g = batch.begin + (int)threadIdx.x; g < batch.end; g += blockDim.x) f(g);
    }
  } else {
    for (int g = span.begin + (int)threadIdx.x; g < span.end; g += blockDim.x) f(g);
  }
}

// ... and the last first, which the cache still has
template <class F>
FASTKD_DEVICE void for_groups_back(const Span& span, F f) {
  const int n = span.size(), step = (int)blockDim.x;
  for (int k = (n - 1) / step * step + (int)threadIdx.x; k >= 0; k -= step)
    if (k < n) f(span.begin + k);
}

// ---- gradient ----

template <int D>
struct Target {
  char* data;  // null: no gradient
  int width;
  bool aligned;

  FASTKD_DEVICE Target(const Matrix& g, int64_t row, int offset) : data(nullptr), width((int)g.width), aligned(false) {
    if (g.data == nullptr) return;
    data = row_of<D>(g, row);
    aligned = (uintptr_t)(data - offset * size_of(D)) % 16 == 0;
  }

  // entries i + k whose bit is not set in `kept`
  FASTKD_DEVICE void store(int i, const float (&z)[GROUP], uint32_t kept = 0) const {
    if (aligned && i >= 0 && i + GROUP <= width && kept == 0) {
      *(Packed<D>*)(data + (int64_t)i * size_of(D)) = pack<D>(z);
      return;
    }
#pragma unroll
    for (int k = 0; k < GROUP; k++)
      if (i + k >= 0 && i + k < width && !(kept >> k & 1)) put_element<D>(data, i + k, z[k]);
  }
  FASTKD_DEVICE void store_one(int64_t i, float z) const {
    if (i < width) put_element<D>(data, i, z);
  }
  FASTKD_DEVICE void zero(const Span& span) const {
    const float none[GROUP] = {};
    if (data == nullptr) return;
    for (int g = span.begin + (int)threadIdx.x; g < span.end; g += blockDim.x) store(span.entry(g), none);
  }
};

// factor * dz/draw
struct Slope {
  float factor, inverse;  // of the softcap; 0: none
  FASTKD_DEVICE Slope(const Source& s, float factor)
      : factor(factor * s.scale), inverse(s.softcap == 0.f ? 0.f : 1.f / s.softcap) {}
  FASTKD_DEVICE float operator()(float z) const {
    if (inverse == 0.f) return factor;
    const float y = z * inverse;
    return factor * (1.f - y * y);
  }
  FASTKD_DEVICE void apply(const float (&z)[GROUP], float (&grad)[GROUP]) const {
    if (inverse == 0.f) {
#pragma unroll
      for (int k = 0; k < GROUP; k++) grad[k] *= factor;
    } else {
#pragma unroll
      for (int k = 0; k < GROUP; k++) grad[k] *= (*this)(z[k]);
    }
  }
};

// ---- labels ----

// weight * cross-entropy of a label at temperature 1
struct Label {
  float weight = 0.f, z = 0.f, scale = 0.f;
  int64_t id = -1;
  Softmax q;

  template <class Args, class R>
  FASTKD_DEVICE Label(const Args& a, const R& s, int64_t row) {
    if (a.labels == nullptr) return;
    weight = a.label_weight[row];
    if (weight == 0.f) return;
    id = a.labels[row];
    z = id >= 0 && id < a.vocab ? s.one(id) : NAN;
  }

  // at is the student's softmax for the unit c, if it is known
  template <bool STAGED, class R>
  FASTKD_DEVICE void normalise(Team<STAGED>& team, const R& s, const Span& span, bool known, float c, const Softmax& at) {
    if (weight == 0.f) return;
    if (known && c == LOG2E) {
      q = at;
    } else {
      for_groups<STAGED>(span, [&](int g) {
        float x[GROUP];
        s.load(span, g, x);
        add_group(q, x, LOG2E);
      });
      q = team.merged(q, LOG2E);
    }
    scale = z != z ? NAN : weight / q.sum;
  }

  FASTKD_DEVICE float loss() const { return weight * (q.log() - (z - q.top)); }

  FASTKD_DEVICE float gradient(float x, int64_t i) const {
    return scale * exp2_fast(distance(x, q.top, LOG2E)) - (i == id ? weight : 0.f);
  }
  FASTKD_DEVICE void add_gradient(const float (&x)[GROUP], int i, float (&grad)[GROUP]) const {
#pragma unroll
    for (int k = 0; k < GROUP; k++) grad[k] += gradient(x[k], i + k);
  }
};

// phi and h by a kind that is known at run time
FASTKD_DEVICE Point point_of(const Term& term, float lp, float lq, float p, float q) {
  switch ((Kind)term.kind) {
#define X(name, id) \
  case Kind::id:    \
    return point<Kind::id>(lp, lq, p, q, term.a, term.b);
    FASTKD_DIVERGENCES(X)
#undef X
  }
  return {NAN, NAN};
}

}  // namespace gpu
}  // namespace fastkd
