// Means and variances of a norm run in stages: of groups of channels or of a batch. Part of convnet_step.inl.
#pragma once

#include "convnet_slot.h"

namespace pydistill {
namespace {

template <class T, class A>
class VariantStatistics : protected Slot<T, A> {
 protected:
  using V = Vec<T>;
  using W = Wide<T>;
  using Operand = typename A::Operand;
  using Norm = Step::Norm;
  static constexpr int L = Lanes<T>::count;
  using Base = Slot<T, A>;
  using Base::at, Base::begin, Base::count, Base::e, Base::filters, Base::filters_t, Base::first, Base::layout,
      Base::panel, Base::step, Base::tape, Base::value, Base::work;

  int64_t slot;

  VariantStatistics(const Step& step, int64_t e, int64_t slot, void* scratch)
      : Base(step, e, slot, scratch), slot(slot) {}

  T* exchange(int64_t s) const {
    return static_cast<T*>(step.exchange) + (e * step.slots + s) * (layout.exchange / sizeof(T));
  }
  // A convolution's output: the first layer's is kept only while its chunk is in progress.
  V* convolved(V* first_planes, T* in, int64_t l, int64_t g, int64_t group) const {
    const LayerLayout& of = layout.layer[l];
    return l == 0 ? Base::first_panels(first_planes, g, group) : panel(in, g, of.conv, group, of.H * of.W);
  }
  T* statistics(T* in, int64_t l, int64_t g) const { return at(in, g, layout.layer[l].statistics); }
  T* lanes(int64_t g) const { return work.lanes + g * 4 * layout.widest; }
  static W wide_at(const T* from) { return wide_of<T>(load(from)); }
  static void put(T* to, W v) { store(to, vector_of(v)); }

  // How many values share a mean, in this image and in total.
  T shared(const LayerLayout& of) const { return T(of.H * of.W); }

  // Visits the channels that share a mean as visit(first, last) in an image.
  template <class Visit>
  void for_groups(int64_t l, Visit visit) const {
    const int64_t channels = step.layer[l].out;
    int64_t size = 1;
    if (step.norm == Norm::group) size = channels / step.groups;
    if (step.norm == Norm::layer) size = channels;
    for (int64_t c = 0; c < channels; c += size) visit(c, c + size);
  }

  // ---- statistics

  // A panel's shift by the convolution's bias, its lanes' means and sums of squared deviations.
  __attribute__((noinline)) void panel_means(const LayerLayout& of, int64_t group, W* x, T* mean, T* squares) const {
    const W shift = wide_at(value(filters, of.bias) + group * L);
    const bool shifted = !step.subtracts_bias();
    const T n = shared(of);
    W sum[1], moment[2];
    sum_positions(of.H, of.W, sum, [&](int64_t i, W(&to)[1]) PYDISTILL_LAMBDA {
      if (shifted) x[i] += shift;
      to[0] += x[i];
    });
    const W about = sum[0] / n;
    sum_positions(of.H, of.W, moment, [&](int64_t i, W(&to)[2]) PYDISTILL_LAMBDA {
      const W d = x[i] - about;
      to[0] += d;
      to[1] += d * d;
    });
    put(mean + group * L, about + moment[0] / n);
    put(squares + group * L, moment[1] - moment[0] * moment[0] / n);
  }

  void convolve(int64_t l, bool with_statistics) {
    const LayerLayout& of = layout.layer[l];
    if (l == 0) {
      first_planes(false);
    } else {
      Base::convolve_tiles(l);
      for (int64_t g = 0; g < count; ++g)
        for (int64_t group = 0; group < of.out_groups; ++group)
          Base::transform_output(of, g, group, panel(tape, g, of.conv, group, of.H * of.W));
    }
    if (!with_statistics && step.subtracts_bias()) return;
    for (int64_t g = 0; g < count; ++g) {
      T *const mean = lanes(g), *const squares = mean + layout.widest;
      for (int64_t group = 0; group < of.out_groups; ++group)
        panel_means(of, group, wide<T>(convolved(work.first, tape, l, g, group)), mean, squares);
      if (!with_statistics) continue;
      if (step.over_batch())
        merge_means(of, mean, squares, shared(of) * T(first + g - begin), shared(of));
      else
        image_statistics(l, mean, squares, statistics(tape, l, g));
    }
  }

