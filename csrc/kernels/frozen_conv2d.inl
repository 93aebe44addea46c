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

// winograd.h's points give F(3x3, 4x4) as well: filters of four taps leave three outputs of a tile.
template <class T>
PYDISTILL_INLINE void output_of_four_taps(const Register<T> (&m)[6], Register<T> (&y)[3]) {
  const Register<T> sum_a = m[1] + m[2], sum_b = m[3] + m[4], odd_a = m[1] - m[2], odd_b = m[3] - m[4];
  y[0] = m[0] + sum_a + sum_b;
  y[1] = fused<T>(odd_a, T(Winograd::a), odd_b * T(Winograd::b));
  y[2] = fused<T>(sum_a, T(Winograd::a2), fused<T>(sum_b, T(Winograd::b2), m[5]));
}

// The sum over the lanes of each of 16 registers.
PYDISTILL_INLINE void lane_sums(const Register<float> (&v)[16], float* to) {
#if defined(__AVX512F__)
  Register<float> pairs[8], fours[4], halves[2];  // of registers, in every quarter; then over quarters
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i)
    pairs[i] = _mm512_unpacklo_ps(v[2 * i], v[2 * i + 1]) + _mm512_unpackhi_ps(v[2 * i], v[2 * i + 1]);
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512d a = _mm512_castps_pd(pairs[2 * i]), b = _mm512_castps_pd(pairs[2 * i + 1]);
    fours[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b)) + _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
  }
  const auto over_quarters = [](Register<float> a, Register<float> b) PYDISTILL_LAMBDA -> Register<float> {
    return _mm512_shuffle_f32x4(a, b, 0x88) + _mm512_shuffle_f32x4(a, b, 0xDD);
  };
  for (int i = 0; i < 2; ++i) halves[i] = over_quarters(fours[2 * i], fours[2 * i + 1]);
  *reinterpret_cast<Registers<float>::Unaligned*>(to) = over_quarters(halves[0], halves[1]);
#else
  for (int i = 0; i < 16; ++i) {
    to[i] = 0;
    for (int lane = 0; lane < Registers<float>::lanes; ++lane) to[i] += v[i][lane];
  }
#endif
}

