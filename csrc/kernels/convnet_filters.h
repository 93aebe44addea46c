// Packs theta (and the direction) into the factors that the products read. Part of convnet_step.inl.
#pragma once

#include "convnet_layout.h"

namespace pydistill {
namespace {

template <class T, class A>
class Filters {
  using V = Vec<T>;
  using Operand = typename A::Operand;
  static constexpr int L = Lanes<T>::count, kParts = Wide<T>::parts, kLanes = Registers<T>::lanes;

 public:
  explicit Filters(const Step& step) : step(step), layout(step) {
    per_set = 2;  // the first layer and the classifier
    for (int64_t l = 1; l < layout.depth; ++l) per_set += (layout.layer[l].in + layout.layer[l].out + 1) / 2;
  }

  int64_t units() const { return step.E * (step.form == Step::Form::tangent ? 2 : 1) * per_set; }

  void run(int64_t unit) const {
    const int64_t sets = step.form == Step::Form::tangent ? 2 : 1;
    const int64_t e = unit / per_set / sets;
    const bool of_direction = unit / per_set % sets;
    const T* theta = static_cast<const T*>(of_direction ? step.direction : step.theta) + e * step.P;
    void* set = layout.set(step, e, of_direction);
    int64_t part = unit % per_set;
    if (part == 0) return first(theta, set, of_direction);
    if (part == per_set - 1) return classifier(theta, set);  // at the other end, for another thread
    --part;
    for (int64_t l = 1; l < layout.depth; ++l) {
      const int64_t parts = (layout.layer[l].in + layout.layer[l].out + 1) / 2;
      if (part < parts) return winograd(l, 2 * part, theta + step.layer[l].theta, set, of_direction);
      part -= parts;
    }
  }

 private:
  const Step& step;
  const Layout<T, A> layout;
  int64_t per_set;

  // What rounding removes from v.
  static V remainder(V v) {
    for (int i = 0; i < L; ++i) v[i] -= widen(A::narrow_one(v[i]));
    return v;
  }

  // Rows d and d + 1 of both packed forms of layer l: the first `in` rows are input channels (vectors over output
  // channels), the next `out` rows output channels (vectors over input channels).
  void winograd(int64_t l, int64_t d, const T* weight, void* set, bool of_direction) const {
    const LayerLayout& at = layout.layer[l];
    const bool over_out = d < at.in;
    const int64_t in = step.layer[l].in, out = step.layer[l].out;
    const int64_t depth = over_out ? at.in : at.out, width = over_out ? at.out : at.in;
    const int64_t row = over_out ? d : d - at.in;
    Operand* to = static_cast<Operand*>(set) + (over_out ? at.filter : at.filter_t);
    [[maybe_unused]] Operand* rest = static_cast<Operand*>(set) + at.filter_rest;
    using P = typename A::Primal;
    typename P::Operand* const primal =
        over_out && !of_direction && layout.primal_apart
            ? reinterpret_cast<typename P::Operand*>(static_cast<Operand*>(set) + at.filter_primal)
            : nullptr;
    const bool rounded = primal == nullptr || step.form == Step::Form::tangent;
    for (int64_t group = 0; group < width / L; ++group) {
      Wide<T> u[2][36];
      for (int half = 0; half < 2; ++half)
        for (int part = 0; part < kParts; ++part) {
          Register<T> w[3][3] = {}, transformed[6][6];
          const int64_t fixed = row + half;
          for (int i = 0; i < kLanes; ++i) {
            const int64_t moving = group * L + part * kLanes + i;
            const int64_t c = over_out ? fixed : moving, k = over_out ? moving : fixed;
            if (c < in && k < out)
              for (int t = 0; t < 9; ++t) w[t / 3][t % 3][i] = weight[(k * in + c) * 9 + t];
          }
          both_ways<T, 3, 6>(Winograd::filter<T>, w, transformed);
#pragma GCC unroll 36
          for (int p = 0; p < 36; ++p) u[half][p].part[part] = transformed[p / 6][p % 6];
        }
      for (int p = 0; p < 36; ++p) {
        const V even = vector_of(u[0][p]), odd = vector_of(u[1][p]);
        if (primal != nullptr) P::pack(primal + p * depth * width, row, group, depth, width / L, even, odd);
        if (rounded) A::pack(to + p * depth * width, row, group, depth, width / L, even, odd);
        if constexpr (A::kSplit)
          if (over_out)
            A::pack(rest + p * depth * width, row, group, depth, width / L, remainder(even), remainder(odd));
      }
    }
  }