  void first_planes(bool tangents) {
    for (int64_t g = 0; g < count; ++g) {
      Base::use_input(g, true);
      Base::for_bunches([&](int64_t group, int64_t panels) {
        Base::first_product(filters, group, panels, Base::first_panels(work.first, g, group));
        if (tangents) Base::first_product(filters_t, group, panels, Base::first_panels(work.first_t, g, group));
      });
    }
  }

  // Merges an image's means and squares into the slot's, which are those of `before` values.
  void merge_means(const LayerLayout& of, const T* mean, const T* squares, T before, T added) const {
    T *const to = exchange(slot) + of.means, *const to_squares = to + of.out;
    for (int64_t c = 0; c < of.out; c += L) merge_means(to + c, to_squares + c, before, mean + c, squares + c, added);
  }
  static void merge_means(T* mean, T* squares, T before, const T* other, const T* other_squares, T added) {
    const V apart = load(other) - load(mean);
    store(mean, load(mean) + apart * (added / (before + added)));
    store(squares, load(squares) + load(other_squares) + apart * apart * (before / (before + added) * added));
  }

  // Of one image: the values that share a mean are in its channels.
  void image_statistics(int64_t l, const T* mean, const T* squares, T* to) const {
    const LayerLayout& of = layout.layer[l];
    T* const r = to + of.out;
    for (int64_t c = 0; c < of.out; ++c) to[c] = 0, r[c] = step.norm == Norm::none ? T(1) : T(0);
    if (step.norm == Norm::none) return;
    if (step.norm == Norm::running) {
      const T* const kept = static_cast<const T*>(step.running) + e * step.running_student + step.layer[l].statistics;
      for (int64_t c = 0; c < step.layer[l].out; ++c) {
        to[c] = kept[c];
        r[c] = T(1) / sqrt_lane(kept[step.channels + c] + T(step.eps));
      }
      return;
    }
    for_groups(l, [&](int64_t from, int64_t until) {
      T total = 0, spread = 0;
      for (int64_t c = from; c < until; ++c) total += mean[c];
      const T middle = total / T(until - from);
      for (int64_t c = from; c < until; ++c)
        spread += squares[c] + shared(of) * (mean[c] - middle) * (mean[c] - middle);
      const T root = T(1) / sqrt_lane(spread / (shared(of) * T(until - from)) + T(step.eps));
      for (int64_t c = from; c < until; ++c) to[c] = middle, r[c] = root;
    });
  }

  int64_t images_of(int64_t s) const { return step.N * (s + 1) / step.slots - step.N * s / step.slots; }
  T in_batch(const LayerLayout& of) const { return shared(of) * T(step.N); }

  // The batch's mean and sum of squared deviations, from the slots' in order.
  void batch_means(const LayerLayout& of, T* mean) const {
    Base::fill(mean, 2 * of.out);
    T before = 0;
    for (int64_t s = 0; s < step.slots; ++s) {
      const T added = shared(of) * T(images_of(s));
      if (added == 0) continue;
      const T* const other = exchange(s) + of.means;
      for (int64_t c = 0; c < of.out; c += L)
        merge_means(mean + c, mean + of.out + c, before, other + c, other + of.out + c, added);
      before += added;
    }
  }

  void batch_statistics(const LayerLayout& of) {
    T *const mean = work.combined, *const r = mean + of.out;
    batch_means(of, mean);
    for (int64_t c = 0; c < of.out; ++c) r[c] = T(1) / sqrt_lane(r[c] / in_batch(of) + T(step.eps));
  }

  void tell_statistics(int64_t l) {
    if (step.statistics == nullptr) return;
    const LayerLayout& of = layout.layer[l];
    const Step::Layer& from = step.layer[l];
    batch_means(of, work.combined);
    T* const to = static_cast<T*>(step.statistics) + e * 2 * step.channels + from.statistics;
    const T* const bias = from.bias < 0 ? nullptr : static_cast<const T*>(step.theta) + e * step.P + from.bias;
    for (int64_t c = 0; c < from.out; ++c) {
      to[c] = work.combined[c] + (bias != nullptr ? bias[c] : T(0));
      to[step.channels + c] = work.combined[of.out + c] / in_batch(of);
    }
  }
};

}  // namespace
}  // namespace pydistill
