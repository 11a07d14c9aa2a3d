// fastkd._C.cuda: the row ops on a GPU over raw addresses; fastkd/rows_cuda.py is the only caller.
#pragma once
#include <stdexcept>
#include <string>

#include "bindings.h"
#include "gpu.h"

namespace fastkd {
namespace gpu {

using LaunchTuple = std::tuple<int, uintptr_t, int>;  // device, stream, cluster

inline Launch launch_of(const LaunchTuple& x) { return {std::get<0>(x), at<void>(std::get<1>(x)), std::get<2>(x)}; }

inline Terms terms_of(const std::vector<TermTuple>& terms) {
  if (terms.size() > MAX_TERMS)
    throw std::invalid_argument("divergence must be a sum of at most " + std::to_string(MAX_TERMS) +
                                " terms for the cuda backend, got " + std::to_string(terms.size()));
  Terms all{};
  for (const Term& term : term_list(terms)) all.term[all.count++] = term;
  return all;
}

inline void bind_divergence(const LaunchTuple& launch, int64_t n, int64_t vocab, const SourceTuple& s, const SourceTuple& t,
                            const MatrixTuple& g, uintptr_t factor, const std::vector<TermTuple>& terms, bool normalized,
                            uintptr_t labels, uintptr_t label_weight, uintptr_t loss) {
  Divergence a{};
  a.n = n, a.vocab = vocab, a.s = source(s), a.t = source(t), a.g = matrix(g), a.factor = at<const float>(factor);
  a.terms = terms_of(terms), a.normalized = normalized, a.labels = at<const int64_t>(labels);
  a.label_weight = at<const float>(label_weight), a.loss = at<float>(loss);
  const pybind11::gil_scoped_release release;
  divergence(launch_of(launch), a);
}

inline void bind_sparse(const LaunchTuple& launch, int64_t n, int64_t vocab, int64_t k, const SourceTuple& s,
                        const MatrixTuple& g, uintptr_t factor, uintptr_t ids, uintptr_t log_p, uintptr_t log_rest, int rest,
                        const std::vector<TermTuple>& terms, uintptr_t labels, uintptr_t label_weight, uintptr_t loss) {
  Sparse a{};
  a.n = n, a.vocab = vocab, a.k = k, a.s = source(s), a.g = matrix(g), a.factor = at<const float>(factor);
  a.ids = at<const int64_t>(ids), a.log_p = at<const float>(log_p), a.log_rest = at<const float>(log_rest), a.rest = (Rest)rest;
  a.terms = terms_of(terms), a.labels = at<const int64_t>(labels), a.label_weight = at<const float>(label_weight);
  a.loss = at<float>(loss);
  const pybind11::gil_scoped_release release;
  sparse(launch_of(launch), a);
}

// log q at ids [n, k], of all others [n] where `rest`; with given cotangents of both the gradient
inline void bind_select(const LaunchTuple& launch, int64_t n, int64_t vocab, int64_t k, const SourceTuple& s,
                        const MatrixTuple& g, uintptr_t ids, bool rest, uintptr_t given, uintptr_t given_rest, uintptr_t log_q,
                        uintptr_t log_q_rest) {
  Sparse a{};
  a.n = n, a.vocab = vocab, a.k = k, a.s = source(s), a.g = matrix(g), a.ids = at<const int64_t>(ids);
  a.rest = rest ? Rest::One : Rest::None, a.given = at<const float>(given), a.given_rest = at<const float>(given_rest);
  a.log_q = at<float>(log_q), a.log_q_rest = at<float>(log_q_rest);
  const pybind11::gil_scoped_release release;
  sparse(launch_of(launch), a);
}

inline void bind_stats(const LaunchTuple& launch, int64_t n, int64_t vocab, const SourceTuple& s, const MatrixTuple& g,
                       const std::tuple<uintptr_t, uintptr_t, uintptr_t>& cotangents,
                       const std::tuple<uintptr_t, uintptr_t, uintptr_t>& out, uintptr_t argmax) {
  const auto [c0, c1, c2] = cotangents;
  const auto [lse, entropy, largest] = out;
  const Stats a = {n,
                   vocab,
                   source(s),
                   matrix(g),
                   {at<const float>(c0), at<const float>(c1), at<const float>(c2)},
                   at<float>(lse),
                   at<float>(entropy),
                   at<float>(largest),
                   at<int64_t>(argmax)};
  const pybind11::gil_scoped_release release;
  stats(launch_of(launch), a);
}

inline void bind_top(const LaunchTuple& launch, int64_t n, int64_t vocab, int64_t k, const SourceTuple& s, uintptr_t values,
                     uintptr_t ids) {
  const Top a = {n, vocab, k, source(s), at<float>(values), at<int64_t>(ids)};
  const pybind11::gil_scoped_release release;
  top(launch_of(launch), a);
}

inline void bind_accumulate(const LaunchTuple& launch, uintptr_t high, uintptr_t low, uintptr_t part, int dtype, int64_t n,
                            bool first) {
  const pybind11::gil_scoped_release release;
  accumulate(launch_of(launch), {at<uint16_t>(high), at<uint8_t>(low), at<const void>(part), dtype, n, first});
}

inline void bind_round_sum(const LaunchTuple& launch, uintptr_t high, uintptr_t low, int64_t n) {
  const pybind11::gil_scoped_release release;
  round_sum(launch_of(launch), {at<uint16_t>(high), at<uint8_t>(low), nullptr, BFloat16, n, false});
}

inline void bind(pybind11::module_ m) {
  m.attr("KINDS") = kinds();
  m.attr("AUTO") = AUTO;
  m.attr("MAX_TERMS") = MAX_TERMS;
  m.def("divergence", bind_divergence);
  m.def("sparse", bind_sparse);
  m.def("select", bind_select);
  m.def("stats", bind_stats);
  m.def("top", bind_top);
  m.def("accumulate", bind_accumulate);
  m.def("round_sum", bind_round_sum);
}

}  // namespace gpu
}  // namespace fastkd
