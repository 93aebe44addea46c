// Rows of logits as the CPU bodies of losses go through them: a row's tensors are widened into scratch memory, where
// the loops run over neighbours. Every loop treats its elements alike and sums run in a fixed order of sixteen partial
// sums, so that instruction sets of any width give the same bits.
//
// Rows: a type with `data`, the base pointer, and strides `row` and `column` in elements.
#pragma once

#include "cpu_vocabulary.h"

namespace pydistill {
namespace {

template <class S, class T, class Rows>
PYDISTILL_INLINE void load_row_of(const Rows& rows, int64_t n, int64_t K, T* to) {
  const S* const from = static_cast<const S*>(rows.data) + n * rows.row;
  for (int64_t k = 0; k < K; ++k) to[k] = widen(from[k * rows.column]);
}

template <class T, class Rows>
void load_row(Scalar scalar, const Rows& rows, int64_t n, int64_t K, T* to) {
  if constexpr (sizeof(T) == 8) {
    load_row_of<double>(rows, n, K, to);
  } else {
    if (scalar == Scalar::f32) load_row_of<float>(rows, n, K, to);
    if (scalar == Scalar::bf16) load_row_of<Bf16>(rows, n, K, to);
    if (scalar == Scalar::f16) load_row_of<F16>(rows, n, K, to);
  }
}

template <class S, class T>
PYDISTILL_INLINE void store_row_of(const T* from, int64_t n, int64_t K, void* rows) {
  S* const to = static_cast<S*>(rows) + n * K;
  for (int64_t k = 0; k < K; ++k) narrow(from[k], to[k]);
}

template <class T>
void store_row(Scalar scalar, const T* from, int64_t n, int64_t K, void* rows) {
  if constexpr (sizeof(T) == 8) {
    store_row_of<double>(from, n, K, rows);
  } else {
    if (scalar == Scalar::f32) store_row_of<float>(from, n, K, rows);
    if (scalar == Scalar::bf16) store_row_of<Bf16>(from, n, K, rows);
    if (scalar == Scalar::f16) store_row_of<F16>(from, n, K, rows);
  }
}

template <class T, class Combine, class Term>
PYDISTILL_INLINE T fold(int64_t K, T start, Combine combine, Term term) {
  T part[16];
  for (T& p : part) p = start;
  int64_t k = 0;
  for (; k + 16 <= K; k += 16)
    for (int i = 0; i < 16; ++i) part[i] = combine(part[i], term(k + i));
  for (int i = 0; k < K; ++k, ++i) part[i] = combine(part[i], term(k));
  for (int half = 8; half; half /= 2)
    for (int i = 0; i < half; ++i) part[i] = combine(part[i], part[i + half]);
  return part[0];
}

template <class T, class Term>
PYDISTILL_INLINE T sum(int64_t K, Term term) {
  return fold(K, T(0), [](T a, T b) PYDISTILL_LAMBDA { return a + b; }, term);
}

// p = softmax(x). x loses its maximum; what is returned is the logarithm of the sum of exp(x) after that.
template <class T>
T softmax(int64_t K, T* x, T* p) {
  // A NaN is passed over here and comes back with the sum.
  const T max = fold(
      K, -T(__builtin_inff()), [](T a, T b) PYDISTILL_LAMBDA { return b > a ? b : a; },
      [&](int64_t k) PYDISTILL_LAMBDA { return x[k]; });
  for (int64_t k = 0; k < K; ++k) {
    x[k] -= max;
    p[k] = exp_lane(x[k]);
  }
  const T total = sum<T>(K, [&](int64_t k) PYDISTILL_LAMBDA { return p[k]; });
  for (int64_t k = 0; k < K; ++k) p[k] /= total;
  return log_lane(total);
}

}  // namespace
}  // namespace pydistill
