// Winograd tiles of the later layers: the transforms, their inverses and adjoints, the products. Part of
// convnet_step.inl.
#pragma once

#include "convnet_slot_state.h"

namespace pydistill {
namespace {

template <class T, class A>
class SlotTiles : protected SlotState<T, A> {
 protected:
  using V = Vec<T>;
  using R = Register<T>;
  using Operand = typename A::Operand;
  static constexpr int L = Lanes<T>::count, kParts = Wide<T>::parts, kLanes = Registers<T>::lanes;
  using Base = SlotState<T, A>;
  using Base::at, Base::count, Base::fill, Base::fresh, Base::layout, Base::panel, Base::sums, Base::work;

 public:
  using Base::Base;

 protected:
  // Transforms a block's pooled output into the next layer's input tiles.
  template <class B = A>
  __attribute__((noinline)) void transform_input(int64_t l, T* from, typename B::Operand* to,
                                                 typename B::Operand* rest = nullptr) {
    const LayerLayout& at = layout.layer[l];
    const LayerLayout& before = layout.layer[l - 1];
    const int64_t width = 4 * at.columns + 2, plane_size = tile_plane<typename B::Operand>(at, at.in_row);
    fill(work.padded, (4 * at.rows + 2) * width);
    for (int64_t g = 0; g < count; ++g)
      for (int64_t group = 0; group < at.in_groups; ++group) {
        const V* plane = panel(from, g, before.pooled, group, at.H * at.W);
        for (int64_t h = 0; h < at.H; ++h)
          for (int64_t w = 0; w < at.W; ++w) work.padded[(h + 1) * width + w + 1] = plane[h * at.W + w];
        for (int64_t row = 0; row < at.rows; ++row)
          for (int64_t column = 0; column < at.columns; ++column)
            for (int part = 0; part < kParts; ++part) {
              R x[6][6], v[6][6];
              const Wide<T>* corner = wide<T>(work.padded) + 4 * row * width + 4 * column;
#pragma GCC unroll 6
              for (int i = 0; i < 6; ++i)
#pragma GCC unroll 6
                for (int j = 0; j < 6; ++j) x[i][j] = corner[i * width + j].part[part];
              both_ways<T, 6, 6>(Winograd::input<T>, x, v);
              const int64_t lane = group * L + part * kLanes;
              typename B::Operand* out = to + (g * at.tiles + row * at.columns + column) * at.in_row + lane;
#pragma GCC unroll 36
              for (int p = 0; p < 36; ++p) B::put(out + p * plane_size, v[p / 6][p % 6]);
              if constexpr (B::kSplit)
                if (rest != nullptr)
#pragma GCC unroll 36
                  for (int p = 0; p < 36; ++p)
                    B::put(rest + (out - to) + p * plane_size, v[p / 6][p % 6] - B::widened(out + p * plane_size));
            }
      }
    clear_rest<B>(at, to, at.in_row);
    if (B::kSplit && rest != nullptr) clear_rest<B>(at, rest, at.in_row);
  }

  // The gradient of a convolution's output, transformed by the adjoint of the output transform.
  __attribute__((noinline)) void transform_grad(const LayerLayout& at, V* plane, int64_t g, int64_t group,
                                                Operand* to) {
    const int64_t plane_size = tile_plane<Operand>(at, at.out_row);
    for (int64_t row = 0; row < at.rows; ++row)
      for (int64_t column = 0; column < at.columns; ++column)
        for (int part = 0; part < kParts; ++part) {
          R y[4][4], m[6][6];
#pragma GCC unroll 4
          for (int i = 0; i < 4; ++i)
#pragma GCC unroll 4
            for (int j = 0; j < 4; ++j) {
              const int64_t h = 4 * row + i, w = 4 * column + j;
              y[i][j] = h < at.H && w < at.W ? wide<T>(plane)[h * at.W + w].part[part] : R{};
            }
          both_ways<T, 4, 6>(Winograd::output_adjoint<T>, y, m);
          const int64_t lane = group * L + part * kLanes;
          Operand* out = to + (g * at.tiles + row * at.columns + column) * at.out_row + lane;
#pragma GCC unroll 36
          for (int p = 0; p < 36; ++p) A::put(out + p * plane_size, m[p / 6][p % 6]);
        }
  }

  // Transforms the products' tiles back to a convolution's output.
  __attribute__((noinline)) void transform_output(const LayerLayout& at, int64_t g, int64_t group, V* plane) const {
    const int64_t plane_size = tile_plane<T>(at, at.out);
    for (int64_t row = 0; row < at.rows; ++row)
      for (int64_t column = 0; column < at.columns; ++column)
        for (int part = 0; part < kParts; ++part) {
          R m[6][6], y[4][4];
          const int64_t lane = group * L + part * kLanes;
          const T* in = work.product + (g * at.tiles + row * at.columns + column) * at.out + lane;
#pragma GCC unroll 36
          for (int p = 0; p < 36; ++p) m[p / 6][p % 6] = load_register<T>(in + p * plane_size);
          both_ways<T, 6, 4>(Winograd::output<T>, m, y);
#pragma GCC unroll 4
          for (int i = 0; i < 4; ++i)
#pragma GCC unroll 4
            for (int j = 0; j < 4; ++j) {
              const int64_t h = 4 * row + i, w = 4 * column + j;
              if (h < at.H && w < at.W) wide<T>(plane)[h * at.W + w].part[part] = y[i][j];
            }
        }
  }

