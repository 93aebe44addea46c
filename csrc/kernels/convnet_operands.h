// The factors of a ConvNet's convolutions, and their order in memory. Part of convnet_step.inl.
#pragma once

#include "convnet_step.h"
#include "vocabulary/matrix_product.h"
#include "vocabulary/matrix_product_amx.h"

namespace pydistill {
namespace {

using Step = ConvNetStep;

PYDISTILL_INLINE int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }
PYDISTILL_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
PYDISTILL_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

PYDISTILL_INLINE float exp_scalar(float v) { return __builtin_expf(v); }
PYDISTILL_INLINE double exp_scalar(double v) { return __builtin_exp(v); }
PYDISTILL_INLINE float log_scalar(float v) { return __builtin_logf(v); }
PYDISTILL_INLINE double log_scalar(double v) { return __builtin_log(v); }

// The factors of the convolutions' products as computed: T itself, or rounded to bfloat16 but kept in T.
//
// Rounded factors cost a linear map little, but a unit that falls on the ReLU's other side changes every derivative by
// a term of its own size: the cosine of a step's image gradient to that in float32 is 0.990 if the products that decide
// this, those of the primal forward pass, are rounded too, else 0.9998. So that pass has its own operand class, Primal,
// which rounds nothing; or, on matrix tiles, it takes each factor as a sum of two operands: value value + rest value +
// value rest is accurate to 16 bits, for three of the dozen products of a step.
template <bool FIRST, class A, class B>
struct Choose {
  using Type = A;
};
template <class A, class B>
struct Choose<false, A, B> {
  using Type = B;
};

template <class A>
constexpr bool kPrimalApart = !__is_same(A, typename A::Primal);

template <class T, bool ROUNDED>
struct Native {
  using Operand = T;
  static constexpr int64_t kChannels = Lanes<T>::count;    // channel counts are padded to multiples of this
  static constexpr int64_t kTiles = 1;                     // and rows of a product to multiples of this
  static constexpr bool kSplit = false;                    // the primal forward pass has sums of two operands
  using Primal = Native<T, false>;                         // what it is computed in
  using Stored = typename Choose<ROUNDED, Bf16, T>::Type;  // the type of activations that one step keeps for another

  PYDISTILL_INLINE static Operand narrow_one(T v) {
    if constexpr (ROUNDED) {
      Bf16 half;
      narrow(v, half);
      return widen(half);
    }
    return v;
  }
  template <class V>
  PYDISTILL_INLINE static void put(Operand* to, V v) {  // one register or some
    Register<T> part[sizeof(V) / sizeof(Register<T>)];
    __builtin_memcpy(part, &v, sizeof(V));
    if constexpr (ROUNDED)
      for (Register<T>& p : part) p = rounded_to_bf16(p);
    __builtin_memcpy(to, part, sizeof(V));
  }
  PYDISTILL_INLINE static void keep(Stored* to, Vec<T> v) { store_narrowed<T>(to, v); }
  // Rows d and d + 1 of vector v of a right factor [depth][vectors].
  PYDISTILL_INLINE static void pack(Operand* to, int64_t d, int64_t v, int64_t depth, int64_t vectors, Vec<T> even,
                                    Vec<T> odd) {
    put(to + packed_offset<T>(d, v, depth, vectors), even);
    if (d + 1 < depth) put(to + packed_offset<T>(d + 1, v, depth, vectors), odd);
  }
  // out (+)= the sum of left right, with left [rows][depth], its rows `left_row` apart, and right packed
  static void product(int64_t rows, int64_t depth, int64_t vectors, const Factors<T>* factors, int terms,
                      int64_t left_row, Product<T> out) {
    for (int i = 0; i < terms; ++i, out.add = true)
      multiply<T>(rows, depth, vectors, {factors[i].left, left_row, 1}, {factors[i].right, 0, 0, true}, out);
  }
  // out (+)= the sum of left^T right, left [depth][rows], right [depth][vectors], rows of both `..._row` apart
  static void outer(int64_t rows, int64_t depth, int64_t vectors, const Factors<T>* factors, int terms,
                    int64_t left_row, int64_t right_row, Product<T> out) {
    for (int i = 0; i < terms; ++i, out.add = true)
      multiply<T>(rows, depth, vectors, {factors[i].left, 1, left_row},
                  {factors[i].right, right_row, Lanes<T>::count, false}, out);
  }
};

}  // namespace
}  // namespace pydistill
