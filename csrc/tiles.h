// What the row ops share: tiles of effective logits, softmax of a row, labels, and gradients on their way out.
// Included by rows.cpp and sparse.cpp, into the namespace of an instruction set.
#pragma once
#include "rows.h"
#include "vector_math.h"
#include "pointwise.h"
#include "transfer.h"

#include <cfloat>
#include <cmath>
#include <cstdlib>

namespace fastkd {
namespace FASTKD_ISA {

void sparse(const SparseArgs&);
void top(const TopArgs&);

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

// Cross-entropy of a label at temperature 1: weight * loss and, tile by tile, its gradient.
struct Label {
  float weight = 0;
  int64_t id = 0;
  Softmax q;
  // `known`: the row's softmax if it is seen already, at any temperature
  template <class Args>
  Label(const Args& a, int64_t r, const Softmax* known, float* tile) {
    weight = a.labels == nullptr ? 0.f : a.label_weight[r];
    if (weight == 0.f) return;
    id = a.labels[r];
    q = known != nullptr ? *known : Softmax{largest(a.s, r, a.vocab, tile), 1.f, 0};
    if (known == nullptr || known->inv != 1.f) q.sum = sum_of(a.s, r, a.vocab, q.top, tile);
  }

  static double sum_of(const Source& src, int64_t r, int64_t vocab, float top, float* tile) {
    double sum = 0;
    for (int64_t v = 0; v < vocab; v += TILE) {
      const int64_t n = smaller(TILE, vocab - v);
      const float* z = load_logits(src, r, v, n, tile);
      float part = 0;
#pragma omp simd reduction(+ : part)
      for (int64_t i = 0; i < n; i++) part += fastkd_exp2((z[i] - top) * LOG2E);
      sum += part;
    }
    return sum;
  }

  double loss(const Source& src, int64_t r, float* tile) const {
    return weight * (std::log(q.sum) - (double)(*load_logits(src, r, id, 1, tile) - q.top));
  }

  void add_gradient(int64_t v, int64_t n, const float* z, float* grad) const {
    const float top = q.top, c = weight * q.scale();
#pragma omp simd
    for (int64_t i = 0; i < n; i++) grad[i] += c * fastkd_exp2((z[i] - top) * LOG2E);
    if (id >= v && id < v + n) grad[id - v] -= weight;
  }
};

// g = factor * es * dz/draw, for a whole row
void store_row(const Matrix& g, const Source& src, float factor, int64_t r, int64_t vocab, Scratch& w) {
  for (int64_t v = 0; v < vocab; v += TILE) {
    const int64_t n = smaller(TILE, vocab - v);
    const float* z = src.softcap != 0.f ? load_logits(src, r, v, n, w.zs) : nullptr;
    store_gradient(g, src, factor, r, v, n, z, w.es + v);
  }
}

}  // namespace
}  // namespace FASTKD_ISA
}  // namespace fastkd
