// The one-dimensional transforms of a frozen convolution's tiles, with all of winograd.h's six points or with fewer.
//
// The points serve any number of taps: y = A^T [ (G w) * (B^T x) ] gives 7 - taps outputs from six inputs. If an image
// ends within a tile, fewer outputs have to be right, and fewer points suffice: five (+-a, +-b and infinity), four
// (0, +-a and infinity) or three (+-a and infinity). The filters are those of all points: the scale they lack, p,
// p^2 - b^2 or both at point p, is in the transform of the input. An omitted point gets a copy of another one, which is
// not multiplied.
#pragma once

#include "vocabulary/winograd.h"

namespace pydistill {
namespace {

// Points for `outputs` outputs of `taps` taps.
PYDISTILL_INLINE int points_for(int64_t outputs, int64_t taps) {
  const int64_t points = outputs + taps - 1;
  return static_cast<int>(points < 3 ? 3 : points);
}

PYDISTILL_INLINE bool is_left_out(int points, int64_t point) {
  if (point == 0) return points == 5 || points == 3;
  return points <= 4 && (point == 3 || point == 4);
}

template <class T>
PYDISTILL_INLINE void input_of_points(int points, const Register<T> (&x)[6], Register<T> (&v)[6]) {
  constexpr double a = Winograd::a, b = Winograd::b, a2 = Winograd::a2, b2 = Winograd::b2;
  if (points == 6) return Winograd::input<T>(x, v);
  if (points == 5) {
    const Register<T> even_a = fused<T>(x[0], T(-b2), x[2]), odd_a = fused<T>(x[1], T(-b2), x[3]) * T(a);
    const Register<T> even_b = fused<T>(x[0], T(-a2), x[2]), odd_b = fused<T>(x[1], T(-a2), x[3]) * T(b);
    v[1] = fused<T>(even_a, T(a2), odd_a);
    v[2] = fused<T>(even_a, T(a2), -odd_a);
    v[3] = fused<T>(even_b, T(b2), odd_b);
    v[4] = fused<T>(even_b, T(b2), -odd_b);
    v[5] = fused<T>(x[0], T(a2 * b2), fused<T>(x[2], T(-a2 - b2), x[4]));
    v[0] = v[1];
  } else if (points == 4) {
    v[0] = fused<T>(x[0], T(a2 * b2), x[2] * T(-b2));
    v[1] = fused<T>(x[1], T(a), x[2]) * T(a2 - b2);
    v[2] = fused<T>(x[1], T(-a), x[2]) * T(a2 - b2);
    v[5] = fused<T>(x[1], T(-a2), x[3]);
    v[3] = v[4] = v[2];
  } else {
    const Register<T> even = x[0] * T(a2 * (a2 - b2)), odd = x[1] * T(a * (a2 - b2));
    v[1] = even + odd;
    v[2] = even - odd;
    v[5] = fused<T>(x[0], T(-a2), x[2]);
    v[0] = v[3] = v[4] = v[2];
  }
}

constexpr double power(double x, int n) { return n == 0 ? 1 : x * power(x, n - 1); }

template <int POINTS, class T, int SIDE>
PYDISTILL_INLINE void output_of(const Register<T> (&m)[6], Register<T> (&y)[SIDE]) {
  constexpr int last = POINTS + SIDE - 7;  // the last output that counts: infinity contributes to it
  const Register<T> sum_a = m[1] + m[2], odd_a = m[1] - m[2];
  if constexpr (POINTS >= 5) {
    const Register<T> sum_b = m[3] + m[4], odd_b = m[3] - m[4];
    y[0] = POINTS == 6 ? m[0] + sum_a + sum_b : sum_a + sum_b;
#pragma GCC unroll 4
    for (int i = 1; i < SIDE; ++i) {
      const T of_a = T(power(Winograd::a, i)), of_b = T(power(Winograd::b, i));
      const Register<T> sum = i % 2 ? odd_b : sum_b;
      y[i] = fused<T>(i % 2 ? odd_a : sum_a, of_a, i == last ? fused<T>(sum, of_b, m[5]) : sum * of_b);
    }
  } else {
    y[0] = POINTS == 4 ? m[0] + sum_a : sum_a;
#pragma GCC unroll 4
    for (int i = 1; i < SIDE; ++i) {
      const T of_a = T(power(Winograd::a, i));
      const Register<T> sum = i % 2 ? odd_a : sum_a;
      y[i] = i == last ? fused<T>(sum, of_a, m[5]) : sum * of_a;
    }
  }
  if constexpr (last == 0) y[0] = y[0] + m[5];
}

template <class T, int SIDE>
PYDISTILL_INLINE void output_of_points(int points, const Register<T> (&m)[6], Register<T> (&y)[SIDE]) {
  if (points == 6) return output_of<6, T>(m, y);
  if (points == 5) return output_of<5, T>(m, y);
  if constexpr (SIDE >= 3)
    if (points == 4) return output_of<4, T>(m, y);
  if constexpr (SIDE >= 4) output_of<3, T>(m, y);
}

// The polynomial with these coefficients at the points a, -a, b and -b.
template <class T, int SIZE>
PYDISTILL_INLINE void at_points(const Register<T> (&w)[SIZE], Register<T> (&values)[4]) {
  Register<T> even_a = w[0], odd_a = w[1] * T(Winograd::a), even_b = w[0], odd_b = w[1] * T(Winograd::b);
#pragma GCC unroll 4
  for (int i = 2; i < SIZE; ++i) {
    Register<T>&of_a = i % 2 ? odd_a : even_a, &of_b = i % 2 ? odd_b : even_b;
    of_a = fused<T>(w[i], T(power(Winograd::a, i)), of_a);
    of_b = fused<T>(w[i], T(power(Winograd::b, i)), of_b);
  }
  values[0] = even_a + odd_a, values[1] = even_a - odd_a;
  values[2] = even_b + odd_b, values[3] = even_b - odd_b;
}

// The adjoint of output_of<6>.
template <class T, int SIDE>
PYDISTILL_INLINE void output_adjoint(const Register<T> (&y)[SIDE], Register<T> (&m)[6]) {
  Register<T> values[4];
  at_points<T>(y, values);
  m[0] = y[0];
  for (int i = 0; i < 4; ++i) m[1 + i] = values[i];
  m[5] = y[SIDE - 1];
}

// The transform of filters with all points, and its adjoint.
template <class T, int TAPS>
PYDISTILL_INLINE void filter_of_taps(const Register<T> (&w)[TAPS], Register<T> (&u)[6]) {
  Register<T> values[4];
  at_points<T>(w, values);
  u[0] = w[0] * T(Winograd::g0);
  for (int i = 0; i < 4; ++i) u[1 + i] = values[i] * T(i < 2 ? Winograd::ga : Winograd::gb);
  u[5] = w[TAPS - 1];
}

template <class T, int TAPS>
PYDISTILL_INLINE void filter_adjoint(const Register<T> (&u)[6], Register<T> (&w)[TAPS]) {
  const Register<T> sum_a = (u[1] + u[2]) * T(Winograd::ga), odd_a = (u[1] - u[2]) * T(Winograd::ga);
  const Register<T> sum_b = (u[3] + u[4]) * T(Winograd::gb), odd_b = (u[3] - u[4]) * T(Winograd::gb);
  w[0] = fused<T>(u[0], T(Winograd::g0), sum_a + sum_b);
#pragma GCC unroll 4
  for (int i = 1; i < TAPS; ++i)
    w[i] =
        fused<T>(i % 2 ? odd_a : sum_a, T(power(Winograd::a, i)), (i % 2 ? odd_b : sum_b) * T(power(Winograd::b, i)));
  w[TAPS - 1] = w[TAPS - 1] + u[5];
}

}  // namespace
}  // namespace pydistill