  // Transforms the products' tiles back to the gradient of the previous block's pooled output, adding overlaps.
  __attribute__((noinline)) void transform_input_adjoint(int64_t l, T* to) {
    const LayerLayout& at = layout.layer[l];
    const int64_t width = 4 * at.columns + 2, plane_size = tile_plane<T>(at, at.in);
    for (int64_t g = 0; g < count; ++g)
      for (int64_t group = 0; group < at.in_groups; ++group) {
        fill(work.padded, (4 * at.rows + 2) * width);
        for (int64_t row = 0; row < at.rows; ++row)
          for (int64_t column = 0; column < at.columns; ++column)
            for (int part = 0; part < kParts; ++part) {
              R v[6][6], x[6][6];
              const int64_t lane = group * L + part * kLanes;
              const T* in = work.product + (g * at.tiles + row * at.columns + column) * at.in + lane;
#pragma GCC unroll 36
              for (int p = 0; p < 36; ++p) v[p / 6][p % 6] = load_register<T>(in + p * plane_size);
              both_ways<T, 6, 6>(Winograd::input_adjoint<T>, v, x);
              Wide<T>* corner = wide<T>(work.padded) + 4 * row * width + 4 * column;
#pragma GCC unroll 6
              for (int i = 0; i < 6; ++i)
#pragma GCC unroll 6
                for (int j = 0; j < 6; ++j) corner[i * width + j].part[part] += x[i][j];
            }
        V* plane = panel(to, g, layout.layer[l - 1].grad_pooled, group, at.H * at.W);
        for (int64_t h = 0; h < at.H; ++h)
          for (int64_t w = 0; w < at.W; ++w) plane[h * at.W + w] = work.padded[(h + 1) * width + w + 1];
      }
  }

  int64_t padded_tiles(const LayerLayout& at) const { return round_up(count * at.tiles, A::kTiles); }

  // Stride of points, in elements of S: a cache line more than their tiles take, or a tile's 36 points would all fall
  // into one set of the first-level cache.
  template <class S>
  int64_t tile_plane(const LayerLayout& at, int64_t row) const {
    return padded_tiles(at) * row + 64 / static_cast<int64_t>(sizeof(S));
  }

  // Tiles that only pad a product's rows hold zeros, as sums over tiles include them.
  template <class B = A>
  void clear_rest(const LayerLayout& at, typename B::Operand* tiles, int64_t row) const {
    const int64_t all = padded_tiles(at), used = count * at.tiles;
    if (used < all)
      for (int p = 0; p < 36; ++p)
        for (int64_t i = used * row; i < all * row; ++i) tiles[p * tile_plane<typename B::Operand>(at, row) + i] = {};
  }

  // product = the sum of inputs filters, for every point
  template <class B = A, int N>
  void multiply_inputs(const LayerLayout& at, const Factors<typename B::Operand> (&factors)[N]) {
    multiply_tiles<B>(at, factors, at.in_row, at.in, at.out);
  }

  // product = the sum of gradients filters^T
  template <int N>
  void multiply_grads(const LayerLayout& at, const Factors<Operand> (&factors)[N]) {
    multiply_tiles<A>(at, factors, at.out_row, at.out, at.in);
  }

  // A point's terms in succession, so that its sums stay in cache.
  template <class B, int N>
  void multiply_tiles(const LayerLayout& at, const Factors<typename B::Operand> (&factors)[N], int64_t row,
                      int64_t from, int64_t to) {
    for (int p = 0; p < 36; ++p)
      B::product(count * at.tiles, from, to / L,
                 of_point(factors, p * tile_plane<typename B::Operand>(at, row), p * from * to).terms, N, row,
                 {work.product + p * tile_plane<T>(at, to), to, L, false});
  }

  // the slot's sums (+)= the sum of inputs^T gradients, for every point
  template <int N>
  void add_outer(const LayerLayout& at, const Factors<Operand> (&factors)[N]) {
    for (int p = 0; p < 36; ++p)
      A::outer(at.in, padded_tiles(at), at.out_groups,
               of_point(factors, p * tile_plane<Operand>(at, at.in_row), p * tile_plane<Operand>(at, at.out_row)).terms,
               N, at.in_row, at.out_row, {sums + at.sum + p * at.in * at.out, at.out, L, !fresh});
  }

  template <class S, int N>
  struct Terms {
    Factors<S> terms[N];
  };
  template <class S, int N>
  static Terms<S, N> of_point(const Factors<S> (&factors)[N], int64_t left, int64_t right) {
    Terms<S, N> at;
    for (int i = 0; i < N; ++i) at.terms[i] = {factors[i].left + left, factors[i].right + right};
    return at;
  }
};

}  // namespace
}  // namespace pydistill
