// The first layer: its output from tiles where that pays off and is allowed, all else from its input's columns. Part of
// convnet_step.inl.
#pragma once

#include "convnet_tiles.h"

namespace pydistill {
namespace {

template <class T, class A>
class SlotFirst : protected SlotTiles<T, A> {
 protected:
  using V = Vec<T>;
  using R = Register<T>;
  using Operand = typename A::Operand;
  static constexpr int L = Lanes<T>::count, kParts = Wide<T>::parts, kLanes = Registers<T>::lanes;
  using Base = SlotTiles<T, A>;
  using Base::at, Base::columns, Base::e, Base::fill, Base::filter, Base::filters, Base::first, Base::layout,
      Base::scale, Base::split, Base::step, Base::value, Base::work;

 public:
  using Base::Base;

 protected:
  // Prepares the first layer's input for image g of the chunk: the forward pass gathers it, and the backward pass again
  // if it is not kept. Features need no columns in addition to the tiles.
  void use_input(int64_t g, bool forward) {
    columns = work.columns + (layout.keeps_first ? g * layout.columns() : 0);
    if (!forward && layout.keeps_first) return;
    if (layout.tiled_first) gather_tiles(first + g);
    const bool sums_taps = step.form == Step::Form::gradient || step.form == Step::Form::tangent;
    if (!layout.tiled_first || sums_taps) gather_columns(first + g);
  }

  // A row's pixels are grouped by column modulo 4, so that a register takes the same pixel of adjacent tiles.
  __attribute__((noinline)) void gather_tiles(int64_t n) {
    const LayerLayout& at = layout.layer[0];
    const int64_t C = step.layer[0].in, H = step.image_h, W = step.image_w, edge = at.padding;
    const int64_t row = 4 * layout.phase, plane = (4 * at.rows + 2) * row, lanes = Registers<T>::lanes;
    const T* image = static_cast<const T*>(step.images) + e * step.images_student + n * C * H * W;
    fill(work.phases, C * plane);
    for (int64_t c = 0; c < C; ++c)
      for (int64_t h = 0; h < H; ++h)
        for (int64_t w = 0; w < W; ++w)
          work.phases[c * plane + (h + edge) * row + (w + edge) % 4 * layout.phase + (w + edge) / 4] =
              image[(c * H + h) * W + w];
    for (int64_t r = 0; r < at.rows; ++r)
      for (int64_t c = 0; c < C; ++c)
        for (int64_t tile = 0; tile < layout.tile_columns; tile += lanes) {
          R x[6][6], v[6][6];
          const T* from = work.phases + c * plane + 4 * r * row + tile;
#pragma GCC unroll 6
          for (int i = 0; i < 6; ++i)
#pragma GCC unroll 6
            for (int j = 0; j < 6; ++j) x[i][j] = load_register<T>(from + i * row + j % 4 * layout.phase + j / 4);
          both_ways<T, 6, 6>(Winograd::input<T>, x, v);
          T* to = work.tiles + (r * Winograd::kPoints * C + c) * layout.tile_columns + tile;
#pragma GCC unroll 36
          for (int p = 0; p < 36; ++p)
            *reinterpret_cast<typename Registers<T>::Unaligned*>(to + p * C * layout.tile_columns) = v[p / 6][p % 6];
        }
  }

  // The first convolution's output for one panel, from the image's tiles.
  __attribute__((noinline)) void tiled_product(const T* filters, V* to) const {
    const LayerLayout& at = layout.layer[0];
    constexpr int64_t group = Layout<T, A>::kTiledGroup;
    const int64_t C = step.layer[0].in, columns = layout.tile_columns;
    alignas(64) Wide<T> products[group][Winograd::kPoints];
    for (int64_t r = 0; r < at.rows; ++r)
      for (int64_t tile = 0; tile < at.columns; tile += group) {
        const T* tiles = work.tiles + r * Winograd::kPoints * C * columns + tile;
        const T* filter = filters;
        for (int p = 0; p < 36; ++p) {
          Wide<T> sum[group] = {};
          for (int64_t c = 0; c < C; ++c, tiles += columns, filter += L)
            for (int part = 0; part < kParts; ++part) {
              const R weight = load_register<T>(filter + part * kLanes);
              for (int i = 0; i < group; ++i)
                sum[i].part[part] = multiply_add(splat(tiles + i), weight, sum[i].part[part]);
            }
          for (int i = 0; i < group; ++i) products[i][p] = sum[i];
        }
        for (int64_t i = 0; i < smaller(group, at.columns - tile); ++i)
          for (int part = 0; part < kParts; ++part) {
            R m[6][6], y[4][4];
#pragma GCC unroll 36
            for (int p = 0; p < 36; ++p) m[p / 6][p % 6] = products[i][p].part[part];
            both_ways<T, 6, 4>(Winograd::output<T>, m, y);
#pragma GCC unroll 4
            for (int a = 0; a < 4; ++a)
#pragma GCC unroll 4
              for (int b = 0; b < 4; ++b) {
                const int64_t h = 4 * r + a, w = 4 * (tile + i) + b;
                if (h < at.H && w < at.W) wide<T>(to)[h * at.W + w].part[part] = y[a][b];
              }
          }
      }
  }

