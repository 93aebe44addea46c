// How the CPU bodies of losses traverse rows of logits: a row's tensors are widened into scratch memory, where the
// loops run over adjacent elements. Every loop treats its elements alike and sums run in a fixed order of sixteen
// partial sums, so that instruction sets of any width give the same bits.
//
// Rows: a type with `data`, the base pointer, and strides `row` and `column` in elements.
#pragma once

#include "cpu_vocabulary.h"
#include "sum_in_pairs.h"

namespace pydistill {
namespace {

template <class S, class T, class Rows>
PYDISTILL_INLINE void load_row_of(const Rows& rows, int64_t n, int64_t K, T* to) {
  const S* const from = static_cast<const S*>(rows.data) + n * rows.row;
  if (rows.column == 1) {  // separate, so that it is vectorised
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

// The largest of x; NaN is ignored. The result does not depend on the order.
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

// x clamped to the bounds; NaN stays.
PYDISTILL_INLINE Register<float> bounded(Register<float> x, Register<float> least, Register<float> most) {
#if defined(__AVX512F__)
  return _mm512_maskz_min_ps(0xFFFF, most, _mm512_maskz_max_ps(0xFFFF, least, x));
#elif defined(__AVX2__)
  return _mm256_min_ps(most, _mm256_max_ps(least, x));
#else
  x = x < least ? least : x;
  return x > most ? most : x;
#endif
}

// exp_lane of all lanes. Several registers are interleaved: with only one, each step would wait for the one before.
template <int P>
PYDISTILL_INLINE void exp_lanes(Register<float> (&x)[P]) {
  using R = Register<float>;
  typedef int32_t Bits __attribute__((vector_size(kRegisterBytes)));
  const R least = R{} - 104.0f, most = R{} + 89.0f, magic = R{} + 12582912.0f;
  R r[P], y[P];
  Bits whole[P];
#define PYDISTILL_EACH _Pragma("GCC unroll 8") for (int i = 0; i < P; ++i)
  PYDISTILL_EACH x[i] = bounded(x[i], least, most);
  PYDISTILL_EACH y[i] = x[i] * 1.44269504f + magic;
  PYDISTILL_EACH whole[i] = (Bits)y[i] - (Bits)magic;
  PYDISTILL_EACH y[i] = y[i] - magic;
  PYDISTILL_EACH r[i] = (x[i] - y[i] * 0.693359375f) + y[i] * 2.12194440e-4f;
  PYDISTILL_EACH y[i] = R{} + 1.9875691500e-4f;
  constexpr float coefficients[] = {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f,
                                    5.0000001201e-1f};
  for (const float c : coefficients) PYDISTILL_EACH y[i] = y[i] * r[i] + c;
  PYDISTILL_EACH y[i] = (y[i] * (r[i] * r[i]) + r[i]) + 1.0f;
  PYDISTILL_EACH {
    const Bits half = whole[i] >> 1;
    x[i] = y[i] * (R)((half + 127) << 23) * (R)((whole[i] - half + 127) << 23);
  }
#undef PYDISTILL_EACH
}

// e = exp((x - shift) scale), and the argument in z unless that is null; x may be z. Returns the result of `sum` on e.
// The shift comes first: it keeps all digits of numbers near the largest, while x scale in the thousands has few.
template <class T>
T exp_row(int64_t K, T scale, T shift, const T* x, T* z, T* e) {
  T part[16] = {};
  int64_t k = 0;
  if constexpr (sizeof(T) == 4) {
    using Unaligned = typename Registers<T>::Unaligned;
    constexpr int L = Registers<T>::lanes, sums = 16 / L, P = sums > 2 ? sums : 2;
    Register<T> total[sums] = {};
    const auto step = [&]<int N>(Register<T>(&v)[N]) PYDISTILL_LAMBDA {
#pragma GCC unroll 4
      for (int i = 0; i < N; ++i) {
        v[i] = (load_register(x + k + i * L) - shift) * scale;
        if (z) *reinterpret_cast<Unaligned*>(z + k + i * L) = v[i];
      }
      exp_lanes(v);
#pragma GCC unroll 4
      for (int i = 0; i < N; ++i) {
        *reinterpret_cast<Unaligned*>(e + k + i * L) = v[i];
        total[i % sums] += v[i];
      }
      k += N * L;
    };
    Register<T> several[P], few[sums];
    while (k + P * L <= K) step(several);
    while (k + 16 <= K) step(few);
    __builtin_memcpy(part, total, sizeof(part));
  }
  for (int i = 0; k < K; ++k, i = (i + 1) % 16) {
    const T v = (x[k] - shift) * scale;
    if (z) z[k] = v;
    e[k] = exp_lane(v);
    part[i] += e[k];
  }
  return sum_in_pairs(part);
}

// p = softmax(x scale), and z = x scale without its maximum; x may be z. Returns the logarithm of the sum of exp(z).
template <class T>
T softmax(int64_t K, T scale, const T* x, T* z, T* p) {
  const T max = largest(K, x);  // NaN shows in the sum
  const T total = exp_row(K, scale, max, x, z, p);
  for (int64_t k = 0; k < K; ++k) p[k] /= total;
  return log_lane(total);
}

}  // namespace
}  // namespace pydistill
