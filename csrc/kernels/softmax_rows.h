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
  if (rows.column == 1) {  // by itself, so that it is vectorised
    for (int64_t k = 0; k < K; ++k) to[k] = widen(from[k]);
  } else {
    for (int64_t k = 0; k < K; ++k) to[k] = widen(from[k * rows.column]);
  }
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

// In sixteen partial sums, then over them in pairs.
template <class T, class Term>
PYDISTILL_INLINE T sum(int64_t K, Term term) {
  T part[16] = {};
  int64_t k = 0;
  for (; k + 16 <= K; k += 16)
    for (int i = 0; i < 16; ++i) part[i] += term(k + i);
  for (int i = 0; k < K; ++k, ++i) part[i] += term(k);
  for (int half = 8; half; half /= 2)
    for (int i = 0; i < half; ++i) part[i] += part[i + half];
  return part[0];
}

// The largest of x; a NaN is passed over. No order of going through it gives another.
template <class T>
PYDISTILL_INLINE T largest(int64_t K, const T* x) {
  constexpr int L = Registers<T>::lanes, parts = 16 / L;
  T max = -T(__builtin_inff());
  Register<T> part[parts];
  for (Register<T>& p : part) p = Register<T>{} + max;
  int64_t k = 0;
  for (; k + 16 <= K; k += 16)
    for (int i = 0; i < parts; ++i) {
      const Register<T> v = load_register(x + k + i * L);
      part[i] = v > part[i] ? v : part[i];
    }
  for (; k < K; ++k) max = x[k] > max ? x[k] : max;
  for (int i = 0; i < 16; ++i) max = part[i / L][i % L] > max ? part[i / L][i % L] : max;
  return max;
}

// p = softmax(x). x loses its maximum; what is returned is the logarithm of the sum of exp(x) after that.
template <class T>
T softmax(int64_t K, T* x, T* p) {
  const T max = largest(K, x);  // a NaN comes back with the sum
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
