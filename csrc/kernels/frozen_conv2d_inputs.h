// What a frozen convolution multiplies: a chunk's tiles, transformed and, for bfloat16, scaled to 16-bit integers. Part
// of frozen_conv2d.inl.
#pragma once

#include "frozen_conv2d.h"
#include "frozen_conv2d_points.h"
#include "vocabulary/cpu_vocabulary.h"
#include "vocabulary/int16_pairs.h"
#include "vocabulary/storage_registers.h"

namespace pydistill {
namespace {

constexpr int kPoints = Winograd::kPoints;

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

// A chunk's tiles, transformed. P: what is multiplied, numbers of T or pairs of 16-bit integers. Nothing here is
// compiled for a number of taps of its own.
template <class T, class S, class P>
class Inputs {
 protected:
  using R = Register<T>;
  static constexpr int L = Lanes<P>::count, kLanes = Registers<T>::lanes;
  static constexpr bool kPaired = __is_same(P, int32_t);
  static constexpr int64_t kFactors = FrozenConv2d::kFactors * 16;
  const FrozenConv2d& call;
  const int64_t H, W, C, K, side, row, input_plane, product_plane, tile_plane, filter_plane;
  P *const inputs, *const products;
  float *const factors, *const floats;  // where kPaired
  int64_t* const order;                 // of a chunk's tiles
  S* const zeros;                       // a pixel outside of the image
  int64_t first = 0, count = 0;

  Inputs(const FrozenConv2d& call, void* scratch)
      : call(call),
        H(call.H),
        W(call.W),
        C(call.C),
        K(call.K),
        side(call.side()),
        row(call.inputs() * L),
        input_plane(call.input_plane() * L),
        product_plane(call.product_plane() * L),
        tile_plane(call.tile_plane() * L),
        filter_plane(call.outputs() * call.filter_rows() * L),
        inputs(static_cast<P*>(scratch)),
        products(inputs + kPoints * input_plane),
        factors(reinterpret_cast<float*>(products + kPoints * product_plane)),
        floats(factors + call.chunk * kFactors),
        order(reinterpret_cast<int64_t*>(kPaired ? floats + kPoints * tile_plane : factors)),
        zeros(reinterpret_cast<S*>(order + call.chunk)),
        below(points_of_last(H)),
        right(points_of_last(W)) {
    for (int64_t i = 0; i < C; ++i) zeros[i] = S{};
  }

  // How many points an image's last row and last column of tiles take. A chunk's tiles come in this order: those of the
  // last row, those of neither, those of the last column, corners. So the tiles that have a point are a range,
  // whichever point it is. `ends` are those of the first three.
  const int below, right;
  int64_t ends[3] = {};

  int points_of_last(int64_t size) const { return points_for(size % side ? size % side : side, call.taps); }
  bool whole() const { return below == 6 && right == 6; }
  int points_down(int64_t h) const { return h + side > H ? below : 6; }
  int points_across(int64_t w) const { return w + side > W ? right : 6; }

  void sort_tiles() {
    int64_t sorted = 0;
    for (int kind = 0; kind < 4; ++kind) {
      for (int64_t t = first; t < first + count; ++t) {
        const Tile at = tile(t);
        const bool last_row = points_down(at.h) < 6, last_column = points_across(at.w) < 6;
        if (kind == (last_column ? (last_row ? 3 : 2) : (last_row ? 0 : 1))) order[sorted++] = t;
      }
      if (kind < 3) ends[kind] = sorted;
    }
  }

  struct Tile {
    int64_t n, h, w;  // of its output's first position
  };
  Tile tile(int64_t t) const {
    const int64_t columns = call.columns(), plane = call.rows() * columns;
    return {t / plane, t % plane / columns * side, t % columns * side};
  }

  template <bool EDGES>
  __attribute__((noinline)) void transform_inputs() {
    for (int64_t t = 0; t < count; ++t) {
      const Tile at = tile(order[t]);
      const int down = EDGES ? points_down(at.h) : 6, across = EDGES ? points_across(at.w) : 6;
      const S* image = static_cast<const S*>(call.x) + at.n * H * W * C;
      const int64_t top = at.h - call.before, left = at.w - call.before;
      if (call.of_cells()) {
        transform_cells<EDGES>(t, image, top, left, down, across);
        continue;
      }
      const S* pixels[6][6];
      const S* const corner = image + (top * W + left) * C;
#pragma GCC unroll 6
      for (int i = 0; i < 6; ++i)
#pragma GCC unroll 6
        for (int j = 0; j < 6; ++j)
          pixels[i][j] = inside(top + i, H) & inside(left + j, W) ? corner + (i * W + j) * C : zeros;
      int64_t c = 0;
      if constexpr (kPaired) {
        for (; c + 2 * kLanes <= C; c += 2 * kLanes)
          transform_pairs(down, across, floats + c,
                          [&](int i, int j) PYDISTILL_LAMBDA { return load_bf16_pairs(pixels[i][j] + c); });
        const int64_t rest = C - c;
        if (C <= kLanes)
          transform_input(down, across, floats, tile_plane,
                          [&](int i, int j) PYDISTILL_LAMBDA { return widened_register<T>(pixels[i][j], rest); });
        else if (rest)
          transform_pairs(down, across, floats + c,
                          [&](int i, int j) PYDISTILL_LAMBDA { return load_bf16_pairs(pixels[i][j] + c, rest); });
        scale(t);
      } else {
        T* const to = inputs + t * row;
        for (; c + kLanes <= C; c += kLanes)
          transform_input(down, across, to + c, input_plane,
                          [&](int i, int j) PYDISTILL_LAMBDA { return widened_register<T>(pixels[i][j] + c); });
        const int64_t rest = C - c;
        if (rest)
          transform_input(down, across, to + c, input_plane,
                          [&](int i, int j) PYDISTILL_LAMBDA { return widened_register<T>(pixels[i][j] + c, rest); });
      }
    }
  }