  __attribute__((noinline)) void gather_columns(int64_t n) {
    const LayerLayout& at = layout.layer[0];
    const int64_t C = step.layer[0].in, H = step.image_h, W = step.image_w, edge = at.padding;
    const int64_t width = W + 2 * edge, plane = (H + 2 * edge) * width;
    const T* image = static_cast<const T*>(step.images) + e * step.images_student + n * C * H * W;
    for (int64_t i = 0; i < C * plane; ++i) work.image[i] = Operand{};
    if (split)
      for (int64_t i = 0; i < C * plane; ++i) work.image_rest[i] = Operand{};
    for (int64_t c = 0; c < C; ++c)
      for (int64_t h = 0; h < H; ++h)
        for (int64_t w = 0; w < W; ++w) {
          const T value = image[(c * H + h) * W + w];
          const int64_t to = c * plane + (h + edge) * width + w + edge;
          work.image[to] = A::narrow_one(value);
          if (split) work.image_rest[to] = A::narrow_one(value - widen(work.image[to]));
        }
    fill_columns(work.image, columns);
    if (split) fill_columns(work.image_rest, work.columns_rest);
  }

  void fill_columns(const Operand* image, Operand* columns) const {
    const LayerLayout& at = layout.layer[0];
    const int64_t C = step.layer[0].in, edge = at.padding, positions = at.H * at.W;
    const int64_t width = step.image_w + 2 * edge, plane = (step.image_h + 2 * edge) * width;
    for (int64_t h = 0; h < at.H; ++h)
      for (int64_t w = 0; w < at.W; ++w) {
        Operand* to = columns + (h * at.W + w) * layout.taps;
        for (int64_t c = 0; c < C; ++c)
          for (int i = 0; i < 3; ++i, to += 3)  // four at once, of which the next three overwrite the last
            __builtin_memcpy(to, image + c * plane + (h + i) * width + w, 4 * sizeof(Operand));
        for (int64_t t = 9 * C; t < layout.used_taps; ++t) *to++ = Operand{};
      }
    for (int64_t i = positions * layout.taps; i < round_up(positions, A::kTiles) * layout.taps; ++i)
      columns[i] = Operand{};
  }

  __attribute__((noinline)) void scatter_taps(int64_t n) const {
    const LayerLayout& at = layout.layer[0];
    const int64_t C = step.layer[0].in, H = step.image_h, W = step.image_w;
    T* image = static_cast<T*>(step.images_grad) + (e * step.N + n) * C * H * W;
    fill(image, C * H * W);
    for (int64_t h = 0; h < at.H; ++h)  // outermost: a row's taps stay in the first-level cache
      for (int64_t c = 0; c < C; ++c)
        for (int i = 0; i < 3; ++i) {
          const int64_t y = h + i - at.padding;
          if (y < 0 || y >= H) continue;
          for (int j = 0; j < 3; ++j) {
            const int64_t from = larger(0, at.padding - j), to = smaller(at.W, W + at.padding - j);
            T* row = image + (c * H + y) * W + j - at.padding;
            const T* taps = work.taps_grad + h * at.W * layout.taps + c * 9 + i * 3 + j;
            for (int64_t w = from; w < to; ++w) row[w] += taps[w * layout.taps];
          }
        }
    for (int64_t i = 0; i < C * H * W; ++i) image[i] *= scale;
  }

  // The first convolution's output for the panels [group, group + panels), one after the other in `to`.
  void first_product(void* set, int64_t group, int64_t panels, V* to) {
    const LayerLayout& at = layout.layer[0];
    if (set == filters ? layout.tiled_primal : layout.tiled_first) {
      for (int64_t v = 0; v < panels; ++v)
        tiled_product(value(set, at.tiled_filter) + (group + v) * Winograd::kPoints * step.layer[0].in * L,
                      to + v * layout.first_stride());
      return;
    }
    const int64_t positions = at.H * at.W, offset = group * L * layout.taps;
    const Operand *const whole = filter(set, at.filter) + offset, *const rest = filter(set, at.filter_rest) + offset;
    const Factors<Operand> factors[] = {{columns, whole}, {work.columns_rest, whole}, {columns, rest}};
    A::product(positions, layout.used_taps, panels, factors, split && set == filters ? 3 : 1, layout.taps,
               {reinterpret_cast<T*>(to), L, round_up(positions, A::kTiles) * L, false});
  }

  // Panels side by side as rows [positions][panels * L].
  __attribute__((noinline)) void join_panels(const V* from, int64_t panels, Operand* to) const {
    const int64_t positions = layout.layer[0].H * layout.layer[0].W, all = round_up(positions, A::kTiles);
    for (int64_t i = 0; i < all; ++i)
      for (int64_t v = 0; v < panels; ++v) A::put(to + (i * panels + v) * L, i < positions ? from[v * all + i] : V{});
  }

  // Where image g's panels from `group` on are in `all`.
  V* first_panels(V* all, int64_t g, int64_t group) const {
    return layout.keeps_first ? all + (g * layout.layer[0].out_groups + group) * layout.first_stride() : all;
  }

  template <class Visit>
  void for_bunches(Visit visit) {
    constexpr int64_t bunch = Layout<T, A>::kBunch;
    const int64_t groups = layout.layer[0].out_groups;
    for (int64_t group = 0; group < groups; group += bunch) visit(group, smaller(bunch, groups - group));
  }
};

}  // namespace
}  // namespace pydistill
