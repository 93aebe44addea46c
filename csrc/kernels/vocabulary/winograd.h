// Winograd's F(4x4, 3x3) on registers of channels: a 3x3 convolution of a 6x6 tile becomes 36 products instead of 144.
//
//   y = A^T [ (G w G^T) * (B^T x B) ] A      with x [6, 6], w [3, 3], y [4, 4]
//
// Its adjoints give the other two convolutions of training from the same transformed tiles: the gradient with respect
// to x is B [ (G w G^T) * (A ybar A^T) ] B^T, that with respect to w is G^T [ (B^T x B) * (A ybar A^T) ] G.
// The interpolation points are 0, +-5/8, +-3/2 and infinity: every entry of A and B is exact in binary, and rounding
// errors are half of those with the textbook's 0, +-1, +-2 (relative error of a layer of 128 channels in float32:
// 7e-7, where a direct convolution in the same layout has 6e-7). Lavin & Gray, CVPR 2016; Barabasz et al., 2020.
#pragma once

#include "cpu_vocabulary.h"

namespace pydistill {
namespace {

template <class T>
PYDISTILL_INLINE Register<T> fused(Register<T> a, T b, Register<T> c) {  // a * b + c
  return multiply_add(a, splat(&b), c);
}

struct Winograd {
  static constexpr int kPoints = 36;
  static constexpr double a = 5.0 / 8, b = 3.0 / 2, a2 = a * a, b2 = b * b, a3 = a2 * a, b3 = b2 * b;

  // One-dimensional transforms; the two-dimensional ones apply them along columns, then along rows.
  template <class T>
  PYDISTILL_INLINE static void input(const Register<T> (&x)[6], Register<T> (&v)[6]) {  // B^T x
    const Register<T> even_a = fused<T>(x[2], T(-b2), x[4]), odd_a = fused<T>(x[1], T(-b2), x[3]);
    const Register<T> even_b = fused<T>(x[2], T(-a2), x[4]), odd_b = fused<T>(x[1], T(-a2), x[3]);
    v[0] = fused<T>(x[0], T(a2 * b2), fused<T>(x[2], T(-a2 - b2), x[4]));
    v[1] = fused<T>(odd_a, T(a), even_a);
    v[2] = fused<T>(odd_a, T(-a), even_a);
    v[3] = fused<T>(odd_b, T(b), even_b);
    v[4] = fused<T>(odd_b, T(-b), even_b);
    v[5] = fused<T>(x[1], T(a2 * b2), fused<T>(x[3], T(-a2 - b2), x[5]));
  }

  template <class T>
  PYDISTILL_INLINE static void input_adjoint(const Register<T> (&v)[6], Register<T> (&x)[6]) {  // B v
    const Register<T> sum_a = v[1] + v[2], sum_b = v[3] + v[4], odd_a = v[1] - v[2], odd_b = v[3] - v[4];
    x[0] = v[0] * T(a2 * b2);
    x[1] = fused<T>(odd_a, T(-a * b2), fused<T>(odd_b, T(-b * a2), v[5] * T(a2 * b2)));
    x[2] = fused<T>(sum_a, T(-b2), fused<T>(sum_b, T(-a2), v[0] * T(-a2 - b2)));
    x[3] = fused<T>(odd_a, T(a), fused<T>(odd_b, T(b), v[5] * T(-a2 - b2)));
    x[4] = v[0] + sum_a + sum_b;
    x[5] = v[5];
  }

  template <class T>
  PYDISTILL_INLINE static void output(const Register<T> (&m)[6], Register<T> (&y)[4]) {  // A^T m
    const Register<T> sum_a = m[1] + m[2], sum_b = m[3] + m[4], odd_a = m[1] - m[2], odd_b = m[3] - m[4];
    y[0] = m[0] + sum_a + sum_b;
    y[1] = fused<T>(odd_a, T(a), odd_b * T(b));
    y[2] = fused<T>(sum_a, T(a2), sum_b * T(b2));
    y[3] = fused<T>(odd_a, T(a3), fused<T>(odd_b, T(b3), m[5]));
  }

  template <class T>
  PYDISTILL_INLINE static void output_adjoint(const Register<T> (&y)[4], Register<T> (&m)[6]) {  // A y
    const Register<T> even_a = fused<T>(y[2], T(a2), y[0]), odd_a = fused<T>(y[3], T(a2), y[1]);
    const Register<T> even_b = fused<T>(y[2], T(b2), y[0]), odd_b = fused<T>(y[3], T(b2), y[1]);
    m[0] = y[0];
    m[1] = fused<T>(odd_a, T(a), even_a);
    m[2] = fused<T>(odd_a, T(-a), even_a);
    m[3] = fused<T>(odd_b, T(b), even_b);
    m[4] = fused<T>(odd_b, T(-b), even_b);
    m[5] = y[3];
  }

  static constexpr double g0 = 1 / (a2 * b2), ga = 1 / (2 * a2 * (a2 - b2)), gb = 1 / (2 * b2 * (b2 - a2));

  template <class T>
  PYDISTILL_INLINE static void filter(const Register<T> (&w)[3], Register<T> (&u)[6]) {  // G w
    const Register<T> even_a = w[0] * T(ga) + w[2] * T(a2 * ga), odd_a = w[1] * T(a * ga);
    const Register<T> even_b = w[0] * T(gb) + w[2] * T(b2 * gb), odd_b = w[1] * T(b * gb);
    u[0] = w[0] * T(g0);
    u[1] = even_a + odd_a;
    u[2] = even_a - odd_a;
    u[3] = even_b + odd_b;
    u[4] = even_b - odd_b;
    u[5] = w[2];
  }

  template <class T>
  PYDISTILL_INLINE static void filter_adjoint(const Register<T> (&u)[6], Register<T> (&w)[3]) {  // G^T u
    const Register<T> sum_a = (u[1] + u[2]) * T(ga), sum_b = (u[3] + u[4]) * T(gb);
    w[0] = u[0] * T(g0) + sum_a + sum_b;
    w[1] = (u[1] - u[2]) * T(a * ga) + (u[3] - u[4]) * T(b * gb);
    w[2] = sum_a * T(a2) + sum_b * T(b2) + u[5];
  }
};

// Both directions of a transform: ONE maps [FROM] to [TO], tiles are [FROM][FROM] and [TO][TO].
template <class T, int FROM, int TO, class One>
PYDISTILL_INLINE void both_ways(One one, const Register<T> (&from)[FROM][FROM], Register<T> (&to)[TO][TO]) {
  Register<T> half[TO][FROM];
#pragma GCC unroll 6
  for (int j = 0; j < FROM; ++j) {
    Register<T> column[FROM], out[TO];
    for (int i = 0; i < FROM; ++i) column[i] = from[i][j];
    one(column, out);
    for (int i = 0; i < TO; ++i) half[i][j] = out[i];
  }
#pragma GCC unroll 6
  for (int i = 0; i < TO; ++i) one(half[i], to[i]);
}

}  // namespace
}  // namespace pydistill
