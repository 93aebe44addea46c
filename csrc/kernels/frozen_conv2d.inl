// CPU body: see frozen_conv2d.h for what is computed and winograd.h for the transforms. A chunk of tiles is transformed
// to [36][tiles][C]; then, for some output channels at a time, 36 matrix products and the transform back.
#include "cpu_vocabulary.h"
#include "frozen_conv2d.h"
#include "matrix_product.h"
#include "storage_registers.h"
#include "winograd.h"

namespace pydistill {
namespace {

constexpr int kPoints = Winograd::kPoints;

// Up to a register of neighbouring channels; lanes without one are zero on the way in and left out on the way back.
template <class T, class S>
PYDISTILL_INLINE void take(const S* from, int64_t count, T* to) {
  constexpr int lanes = Registers<T>::lanes;
  if (count >= lanes) {
    for (int i = 0; i < lanes; ++i) to[i] = widen(from[i]);
  } else {
    for (int i = 0; i < lanes; ++i) to[i] = i < count ? widen(from[i]) : T(0);
  }
}

template <class T, class S>
PYDISTILL_INLINE void give(const T* from, int64_t count, S* to) {
  constexpr int lanes = Registers<T>::lanes;
  if (count >= lanes) {
    for (int i = 0; i < lanes; ++i) narrow(from[i], to[i]);
  } else {
    for (int64_t i = 0; i < count; ++i) narrow(from[i], to[i]);
  }
}

// winograd.h's points give F(3x3, 4x4) as well: filters of four taps leave three outputs of a tile.
template <class T>
PYDISTILL_INLINE void output_of_four_taps(const Register<T> (&m)[6], Register<T> (&y)[3]) {
  const Register<T> sum_a = m[1] + m[2], sum_b = m[3] + m[4], odd_a = m[1] - m[2], odd_b = m[3] - m[4];
  y[0] = m[0] + sum_a + sum_b;
  y[1] = fused<T>(odd_a, T(Winograd::a), odd_b * T(Winograd::b));
  y[2] = fused<T>(sum_a, T(Winograd::a2), fused<T>(sum_b, T(Winograd::b2), m[5]));
}

template <class T, class S, int SIDE>
class Convolution {
  using R = Register<T>;
  static constexpr int L = Lanes<T>::count, kLanes = Registers<T>::lanes;

 public:
  Convolution(const FrozenConv2d& call, void* scratch)
      : call(call),
        H(call.H),
        W(call.W),
        C(call.C),
        K(call.K),
        row(call.inputs() * L),
        input_plane(call.input_plane() * L),
        product_plane(call.product_plane() * L),
        inputs(static_cast<T*>(scratch)),
        products(inputs + kPoints * input_plane) {}

  void run(int64_t begin, int64_t end) {
    const int64_t parts = call.parts();
    int64_t transformed = -1;
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t chunk = unit / parts, group = unit % parts * call.part, outputs = call.outputs();
      first = chunk * call.chunk;
      count = call.tiles() - first < call.chunk ? call.tiles() - first : call.chunk;
      if (chunk != transformed) transform_inputs();
      transformed = chunk;
      const int64_t groups = outputs - group < call.part ? outputs - group : call.part;
      for (int64_t p = 0; p < kPoints; ++p) {
        const T* filter = static_cast<const T*>(call.filters) + (p * outputs + group) * C * L;
        multiply<T>(count, C, groups, {inputs + p * input_plane, row, 1}, {filter, L, C * L, false},
                    {products + p * product_plane, call.part * L, L, false});
      }
      transform_outputs(group, groups);
    }
  }

 private:
  const FrozenConv2d& call;
  const int64_t H, W, C, K, row, input_plane, product_plane;
  T *const inputs, *const products;
  int64_t first = 0, count = 0;

  struct Tile {
    int64_t n, h, w;  // of its output's first position
  };
  Tile tile(int64_t t) const {
    const int64_t columns = call.columns(), plane = call.rows() * columns;
    return {t / plane, t % plane / columns * SIDE, t % columns * SIDE};
  }

