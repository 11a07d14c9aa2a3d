// The row ops on a GPU: rows.h's meaning, over device addresses, on a stream. See fastkd/rows_cuda.py.
#pragma once
#include <cstdint>

#include "rows.h"

namespace fastkd {
namespace gpu {

constexpr int MAX_TERMS = 32;  // divergences in a sum
constexpr int AUTO = -1;       // of Launch::cluster: by device and size; 0: passes over memory; 1 to 8: blocks a row

struct Launch {
  int device;
  void* stream;
  int cluster;
};

struct Terms {
  Term term[MAX_TERMS];
  int count;
};

struct Divergence {
  int64_t n, vocab;
  Source s, t;
  Matrix g;             // [n, V_s] in the student's dtype, may be s.raw itself; null: none
  const float* factor;  // [n]
  Terms terms;
  bool normalized;
  const int64_t* labels;      // [n] or null
  const float* label_weight;  // [n]
  float* loss;                // [n]
  int cluster;                // blocks that share a row
};

struct Sparse {
  int64_t n, vocab, k;
  Source s;
  Matrix g;
  const float* factor;    // [n] or null for 1
  const int64_t* ids;     // [n, k] in [0, vocab), or -1 for none
  const float* log_p;     // [n, k]
  const float* log_rest;  // [n] for Rest::One and Rest::Each
  Rest rest;
  Terms terms;
  const float* given;         // [n, k] h of the listed entries, in the place of the terms; null: by the terms
  const float* given_rest;    // [n] h of all others
  const int64_t* labels;      // [n] or null
  const float* label_weight;  // [n]
  float* loss;                // [n] or null
  float* log_q;               // [n, k] or null
  float* log_q_rest;          // [n] or null
  int cluster;
};

struct Stats {
  int64_t n, vocab;
  Source s;
  Matrix g;
  const float* cotangent[3];  // of lse, entropy, max_log_prob: [n] each
  float *lse, *entropy, *max_log_prob;
  int64_t* argmax;
};

struct Top {
  int64_t n, vocab, k;
  Source s;
  float* values;  // [n, k] effective logits, NaN as infinity
  int64_t* ids;   // [n, k] ascending
};

struct Accumulate {
  uint16_t* high;    // [n] bfloat16
  uint8_t* low;      // [n]
  const void* part;  // [n]
  int dtype;         // of part
  int64_t n;
  bool first;
};

void divergence(const Launch&, const Divergence&);
void sparse(const Launch&, const Sparse&);
void stats(const Launch&, const Stats&);
void top(const Launch&, const Top&);
void accumulate(const Launch&, const Accumulate&);
void round_sum(const Launch&, const Accumulate&);

// of a dtype of the student; each in a source of its own, so that they are compiled side by side
void divergence_f32(const Launch&, const Divergence&);
void divergence_bf16(const Launch&, const Divergence&);
void divergence_f16(const Launch&, const Divergence&);

}  // namespace gpu
}  // namespace fastkd