// P: what is multiplied, numbers of T or pairs of 16-bit integers.
template <class T, class S, class P, int SIDE>
class Convolution {
  using R = Register<T>;
  static constexpr int L = Lanes<P>::count, kLanes = Registers<T>::lanes;
  static constexpr bool kPaired = __is_same(P, int32_t);
  // Terms of one sum: of sums of sums less is lost in rounding than of a long one. Integers lose nothing.
  static constexpr int64_t kDepth = kPaired ? int64_t{1} << 30 : 64;

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
        tile_plane(call.tile_plane() * L),
        filter_plane(call.outputs() * call.filter_rows() * L),
        inputs(static_cast<P*>(scratch)),
        products(inputs + kPoints * input_plane),
        factors(reinterpret_cast<float*>(products + kPoints * product_plane)),
        floats(factors + call.chunk * kFactors),
        zeros(reinterpret_cast<S*>(kPaired ? floats + kPoints * tile_plane : factors)) {
    for (int64_t i = 0; i < C; ++i) zeros[i] = S{};
  }

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
        const P* const factors_of_point = filter(p, group) + (kPaired ? L : 0);
        for (int64_t d = 0, depth = call.depth(); d < depth; d += kDepth)
          multiply<P>(count, depth - d < kDepth ? depth - d : kDepth, groups, {inputs + p * input_plane + d, row, 1},
                      {factors_of_point + d * L, L, call.filter_rows() * L, false},
                      {products + p * product_plane, call.part * L, L, d > 0});
      }
      transform_outputs(group, groups);
    }
  }

 private:
  static constexpr int64_t kFactors = FrozenConv2d::kFactors * 16;
  const FrozenConv2d& call;
  const int64_t H, W, C, K, row, input_plane, product_plane, tile_plane, filter_plane;
  P *const inputs, *const products;
  float *const factors, *const floats;  // where kPaired
  S* const zeros;                       // a pixel outside of the image
  int64_t first = 0, count = 0;

  const P* filter(int64_t point, int64_t vector) const {
    return static_cast<const P*>(call.filters) + (point * call.outputs() + vector) * call.filter_rows() * L;
  }

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
      if (call.of_cells()) {
        transform_cells(t, image, top, left);
        continue;
      }
      const S* pixels[6][6];
      for (int i = 0; i < 6; ++i)
        for (int j = 0; j < 6; ++j)
          pixels[i][j] = inside(top + i, left + j) ? image + ((top + i) * W + left + j) * C : zeros;
      int64_t c = 0;
      if constexpr (kPaired) {
        for (; c + 2 * kLanes <= C; c += 2 * kLanes)
          transform_pairs(floats + c, [&](int i, int j) PYDISTILL_LAMBDA { return load_bf16_pairs(pixels[i][j] + c); });
        const int64_t rest = C - c;
        if (C <= kLanes)
          transform_input(floats, tile_plane,
                          [&](int i, int j) PYDISTILL_LAMBDA { return widened_register<T>(pixels[i][j], rest); });
        else if (rest)
          transform_pairs(floats + c,
                          [&](int i, int j) PYDISTILL_LAMBDA { return load_bf16_pairs(pixels[i][j] + c, rest); });
        scale(t);
      } else {
        T* const to = inputs + t * row;
        for (; c + kLanes <= C; c += kLanes)
          transform_input(to + c, input_plane,
                          [&](int i, int j) PYDISTILL_LAMBDA { return widened_register<T>(pixels[i][j] + c); });
        const int64_t rest = C - c;
        if (rest)
          transform_input(to + c, input_plane,
                          [&](int i, int j) PYDISTILL_LAMBDA { return widened_register<T>(pixels[i][j] + c, rest); });
      }
    }
  }

  // A cell's channels lie in two rows of the image.
  __attribute__((noinline)) void transform_cells(int64_t t, const S* image, int64_t top, int64_t left) {
    const S *upper[6][6], *lower[6][6];
    for (int i = 0; i < 6; ++i)
      for (int j = 0; j < 6; ++j) {
        const bool there = inside(top + i, left + j);
        upper[i][j] = there ? image + (top + i) * W * C + (left + j) * (C / 2) : zeros;
        lower[i][j] = there ? upper[i][j] + W * (C / 2) : zeros;
      }
    const int64_t half = C / 2;
    T* const to = kPaired ? reinterpret_cast<T*>(floats) : reinterpret_cast<T*>(inputs + t * row);
    const int64_t plane = kPaired ? tile_plane : input_plane;
    if (!kPaired || C <= kLanes)
      for (int64_t c = 0; c < C; c += kLanes)
        transform_input(to + c, plane, [&](int i, int j) PYDISTILL_LAMBDA {
          return widened_register_of_two<T>(upper[i][j], lower[i][j], half, c);
        });
    if constexpr (kPaired) {
      for (int64_t c = 0; c < C && C > kLanes; c += 2 * kLanes)
        transform_pairs(floats + c, [&](int i, int j) PYDISTILL_LAMBDA {
          return load_bf16_pairs_of_two(upper[i][j], lower[i][j], half, c);
        });
      scale(t);
    }
  }

  PYDISTILL_INLINE bool inside(int64_t h, int64_t w) const { return h >= 0 && h < H && w >= 0 && w < W; }

  // Neighbouring channels as those on even and on odd places: no lane moves on the way to pairs of integers.
  template <class Pixels>
  PYDISTILL_INLINE void transform_pairs(float* to, Pixels pixels) {
    transform_input(to, tile_plane, [&](int i, int j) PYDISTILL_LAMBDA { return even_of_pairs(pixels(i, j)); });
    transform_input(to + kLanes, tile_plane, [&](int i, int j) PYDISTILL_LAMBDA { return odd_of_pairs(pixels(i, j)); });
  }

  template <class Pixel>
  PYDISTILL_INLINE static void transform_input(T* to, int64_t plane, Pixel pixel) {
    R half[6][6];
#pragma GCC unroll 6
    for (int j = 0; j < 6; ++j) {
      R column[6], out[6];
#pragma GCC unroll 6
      for (int i = 0; i < 6; ++i) column[i] = pixel(i, j);
      Winograd::input<T>(column, out);
#pragma GCC unroll 6
      for (int i = 0; i < 6; ++i) half[i][j] = out[i];
      in_order();
    }
#pragma GCC unroll 6
    for (int i = 0; i < 6; ++i) {
      R out[6];
      Winograd::input<T>(half[i], out);
#pragma GCC unroll 6
      for (int j = 0; j < 6; ++j) *reinterpret_cast<R*>(to + (6 * i + j) * plane) = out[j];
      in_order();
    }
  }

  // The tile in `floats` as 16-bit integers, every point's channels scaled to one norm; tile t's factors undo it.
  PYDISTILL_INLINE void scale(int64_t t) {
    const int64_t registers = C <= kLanes ? 1 : (C + 2 * kLanes - 1) / (2 * kLanes) * 2;
    if (registers == 1) return scale<1>(t, 1);
    if (registers == 2) return scale<2>(t, 2);
    if (registers == 4) return scale<4>(t, 4);
    scale<0>(t, registers);
  }

  template <int REGISTERS>  // 0: any even number
  PYDISTILL_INLINE void scale(int64_t t, int64_t registers) {
    if constexpr (REGISTERS != 0) registers = REGISTERS;
    const float norm_of_rounding = 0.5f * sqrt_lane(static_cast<float>(2 * call.depth()));
    const float norm = (kLeftNorm - norm_of_rounding) * (1 - 0x1p-12f);  // sums of squares are rounded, too
    float* const undo = factors + t * kFactors;
    const int64_t plane = tile_plane;
    alignas(64) float by[kFactors] = {};
    for (int first_point = 0; first_point < kFactors; first_point += 16) {
      R squares[16] = {};
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        if (first_point + i >= kPoints) break;
        const float* const from = floats + (first_point + i) * plane;
        R sum[2] = {};
#pragma GCC unroll 4
        for (int64_t q = 0; q < registers; ++q) {
          const R v = load_register(from + q * kLanes);
          sum[q % 2] = multiply_add(v, v, sum[q % 2]);
        }
        squares[i] = sum[0] + sum[1];
      }
      lane_sums(squares, by + first_point);
    }
    int outside = 0;
    for (int p = 0; p < kPoints; ++p) outside |= !(by[p] > 1e-30f) | !(by[p] < 1e30f);
    for (int p = 0; p < kFactors; ++p) undo[p] = sqrt_lane(by[p]) * (1 / norm);
    for (int p = 0; p < kFactors; ++p) by[p] = 1 / undo[p];
    if (outside) scale_outside_of_float(registers * kLanes, norm, by, undo);
    int32_t* to = inputs + t * row;
    const float* from = floats;
