// Adds up the slots' sums, in order, in theta's layout. Part of convnet_step.inl.
#pragma once

#include "convnet_layout.h"

namespace pydistill {
namespace {

template <class T, class A>
class Reduction {
  using V = Vec<T>;
  static constexpr int L = Lanes<T>::count, kParts = Wide<T>::parts, kLanes = Registers<T>::lanes;

 public:
  explicit Reduction(const Step& step) : step(step), layout(step) {
    per_student = 2;
    for (int64_t l = 1; l < layout.depth; ++l) per_student += step.layer[l].in;
  }

  int64_t units() const { return step.E * per_student; }

  void run(int64_t unit) const {
    const int64_t e = unit / per_student;
    int64_t part = unit % per_student;
    T* grad = static_cast<T*>(step.grad) + e * step.P;
    if (part == 0) return first(e, grad);
    if (part == per_student - 1) return classifier(e, grad);  // at the other end, for another thread
    --part;
    for (int64_t l = 1; l < layout.depth; ++l) {
      if (part < step.layer[l].in) return winograd(e, l, part, grad + step.layer[l].theta);
      part -= step.layer[l].in;
    }
  }

 private:
  const Step& step;
  const Layout<T, A> layout;
  int64_t per_student;

  const T* slot(int64_t e, int64_t s) const {
    return reinterpret_cast<const T*>(static_cast<const char*>(step.partials) + (e * step.slots + s) * layout.partials);
  }
  V total(int64_t e, int64_t offset) const {
    V sum = load(slot(e, 0) + offset);
    for (int64_t s = 1; s < step.slots; ++s) sum += load(slot(e, s) + offset);
    return step.scale != nullptr ? sum * static_cast<const T*>(step.scale)[e] : sum;
  }

  void winograd(int64_t e, int64_t l, int64_t c, T* grad) const {
    const LayerLayout& at = layout.layer[l];
    const int64_t in = step.layer[l].in, out = step.layer[l].out;
    for (int64_t group = 0; group < at.out_groups; ++group) {
      Wide<T> sums[36];
      for (int p = 0; p < 36; ++p) sums[p] = wide_of<T>(total(e, at.sum + (p * at.in + c) * at.out + group * L));
      for (int part = 0; part < kParts; ++part) {
        Register<T> u[6][6], w[3][3];
        for (int p = 0; p < 36; ++p) u[p / 6][p % 6] = sums[p].part[part];
        both_ways<T, 6, 3>(Winograd::filter_adjoint<T>, u, w);
        const int64_t k = group * L + part * kLanes;
        for (int i = 0; i < kLanes && k + i < out; ++i)
          for (int t = 0; t < 9; ++t) grad[((k + i) * in + c) * 9 + t] = w[t / 3][t % 3][i];
      }
    }
  }

  void first(int64_t e, T* grad) const {
    const LayerLayout& at = layout.layer[0];
    const int64_t taps = 9 * step.layer[0].in, out = step.layer[0].out;
    for (int64_t t = 0; t < taps; ++t)
      for (int64_t group = 0; group < at.out_groups; ++group) {
        const V sum = total(e, at.sum + t * at.out + group * L);
        for (int i = 0; i < L && group * L + i < out; ++i)
          grad[step.layer[0].theta + (group * L + i) * taps + t] = sum[i];
      }
    for (int64_t l = 0; l < layout.depth; ++l) {
      const Step::Layer& to = step.layer[l];
      const LayerLayout& from = layout.layer[l];
      if (to.bias >= 0)
        for (int64_t group = 0; group < from.out_groups; ++group) {
          const V sum = step.subtracts_bias() ? V{} : total(e, from.sum_bias + group * L);
          for (int i = 0; i < L && group * L + i < to.out; ++i) grad[to.bias + group * L + i] = sum[i];
        }
      if (to.affine < 0) continue;
      const int64_t each = from.norm_size / from.out;
      for (int64_t which = 0; which < 2; ++which)
        for (int64_t group = 0; group < from.out_groups; ++group)
          for (int64_t position = 0; position < each; ++position) {
            const V sum = total(e, from.sum_norm + which * from.norm_size + (group * each + position) * L);
            for (int i = 0; i < L && group * L + i < to.out; ++i)
              grad[to.affine + (which * to.out + group * L + i) * each + position] = sum[i];
          }
    }
  }

  void classifier(int64_t e, T* grad) const {
    const LayerLayout& at = layout.layer[layout.depth - 1];
    const int64_t plane = at.OH * at.OW, out = step.layer[layout.depth - 1].out;
    T* const weight = grad + step.head;
    for (int64_t k = 0; k < step.classes; ++k)
      for (int64_t f = 0; f < layout.features; f += L) {
        const V sum = total(e, layout.sum_head + k * layout.features + f);
        const int64_t c = f / L / plane * L, position = f / L % plane;
        for (int i = 0; i < L && c + i < out; ++i) weight[k * out * plane + (c + i) * plane + position] = sum[i];
      }
    for (int64_t v = 0; v < layout.classes / L; ++v) {
      const V sum = total(e, layout.sum_head_bias + v * L);
      for (int i = 0; i < L && v * L + i < step.classes; ++i) weight[step.classes * out * plane + v * L + i] = sum[i];
    }
  }
};

}  // namespace
}  // namespace pydistill
