// Row ops over raw pointers: softmax statistics, divergence and gradient of rows of logits. See fastkd/rows_torch.py.
#pragma once
#include <cstdint>

namespace fastkd {

enum Dtype : int { Float32 = 0, BFloat16 = 1, Float16 = 2 };

struct Matrix {
  void* data;      // [n, width], null where there is none
  int64_t stride;  // of a row, in elements; the columns are contiguous
  int64_t width;   // entries from here to the vocabulary count as -inf
  int dtype;
};

struct Source {
  Matrix raw;
  float scale;               // z = scale * raw
  float softcap;             // z = softcap * tanh(z / softcap); 0: none
  const float* temperature;  // [n]
};

struct Term {
  int kind;
  float a, b;
  const float* weight;  // [n]
};

struct DivergenceArgs {
  int64_t n, vocab;
  Source s, t;
  Matrix g;             // gradient with respect to s.raw, may be s.raw itself; null: none
  const float* factor;  // [n] multiplies the gradient; 0: loss 0, gradient 0
  const Term* terms;
  int term_count;
  bool normalized;  // false: t holds logs of weights to be used as they are
  const int64_t* labels;      // [n] or null
  const float* label_weight;  // [n]
  float* loss;                // [n]
  int threads;
};

// What a sparse teacher says of the entries that it does not list
enum class Rest : int {
  One,   // they are one more outcome
  None,  // nothing
  Out,   // they have no part in the student's softmax either
  Each,  // the same log-probability for each of them; the divergences are cross-entropies
};

struct SparseArgs {
  int64_t n, vocab, k;
  Source s;
  Matrix g;
  const float* factor;
  const int64_t* ids;     // [n, k] in [0, vocab) or -1
  const float* log_p;     // [n, k], -inf where the id is -1
  const float* log_rest;  // [n] for Rest::One and Rest::Each
  Rest rest;
  const Term* terms;
  int term_count;
  const int64_t* labels;
  const float* label_weight;
  float* loss;
  int threads;
};

struct SelectArgs {
  int64_t n, vocab, k;
  Source s;
  Matrix g;
  const int64_t* ids;      // [n, k]
  const float* cotangent;  // [n, k] or null
  float* out;              // [n, k]
  int threads;
};

struct StatsArgs {
  int64_t n, vocab;
  Source s;
  Matrix g;
  const float* cotangent[3];  // of lse, entropy, max_log_prob: [n] each, or null
  float *lse, *entropy, *max_log_prob;
  int64_t* argmax;
  int threads;
};

struct TopArgs {
  int64_t n, vocab, k;
  Source s;
  Matrix g;
  const float* cotangent[2];  // of log_probs [n, k] and log_tail [n], or null
  float *log_probs, *log_tail;
  int64_t* ids;
  int threads;
};

// acc = part or acc += part, element by element, in float32. With low, the sum is kept in 24 bits: acc (bfloat16) holds the
// upper 16, low the next 8; a part in bfloat16 has lost more than that already.
struct AccumulateArgs {
  void* acc;
  uint8_t* low;
  const void* part;
  int dtype;
  int64_t n;
  bool first;
  int threads;
};

// sum of t (log t - x) over n entries, or its gradient -t * scale with respect to x written to out
struct KLDivArgs {
  const void *x, *t;
  void* out;
  int dtype;
  int64_t n;
  bool log_target;
  float scale;
  int threads;
};

struct Kernels {
  const char* name;
  void (*divergence)(const DivergenceArgs&);
  void (*sparse)(const SparseArgs&);
  void (*select)(const SelectArgs&);
  void (*stats)(const StatsArgs&);
  void (*top)(const TopArgs&);
  void (*accumulate)(const AccumulateArgs&);
  void (*round_sum)(const AccumulateArgs&);  // acc [n] = the 24 bits of acc and low, rounded to bfloat16
  double (*kl_div_sum)(const KLDivArgs&);
  void (*kl_div_grad)(const KLDivArgs&);
};

namespace generic {
extern const Kernels kernels;
}
#ifdef FASTKD_HAS_X86
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
#endif

}  // namespace fastkd
