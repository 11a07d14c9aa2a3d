// Addresses, matrices and divergences as they come from Python: integers and tuples of them.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <tuple>
#include <vector>

#include "pointwise.h"
#include "rows.h"

namespace fastkd {

inline pybind11::dict kinds() {  // name of a divergence -> its number
  pybind11::dict kinds;
#define X(name, id) kinds[name] = (int)Kind::id;
  FASTKD_DIVERGENCES(X)
#undef X
  return kinds;
}

// addresses travel as integers, 0 for none
template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

using MatrixTuple = std::tuple<uintptr_t, int64_t, int64_t, int>;      // data, stride, width, dtype
using SourceTuple = std::tuple<MatrixTuple, float, float, uintptr_t>;  // raw, scale, softcap, temperature
using TermTuple = std::tuple<int, float, float, uintptr_t>;            // kind, a, b, weight

inline Matrix matrix(const MatrixTuple& m) {
  return {at<void>(std::get<0>(m)), std::get<1>(m), std::get<2>(m), std::get<3>(m)};
}
inline Source source(const SourceTuple& s) {
  return {matrix(std::get<0>(s)), std::get<1>(s), std::get<2>(s), at<const float>(std::get<3>(s))};
}

inline std::vector<Term> term_list(const std::vector<TermTuple>& terms) {
  std::vector<Term> list;
  for (auto [kind, a, b, weight] : terms) list.push_back({kind, a, b, at<const float>(weight)});
  return list;
}

}  // namespace fastkd