#pragma GCC unroll 4
    for (int p = 0; p < kPoints; ++p, from += plane, to += input_plane) {
      const R factor = splat(by + p);
      if constexpr (REGISTERS == 1)
        store_rounded_register(reinterpret_cast<int16_t*>(to), load_register(from) * factor);
      else
#pragma GCC unroll 2
        for (int64_t q = 0; q < registers; q += 2)
          *reinterpret_cast<Register<int32_t>*>(to + q / 2 * kLanes) =
              rounded_pairs(load_register(from + q * kLanes) * factor, load_register(from + (q + 1) * kLanes) * factor);
    }
  }

  // Where squares are no normal floats: all zero, very small or large, or not finite, which makes NaN of the tile.
  __attribute__((noinline)) void scale_outside_of_float(int64_t lanes, float norm, float* by, float* undo) const {
    for (int p = 0; p < kPoints; ++p) {
      const float* const from = floats + p * tile_plane;
      double squares = 0;
      for (int64_t c = 0; c < lanes; ++c) squares += static_cast<double>(from[c]) * from[c];
      const double own = sqrt_lane(squares), factor = norm / own;
      by[p] = own > 0 && squares - squares == 0 ? static_cast<float>(factor < 1e38 ? factor : 1e38) : 0;
      undo[p] = by[p] > 0 ? 1 / by[p] : static_cast<float>(squares - squares);
    }
  }

  __attribute__((noinline)) void transform_outputs(int64_t group, int64_t groups) {
    for (int64_t t = 0; t < count; ++t) {
      const Tile at = tile(first + t);
      S* const image = static_cast<S*>(call.y) + at.n * H * W * K;
      const bool whole = at.h + SIDE <= H && at.w + SIDE <= W;
      for (int64_t k = 0; k < groups * L; k += kLanes) {
        const P* const from = products + t * call.part * L + k;
        const P* const undo = filter(0, group + k / L) + k % L;
        const int64_t channel = group * L + k;
        if (call.to_cells()) {
          put_cells(image, at, from, t, undo, channel);
          continue;
        }
        S* const corner = image + (at.h * W + at.w) * K + channel;
        const int64_t down = W * K, right = K;
        if (whole && channel + kLanes <= K)
          transform_output(from, t, undo, [&](int i, int j, R y) PYDISTILL_LAMBDA {
            store_narrowed_register<T>(corner + i * down + j * right, y);
          });
        else
          transform_output(from, t, undo, [&](int i, int j, R y) PYDISTILL_LAMBDA {
            if (at.h + i >= H || at.w + j >= W) return;
            if (channel + kLanes <= K)
              store_narrowed_register<T>(corner + i * down + j * right, y);
            else if (channel < K)
              store_narrowed_register<T>(corner + i * down + j * right, y, K - channel);
          });
      }
    }
  }

  __attribute__((noinline)) void put_cells(S* image, Tile at, const P* from, int64_t t, const P* undo,
                                           int64_t channel) const {
    const int64_t half = K / 2;
    transform_output(from, t, undo, [&](int i, int j, R y) PYDISTILL_LAMBDA {
      if (at.h + i >= H || at.w + j >= W) return;
      S* const upper = image + (at.h + i) * W * K + (at.w + j) * half;
      store_narrowed_register_to_two<T>(upper, upper + W * half, half, channel, y);
    });
  }

  template <class Put>
  PYDISTILL_INLINE void transform_output(const P* from, int64_t t, const P* filter_factors, Put put) const {
    R half[SIDE][6];
#pragma GCC unroll 6
    for (int j = 0; j < 6; ++j) {
      R column[6], out[SIDE];
#pragma GCC unroll 6
      for (int i = 0; i < 6; ++i) {
        const int p = 6 * i + j;
        const Register<P> product = *reinterpret_cast<const Register<P>*>(from + p * product_plane);
        if constexpr (kPaired) {
          const float* const of_filter = reinterpret_cast<const float*>(filter_factors + p * filter_plane);
          column[i] =
              __builtin_convertvector(product, R) * splat(factors + t * kFactors + p) * load_register(of_filter);
        } else {
          column[i] = product;
        }
      }
      output(column, out);
#pragma GCC unroll 4
      for (int i = 0; i < SIDE; ++i) half[i][j] = out[i];
      in_order();
    }
#pragma GCC unroll 4
    for (int i = 0; i < SIDE; ++i) {
      R out[SIDE];
      output(half[i], out);
#pragma GCC unroll 4
      for (int j = 0; j < SIDE; ++j) put(i, j, out[j]);
      in_order();
    }
  }

  PYDISTILL_INLINE static void output(const R (&m)[6], R (&y)[SIDE]) {
    if constexpr (SIDE == 4)
      Winograd::output<T>(m, y);
    else
      output_of_four_taps<T>(m, y);
  }
};

template <class T, class S, class P>
void run(const FrozenConv2d& call, int64_t begin, int64_t end, void* scratch) {
  if (call.taps == 3)
    Convolution<T, S, P, 4>(call, scratch).run(begin, end);
  else
    Convolution<T, S, P, 3>(call, scratch).run(begin, end);
}

}  // namespace

void PYDISTILL_KERNEL(const FrozenConv2d& call, int64_t begin, int64_t end, void* scratch) {
  if (call.scalar == Scalar::f64) run<double, double, double>(call, begin, end, scratch);
  if (call.scalar == Scalar::f32) run<float, float, float>(call, begin, end, scratch);
  if (call.scalar == Scalar::bf16) run<float, Bf16, int32_t>(call, begin, end, scratch);
  if (call.scalar == Scalar::f16) run<float, F16, float>(call, begin, end, scratch);
}

}  // namespace pydistill