  // A cell's channels lie in two rows of the image.
  template <bool EDGES>
  __attribute__((noinline)) void transform_cells(int64_t t, const S* image, int64_t top, int64_t left, int points_down,
                                                 int points_across) {
    const int down = EDGES ? points_down : 6, across = EDGES ? points_across : 6;
    const int64_t half = C / 2;
    const S* rows[2][6][6];
    const S* const corner = image + top * W * C + left * half;
#pragma GCC unroll 6
    for (int i = 0; i < 6; ++i)
#pragma GCC unroll 6
      for (int j = 0; j < 6; ++j) {
        const bool there = inside(top + i, H) & inside(left + j, W);
        rows[0][i][j] = there ? corner + i * W * C + j * half : zeros;
        rows[1][i][j] = there ? corner + i * W * C + j * half + W * half : zeros;
      }
    T* const to = kPaired ? reinterpret_cast<T*>(floats) : reinterpret_cast<T*>(inputs + t * row);
    const int64_t plane = kPaired ? tile_plane : input_plane;
    if (!kPaired || C <= kLanes)
      for (int64_t c = 0; c < C; c += kLanes) {
        const int64_t of_row = c % half;
        const auto& pixels = rows[c / half];
        if (of_row + kLanes <= half)
          transform_input(down, across, to + c, plane,
                          [&](int i, int j) PYDISTILL_LAMBDA { return widened_register<T>(pixels[i][j] + of_row); });
        else
          transform_input(down, across, to + c, plane, [&](int i, int j) PYDISTILL_LAMBDA {
            return widened_register_of_two<T>(rows[0][i][j], rows[1][i][j], half, c);
          });
      }
    if constexpr (kPaired) {
      for (int64_t c = 0; c < C && C > kLanes; c += 2 * kLanes) {
        const int64_t of_row = c % half;
        const auto& pixels = rows[c / half];
        if (of_row + 2 * kLanes <= half)
          transform_pairs(down, across, floats + c,
                          [&](int i, int j) PYDISTILL_LAMBDA { return load_bf16_pairs(pixels[i][j] + of_row); });
        else
          transform_pairs(down, across, floats + c, [&](int i, int j) PYDISTILL_LAMBDA {
            return load_bf16_pairs_of_two(rows[0][i][j], rows[1][i][j], half, c);
          });
      }
      scale(t);
    }
  }

  PYDISTILL_INLINE static bool inside(int64_t position, int64_t size) { return position >= 0 && position < size; }

  // Neighbouring channels as those on even and on odd places: no lane moves on the way to pairs of integers.
  template <class Pixels>
  PYDISTILL_INLINE void transform_pairs(int down, int across, float* to, Pixels pixels) {
    transform_input(down, across, to, tile_plane,
                    [&](int i, int j) PYDISTILL_LAMBDA { return even_of_pairs(pixels(i, j)); });
    transform_input(down, across, to + kLanes, tile_plane,
                    [&](int i, int j) PYDISTILL_LAMBDA { return odd_of_pairs(pixels(i, j)); });
  }

  template <class Pixel>
  PYDISTILL_INLINE static void transform_input(int down, int across, T* to, int64_t plane, Pixel pixel) {
    R half[6][6];
#pragma GCC unroll 6
    for (int j = 0; j < 6; ++j) {
      R column[6], out[6];
#pragma GCC unroll 6
      for (int i = 0; i < 6; ++i) column[i] = pixel(i, j);
      input_of_points<T>(down, column, out);
#pragma GCC unroll 6
      for (int i = 0; i < 6; ++i) half[i][j] = out[i];
      in_order();
    }
#pragma GCC unroll 6
    for (int i = 0; i < 6; ++i) {
      R out[6];
      input_of_points<T>(across, half[i], out);
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
};

}  // namespace
}  // namespace pydistill