  __attribute__((noinline)) void transform_inputs() {
    for (int64_t t = 0; t < count; ++t) {
      const Tile at = tile(first + t);
      const S* image = static_cast<const S*>(call.x) + at.n * H * W * C;
      const int64_t top = at.h - call.before, left = at.w - call.before;
      const bool inside = top >= 0 && left >= 0 && top + 6 <= H && left + 6 <= W;
      for (int64_t c = 0; c < row; c += kLanes) {
        T* const to = inputs + t * row + c;
        if (inside && c + kLanes <= C) {
          transform_input(image + (top * W + left) * C + c, W * C, C, to);
          continue;
        }
        alignas(64) T patch[36 * kLanes];
        for (int64_t i = 0; i < 6; ++i)
          for (int64_t j = 0; j < 6; ++j) {
            const int64_t h = top + i, w = left + j;
            const bool there = h >= 0 && h < H && w >= 0 && w < W;
            take(there ? image + (h * W + w) * C + c : image, there ? C - c : 0, patch + (i * 6 + j) * kLanes);
          }
        transform_input(patch, 6 * kLanes, kLanes, to);
      }
    }
  }

  template <class From>
  PYDISTILL_INLINE void transform_input(const From* from, int64_t from_h, int64_t from_w, T* to) const {
    R x[6][6], v[6][6];
#pragma GCC unroll 6
    for (int i = 0; i < 6; ++i)
#pragma GCC unroll 6
      for (int j = 0; j < 6; ++j) x[i][j] = widened_register<T>(from + i * from_h + j * from_w);
    both_ways<T, 6, 6>(Winograd::input<T>, x, v);
#pragma GCC unroll 36
    for (int p = 0; p < kPoints; ++p) *reinterpret_cast<R*>(to + p * input_plane) = v[p / 6][p % 6];
  }

  __attribute__((noinline)) void transform_outputs(int64_t group, int64_t groups) {
    for (int64_t t = 0; t < count; ++t) {
      const Tile at = tile(first + t);
      S* const image = static_cast<S*>(call.y) + at.n * H * W * K;
      const bool inside = at.h + SIDE <= H && at.w + SIDE <= W;
      for (int64_t k = 0; k < groups * L; k += kLanes) {
        const T* const from = products + t * call.part * L + k;
        const int64_t channel = group * L + k;
        if (inside && channel + kLanes <= K) {
          transform_output(from, image + (at.h * W + at.w) * K + channel, W * K, K);
          continue;
        }
        alignas(64) T patch[SIDE * SIDE * kLanes];
        transform_output(from, patch, SIDE * kLanes, kLanes);
        for (int64_t i = 0; i < SIDE && at.h + i < H; ++i)
          for (int64_t j = 0; j < SIDE && at.w + j < W; ++j)
            give(patch + (i * SIDE + j) * kLanes, K - channel, image + ((at.h + i) * W + at.w + j) * K + channel);
      }
    }
  }

  template <class To>
  PYDISTILL_INLINE void transform_output(const T* from, To* to, int64_t to_h, int64_t to_w) const {
    R m[6][6], y[SIDE][SIDE];
#pragma GCC unroll 36
    for (int p = 0; p < kPoints; ++p) m[p / 6][p % 6] = *reinterpret_cast<const R*>(from + p * product_plane);
    if constexpr (SIDE == 4)
      both_ways<T, 6, 4>(Winograd::output<T>, m, y);
    else
      both_ways<T, 6, 3>(output_of_four_taps<T>, m, y);
#pragma GCC unroll 4
    for (int i = 0; i < SIDE; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < SIDE; ++j) store_narrowed_register<T>(to + i * to_h + j * to_w, y[i][j]);
  }
};

template <class T, class S>
void run(const FrozenConv2d& call, int64_t begin, int64_t end, void* scratch) {
  if (call.taps == 3)
    Convolution<T, S, 4>(call, scratch).run(begin, end);
  else
    Convolution<T, S, 3>(call, scratch).run(begin, end);
}

}  // namespace

void PYDISTILL_KERNEL(const FrozenConv2d& call, int64_t begin, int64_t end, void* scratch) {
  if (call.scalar == Scalar::f64) run<double, double>(call, begin, end, scratch);
  if (call.scalar == Scalar::f32) run<float, float>(call, begin, end, scratch);
  if (call.scalar == Scalar::bf16) run<float, Bf16>(call, begin, end, scratch);
  if (call.scalar == Scalar::f16) run<float, F16>(call, begin, end, scratch);
}

}  // namespace pydistill