  // The first layer's filters for tiles, unrounded: [panels][points][in][L]. `value` is that at a tap and a channel.
  template <class Value>
  void tiled(Value value, T* to) const {
    const int64_t C = step.layer[0].in;
    for (int64_t group = 0; group < layout.layer[0].out_groups; ++group)
      for (int64_t c = 0; c < C; ++c)
        for (int part = 0; part < kParts; ++part) {
          Register<T> w[3][3], u[6][6];
          for (int t = 0; t < 9; ++t)
            for (int i = 0; i < kLanes; ++i) w[t / 3][t % 3][i] = value(c * 9 + t, group * L + part * kLanes + i);
          both_ways<T, 3, 6>(Winograd::filter<T>, w, u);
#pragma GCC unroll 36
          for (int p = 0; p < 36; ++p)
            *reinterpret_cast<typename Registers<T>::Unaligned*>(to + ((group * Winograd::kPoints + p) * C + c) * L +
                                                                 part * kLanes) = u[p / 6][p % 6];
        }
  }

  // The first layer's filters by bunches of panels ([taps][panels] and its transpose), and all norms' parameters.
  void first(const T* theta, void* set, bool of_direction) const {
    const LayerLayout& at = layout.layer[0];
    const int64_t taps = 9 * step.layer[0].in, out = step.layer[0].out;
    const T* weight = theta + step.layer[0].theta;
    const auto value = [&](int64_t t, int64_t k) { return t < taps && k < out ? weight[k * taps + t] : T(0); };
    constexpr int64_t bunch = Layout<T, A>::kBunch;
    for (int64_t group = 0; group < at.out_groups; group += bunch) {
      const int64_t panels = smaller(bunch, at.out_groups - group);
      Operand* to = static_cast<Operand*>(set) + at.filter + group * L * layout.taps;
      for (int64_t t = 0; t < layout.used_taps; t += 2)
        for (int64_t v = 0; v < panels; ++v) {
          V rows[2] = {};
          for (int half = 0; half < 2; ++half)
            for (int i = 0; i < L; ++i) rows[half][i] = value(t + half, (group + v) * L + i);
          A::pack(to, t, v, layout.used_taps, panels, rows[0], rows[1]);
          if constexpr (A::kSplit)
            A::pack(to - at.filter + at.filter_rest, t, v, layout.used_taps, panels, remainder(rows[0]),
                    remainder(rows[1]));
        }
      to = static_cast<Operand*>(set) + at.filter_t + group * L * layout.taps;
      for (int64_t k = 0; k < panels * L; k += 2)
        for (int64_t v = 0; v < layout.taps / L; ++v) {
          V rows[2] = {};
          for (int half = 0; half < 2; ++half)
            for (int i = 0; i < L; ++i) rows[half][i] = value(v * L + i, group * L + k + half);
          A::pack(to, k, v, panels * L, layout.taps / L, rows[0], rows[1]);
        }
    }
    if (of_direction ? layout.tiled_first : layout.tiled_primal) tiled(value, layout.values(set) + at.tiled_filter);
    for (int64_t l = 0; l < layout.depth; ++l) {
      const Step::Layer& from = step.layer[l];
      const LayerLayout& to = layout.layer[l];
      T* norm = layout.values(set) + to.norm;
      const int64_t each = to.norm_size / to.out;  // positions with their own parameters
      for (int64_t which = 0; which < 2; ++which)
        for (int64_t group = 0; group < to.out_groups; ++group)
          for (int64_t position = 0; position < each; ++position)
            for (int64_t c = group * L; c < (group + 1) * L; ++c, ++norm)
              if (from.affine < 0)
                *norm = which == 0 && !of_direction ? T(1) : T(0);
              else
                *norm = c < from.out ? theta[from.affine + (which * from.out + c) * each + position] : T(0);
      if (!step.fused())
        for (int64_t c = 0; c < to.out; ++c)
          layout.values(set)[to.bias + c] =
              c < from.out && from.bias >= 0 && !step.subtracts_bias() ? theta[from.bias + c] : T(0);
    }
  }

  // theta's features run over (channel, position), a tape's over (panel, position, lane)
  void classifier(const T* theta, void* set) const {
    const LayerLayout& at = layout.layer[layout.depth - 1];
    const int64_t plane = at.OH * at.OW, out = step.layer[layout.depth - 1].out;
    const T* weight = theta + step.head;
    T* const values = layout.values(set);
    const int64_t vectors = layout.features / L;
    for (int64_t v = 0; v < vectors; ++v) {
      const int64_t c = v / plane * L, position = v % plane;
      for (int64_t k = 0; k < layout.classes; ++k) {
        V row{};  // of class k: adjacent channels at this position
        for (int i = 0; i < L; ++i)
          if (c + i < out && k < step.classes) row[i] = weight[k * out * plane + (c + i) * plane + position];
        if (k < step.classes) store(values + layout.head_t + packed_offset<T>(k, v, step.classes, vectors), row);
        const auto column = [&](int64_t f) {
          return packed_offset<T>(f, k / L, layout.features, layout.classes / L) + k % L;
        };
        T* const to = values + layout.head + column(v * L);
        const int64_t next = column(1) - column(0);
        for (int i = 0; i < L; ++i) to[i * next] = row[i];
      }
    }
    for (int64_t k = 0; k < layout.classes; ++k)
      values[layout.head_bias + k] = k < step.classes ? weight[step.classes * out * plane + k] : T(0);
  }
};

}  // namespace
}  // namespace pydistill
