// The passes over a slot's images if a block is run in stages: see convnet_step.h. Included by convnet_step.inl.
#pragma once

#include "convnet_program.h"
#include "convnet_statistics.h"

namespace pydistill {
namespace {

template <class T, class A>
class VariantSlot : VariantStatistics<T, A> {
  using V = Vec<T>;
  using W = Wide<T>;
  using Operand = typename A::Operand;
  using Norm = Step::Norm;
  static constexpr int L = Lanes<T>::count;
  using Base = VariantStatistics<T, A>;
  using Base::batch_statistics, Base::begin, Base::convolve, Base::convolved, Base::count, Base::e, Base::end,
      Base::exchange, Base::filter, Base::filters, Base::filters_t, Base::first, Base::first_planes, Base::for_groups,
      Base::fresh, Base::images_of, Base::in_batch, Base::lanes, Base::layout, Base::panel, Base::panel_means,
      Base::put, Base::shared, Base::slot, Base::statistics, Base::step, Base::sums, Base::tape, Base::tape_t,
      Base::tell_statistics, Base::value, Base::wide_at, Base::work;

 public:
  VariantSlot(const Step& step, int64_t e, int64_t slot, void* scratch) : Base(step, e, slot, scratch) {}

  void run(int64_t pass) {
    const Program program(step);
    if (sums != nullptr && pass == 0) {
      for (int64_t l = 0; l < layout.depth; ++l)
        Base::fill(sums + layout.layer[l].sum_norm, 2 * layout.layer[l].norm_size + layout.layer[l].out);
      if (begin == end) Base::fill(sums, layout.partials / sizeof(T));
    }
    if (step.over_batch() && pass == 0) Base::fill(exchange(slot), layout.exchange / sizeof(T));
    int from = 0;
    for (int64_t skipped = 0; skipped < pass; ++from) skipped += program.parts[from].what == Program::Do::wait;
    int64_t last = 0;  // the pass's last layer: the first's buffers hold step.chunk images
    for (int i = from; i < program.count && program.parts[i].what != Program::Do::wait; ++i)
      last = larger(last, program.parts[i].layer);
    for (first = begin; first < end; first += count) {
      count = smaller(layout.layer[last].chunk, end - first);
      fresh = first == begin;
      if (step.over_batch()) {
        T* const kept = static_cast<T*>(step.tape_use != Step::Tape::none ? step.tape : step.batch_tape);
        tape = kept + (e * step.N + first) * (layout.tape / sizeof(T));
        tape_t = static_cast<T*>(step.batch_tape_t) + (e * step.N + first) * (layout.tape / sizeof(T));
      } else if (step.tape_use != Step::Tape::none) {
        tape = reinterpret_cast<T*>(Base::kept_tape(0));
      } else {
        tape = work.tape;
      }
      for (int i = from; i < program.count && program.parts[i].what != Program::Do::wait; ++i)
        run(program.parts[i].what, program.parts[i].layer);
    }
    // The first slot reports statistics even if it has no images.
    if (step.over_batch() && pass > 0 && pass <= layout.depth && slot == 0) tell_statistics(pass - 1);
  }

 private:
  bool backwards_to_images() const { return step.form == Step::Form::features_backward; }

  void run(Program::Do what, int64_t l) {
    using Do = Program::Do;
    switch (what) {
      case Do::convolve:
        return convolve(l, true);
      case Do::again:
        return convolve(l, false);
      case Do::block:
        return block(l);
      case Do::head:
        return Base::head_forward();
      case Do::head_back:
        return backwards_to_images() ? Base::embedding_backward()
                                     : Base::head_gradient(step.form == Step::Form::gradient);
      case Do::sums:
        return sum<false>(l);
      case Do::back:
        return l > 0 ? back(l) : first_back();
      case Do::convolve_t:
        return convolve_t(l, true);
      case Do::again_t:
        return convolve_t(l, false);
      case Do::block_t:
        return block_t(l);
      case Do::head_t:
        return Base::head_tangent();
      case Do::head_back_t:
        return Base::head_tangent_backward();
      case Do::sums_t:
        return sum<true>(l);
      case Do::back_t:
        return l > 0 ? back_t(l) : first_back_t();
      case Do::wait:
        return;
    }
  }

  // ---- a block on one panel

  BlockPanel<T> describe(int64_t l, int64_t g, int64_t group, const V* x, const V* x_t) const {
    const LayerLayout& of = layout.layer[l];
    const T* const kept = statistics(tape, l, g) + group * L;
    BlockPanel<T> p{};
    p.activation = step.activation, p.pool = step.pool, p.slope = T(step.slope);
    p.H = of.H, p.W = of.W;
    p.x = wide<T>(const_cast<V*>(x));
    p.mean = wide_at(kept), p.r = wide_at(kept + of.out);
    p.each = of.norm_size == of.out ? 0 : 1;
    const int64_t from = of.norm + group * (p.each ? of.H * of.W : 1) * L;
    const auto affine = [&](void* set, int64_t offset) { return reinterpret_cast<const W*>(value(set, offset)); };
    p.g = affine(filters, from), p.b = affine(filters, from + of.norm_size);
    const int64_t plane = of.OH * of.OW;
    p.grad_y = wide<T>(panel(tape, g, of.grad_pooled, group, plane));
    if (x_t != nullptr) {
      const T* const moving = statistics(tape_t, l, g) + group * L;
      p.x_t = wide<T>(const_cast<V*>(x_t));
      p.mean_t = wide_at(moving), p.tilt = wide_at(moving + of.out);
      p.g_t = affine(filters_t, from), p.b_t = affine(filters_t, from + of.norm_size);
      p.grad_y_t = wide<T>(panel(tape_t, g, of.grad_pooled, group, plane));
    }
    return p;
  }

  void block(int64_t l) {
    const LayerLayout& of = layout.layer[l];
    if (step.over_batch()) {
      if (fresh) batch_statistics(of);
      for (int64_t g = 0; g < count; ++g)
        for (int64_t i = 0; i < 2 * of.out; ++i) statistics(tape, l, g)[i] = work.combined[i];
    }
    const bool attended = step.form == Step::Form::features && Base::attends(l);
    const Step::Features& to = step.features;
    for (int64_t g = 0; g < count; ++g)
      for (int64_t group = 0; group < of.out_groups; ++group) {
        BlockPanel<T> p = describe(l, g, group, convolved(work.first, tape, l, g, group), nullptr);
        W* const y = wide<T>(panel(tape, g, of.pooled, group, of.OH * of.OW));
        if (!attended) {
          block_forward<T, false>(p, y);
          continue;
        }
        BlockAttention<T> attention;
        attention.power = T(to.power);
        attention.spatial = to.spatial != nullptr ? wide<T>(work.attention) : nullptr;
        V mask{};
        for (int i = 0; i < L && group * L + i < step.layer[l].out; ++i) mask[i] = 1;
        attention.mask = wide_of<T>(mask);
        if (group == 0) Base::fill(work.attention, of.H * of.W);
        p.attention = &attention;
        block_forward<T, false>(p, y);
        if (to.channel != nullptr) {
          T* const out = static_cast<T*>(to.channel) + Base::channel_offset(l, g) + group * L;
          const V channel = vector_of(attention.channel);
          for (int i = 0; i < L && group * L + i < step.layer[l].out; ++i) out[i] = channel[i];
        }
        if (to.spatial != nullptr && group == of.out_groups - 1) {
          T* const out = static_cast<T*>(to.spatial) + Base::spatial_offset(l, g);
          for (int64_t i = 0; i < of.H * of.W; ++i) out[i] = lane_sum(reinterpret_cast<const T*>(work.attention + i));
        }
      }
  }

  // ---- backwards

  // The sums that a norm's gradient needs, and the gradients of its parameters.
  template <bool TANGENT>
  void sum(int64_t l) {
    const LayerLayout& of = layout.layer[l];
    const bool weights = sums != nullptr && (TANGENT || step.form == Step::Form::gradient) && step.layer[l].affine >= 0;
    const bool means = step.norm != Norm::none && step.norm != Norm::running;
    if (!weights && !means) return;
    for (int64_t g = 0; g < count; ++g) {
      for (int64_t group = 0; group < of.out_groups; ++group) {
        BlockAttention<T> attention;
        BlockPanel<T> p = describe(l, g, group, convolved(work.first, tape, l, g, group),
                                   TANGENT ? convolved(work.first_t, tape_t, l, g, group) : nullptr);
        p.attention = attend(l, g, group, attention);
        W *each_g = nullptr, *each_b = nullptr;
        if (weights && p.each) {
          each_g = reinterpret_cast<W*>(sums + of.sum_norm + group * of.H * of.W * L);
          each_b = reinterpret_cast<W*>(sums + of.sum_norm + of.norm_size + group * of.H * of.W * L);
        }
        const BlockSums<T> found = block_sums<T, TANGENT>(p, each_g, each_b);
        if (weights && !p.each) {
          AffineGradient<T> grad;
          grad.g = vector_of(found.g), grad.b = vector_of(found.b);
          Base::add_norm(of, group, grad);
        }
        const W all[4] = {found.c, found.c_h, found.c_t, found.c_t_h};
        for (int k = 0; k < 4; ++k) put(lanes(g) + k * layout.widest + group * L, all[k]);
      }
      if (!means) continue;
      if (step.over_batch()) {
        T* const to = exchange(slot) + of.sums;
        if (fresh && g == 0) Base::fill(to, 4 * of.out);
        for (int k = 0; k < 4; ++k)
          for (int64_t c = 0; c < of.out; ++c) to[k * of.out + c] += lanes(g)[k * layout.widest + c];
      } else {
        for (int k = 0; k < (TANGENT ? 4 : 2); ++k)
          for_groups(l, [&](int64_t from, int64_t until) {
            T* const lane = lanes(g) + k * layout.widest;
            T total = 0;
            for (int64_t c = from; c < until; ++c) total += lane[c];
            for (int64_t c = from; c < until; ++c) lane[c] = total / (shared(of) * T(until - from));
          });
      }
    }
  }

  BlockAttention<T>* attend(int64_t l, int64_t g, int64_t group, BlockAttention<T>& attention) const {
    if (!backwards_to_images() || !Base::attends(l)) return nullptr;
    const Step::Features& from = step.features;
    attention.power = T(from.power);
    if (from.spatial_grad != nullptr)
      attention.grad_spatial = static_cast<const T*>(from.spatial_grad) + Base::spatial_offset(l, g);
    if (from.channel_grad != nullptr) {
      const T* const grad = static_cast<const T*>(from.channel_grad) + Base::channel_offset(l, g) + group * L;
      V lanes{};
      for (int i = 0; i < L && group * L + i < step.layer[l].out; ++i) lanes[i] = grad[i];
      attention.grad_channel = wide_of<T>(lanes);
    }
    return &attention;
  }

  // Prepares the batch's means; an image's are in its lanes.
  void batch_sums(int64_t l) {
    if (!step.over_batch() || !fresh) return;
    const LayerLayout& of = layout.layer[l];
    T* const to = work.combined;
    Base::fill(to, 4 * of.out);
    for (int64_t s = 0; s < step.slots; ++s) {
      if (images_of(s) == 0) continue;
      const T* const from = exchange(s) + of.sums;
      for (int64_t i = 0; i < 4 * of.out; ++i) to[i] += from[i];
    }
    for (int64_t i = 0; i < 4 * of.out; ++i) to[i] /= in_batch(of);
  }
  BlockMeans<T> means(int64_t l, int64_t g, int64_t group) const {
    if (step.norm == Norm::none || step.norm == Norm::running) return {};
    const bool batch = step.over_batch();
    const int64_t apart = batch ? layout.layer[l].out : layout.widest;
    const T* const from = (batch ? work.combined : lanes(g)) + group * L;
    return {wide_at(from), wide_at(from + apart), wide_at(from + 2 * apart), wide_at(from + 3 * apart)};
  }

  void add_bias(const LayerLayout& of, int64_t group, W grad) {
    if (sums == nullptr || step.subtracts_bias()) return;
    T* const to = sums + of.sum_bias + group * L;
    put(to, wide_at(to) + grad);
  }

  // A panel's gradient of the convolution's output.
  W panel_back(int64_t l, int64_t g, int64_t group, V* grad) {
    BlockAttention<T> attention;
    BlockPanel<T> p = describe(l, g, group, convolved(work.first, tape, l, g, group), nullptr);
    p.attention = attend(l, g, group, attention);
    return block_backward<T, false>(p, means(l, g, group), wide<T>(grad), nullptr);
  }
  W panel_back_t(int64_t l, int64_t g, int64_t group, V* grad, V* grad_t) {
    const BlockPanel<T> p =
        describe(l, g, group, convolved(work.first, tape, l, g, group), convolved(work.first_t, tape_t, l, g, group));
    return block_backward<T, true>(p, means(l, g, group), wide<T>(grad), wide<T>(grad_t));
  }

  void back(int64_t l) {
    const LayerLayout& of = layout.layer[l];
    const bool weights = step.form == Step::Form::gradient;
    batch_sums(l);
    for (int64_t g = 0; g < count; ++g)
      for (int64_t group = 0; group < of.out_groups; ++group) {
        const W bias = panel_back(l, g, group, work.x);
        if (weights) add_bias(of, group, bias);
        Base::transform_grad(of, work.x, g, group, work.grad);
      }
    Base::clear_rest(of, work.grad, of.out_row);
    if (weights) {
      // those of the forward pass are still there, unless other chunks have come between
      if (step.over_batch() || layout.primal_apart) Base::transform_input(l, tape, work.input + of.input);
      Base::add_outer(of, {{work.input + of.input, work.grad}});
    }
    Base::multiply_grads(of, {{work.grad, filter(filters, of.filter_t)}});
    Base::transform_input_adjoint(l, tape);
  }

  void first_back() {
    const LayerLayout& top = layout.layer[0];
    const int64_t stride = layout.first_stride();
    const bool weights = step.form == Step::Form::gradient;
    batch_sums(0);
    for (int64_t g = 0; g < count; ++g) {
      Base::use_input(g, false);
      Base::for_bunches([&](int64_t group, int64_t panels) {
        V* const x = Base::first_panels(work.first, g, group);
        for (int64_t v = 0; v < panels; ++v) {
          const W bias = panel_back(0, g, group + v, x + v * stride);
          if (weights) add_bias(top, group + v, bias);
        }
        Base::join_panels(x, panels, work.rows);
        if (weights)
          Base::first_outer(group, panels, work.rows, g);
        else
          Base::first_adjoint(group, panels, work.rows, filters, group > 0);
      });
      if (!weights) Base::scatter_taps(first + g);
    }
  }

  // ---- along the direction

  // A panel's shift by the bias's derivative, its lanes' means c, sums of h (x_t - c), and sums of h.
  __attribute__((noinline)) void panel_means_t(const LayerLayout& of, int64_t group, const W* x, W* x_t, const T* kept,
                                               T* to) const {
    const W shift = wide_at(value(filters_t, of.bias) + group * L);
    const W mean = wide_at(kept + group * L), r = wide_at(kept + of.out + group * L);
    const bool shifted = !step.subtracts_bias();
    const T n = shared(of);
    W sum[1], moment[3];
    sum_positions(of.H, of.W, sum, [&](int64_t i, W(&total)[1]) PYDISTILL_LAMBDA {
      if (shifted) x_t[i] += shift;
      total[0] += x_t[i];
    });
    const W about = sum[0] / n;
    sum_positions(of.H, of.W, moment, [&](int64_t i, W(&total)[3]) PYDISTILL_LAMBDA {
      const W h = (x[i] - mean) * r, d = x_t[i] - about;
      total[0] += d;
      total[1] += h * d;
      total[2] += h;
    });
    const W rest = moment[0] / n;
    put(to + group * L, about + rest);
    put(to + layout.widest + group * L, moment[1] - rest * moment[2]);
    put(to + 2 * layout.widest + group * L, moment[2]);
  }

  void convolve_t(int64_t l, bool with_statistics) {
    const LayerLayout& of = layout.layer[l];
    if (l == 0) {
      first_planes(true);
      if (!step.subtracts_bias()) {
        T* const unused = lanes(0);
        for (int64_t g = 0; g < count; ++g)
          for (int64_t group = 0; group < of.out_groups; ++group)
            panel_means(of, group, wide<T>(Base::first_panels(work.first, g, group)), unused, unused + layout.widest);
      }
    } else {
      Operand *const input = work.input + of.input, *const input_t = work.input_t + of.input;
      if (!Base::has_inputs()) Base::transform_input(l, tape, input);
      Base::transform_input(l, tape_t, input_t);
      Base::multiply_inputs(of, {{input_t, filter(filters, of.filter)}, {input, filter(filters_t, of.filter)}});
      for (int64_t g = 0; g < count; ++g)
        for (int64_t group = 0; group < of.out_groups; ++group)
          Base::transform_output(of, g, group, panel(tape_t, g, of.conv, group, of.H * of.W));
    }
    if (!with_statistics && step.subtracts_bias()) return;
    for (int64_t g = 0; g < count; ++g) {
      for (int64_t group = 0; group < of.out_groups; ++group)
        panel_means_t(of, group, wide<T>(convolved(work.first, tape, l, g, group)),
                      wide<T>(convolved(work.first_t, tape_t, l, g, group)), statistics(tape, l, g), lanes(g));
      if (!with_statistics) continue;
      if (step.over_batch())
        merge_means_t(of, lanes(g), shared(of) * T(first + g - begin), shared(of));
      else
        image_statistics_t(l, lanes(g), statistics(tape_t, l, g));
    }
  }

  void merge_means_t(const LayerLayout& of, const T* image, T before, T added) const {
    T* const to = exchange(slot) + of.means_t;
    for (int64_t c = 0; c < of.out; c += L) merge_means_t(to + c, of.out, before, image + c, layout.widest, added);
  }
  static void merge_means_t(T* to, int64_t apart, T before, const T* other, int64_t other_apart, T added) {
    const V difference = load(other) - load(to), sum = load(to + 2 * apart), other_sum = load(other + 2 * other_apart);
    const V moved = difference * (added / (before + added));  // of the mean
    store(to, load(to) + moved);
    store(to + apart, load(to + apart) - moved * sum + load(other + other_apart) + (difference - moved) * other_sum);
    store(to + 2 * apart, sum + other_sum);
  }

  void image_statistics_t(int64_t l, const T* lane, T* to) const {
    const LayerLayout& of = layout.layer[l];
    T* const tilt = to + of.out;
    for (int64_t c = 0; c < of.out; ++c) to[c] = 0, tilt[c] = 0;
    if (step.norm == Norm::none || step.norm == Norm::running) return;
    for_groups(l, [&](int64_t from, int64_t until) {
      T total = 0, product = 0;
      for (int64_t c = from; c < until; ++c) total += lane[c];
      const T middle = total / T(until - from);
      for (int64_t c = from; c < until; ++c)
        product += lane[layout.widest + c] + (lane[c] - middle) * lane[2 * layout.widest + c];
      for (int64_t c = from; c < until; ++c) to[c] = middle, tilt[c] = product / (shared(of) * T(until - from));
    });
  }

  void block_t(int64_t l) {
    const LayerLayout& of = layout.layer[l];
    if (step.over_batch()) {
      T* const all = work.combined;
      if (fresh) {
        Base::fill(all, 3 * of.out);
        T before = 0;
        for (int64_t s = 0; s < step.slots; ++s) {
          const T added = shared(of) * T(images_of(s));
          if (added == 0) continue;
          for (int64_t c = 0; c < of.out; c += L)
            merge_means_t(all + c, of.out, before, exchange(s) + of.means_t + c, of.out, added);
          before += added;
        }
        for (int64_t c = 0; c < of.out; ++c) all[of.out + c] /= in_batch(of);
      }
      for (int64_t g = 0; g < count; ++g)
        for (int64_t i = 0; i < 2 * of.out; ++i) statistics(tape_t, l, g)[i] = all[i];
    }
    for (int64_t g = 0; g < count; ++g)
      for (int64_t group = 0; group < of.out_groups; ++group) {
        const BlockPanel<T> p = describe(l, g, group, convolved(work.first, tape, l, g, group),
                                         convolved(work.first_t, tape_t, l, g, group));
        block_forward<T, true>(p, wide<T>(panel(tape_t, g, of.pooled, group, of.OH * of.OW)));
      }
  }

  void back_t(int64_t l) {
    const LayerLayout& of = layout.layer[l];
    batch_sums(l);
    for (int64_t g = 0; g < count; ++g)
      for (int64_t group = 0; group < of.out_groups; ++group) {
        add_bias(of, group, panel_back_t(l, g, group, work.x_t, work.x));
        Base::transform_grad(of, work.x, g, group, work.grad_t);
        Base::transform_grad(of, work.x_t, g, group, work.grad);
      }
    Base::clear_rest(of, work.grad, of.out_row);
    Base::clear_rest(of, work.grad_t, of.out_row);
    if (sums != nullptr) {
      if (step.over_batch()) {
        Base::transform_input(l, tape, work.input + of.input);
        Base::transform_input(l, tape_t, work.input_t + of.input);
      }
      Base::add_outer(of, {{work.input + of.input, work.grad_t}, {work.input_t + of.input, work.grad}});
    }
    Base::multiply_grads(of,
                         {{work.grad_t, filter(filters, of.filter_t)}, {work.grad, filter(filters_t, of.filter_t)}});
    Base::transform_input_adjoint(l, tape_t);
  }

  void first_back_t() {
    const LayerLayout& top = layout.layer[0];
    const int64_t stride = layout.first_stride();
    batch_sums(0);
    for (int64_t g = 0; g < count; ++g) {
      Base::use_input(g, false);
      Base::for_bunches([&](int64_t group, int64_t panels) {
        V *const x = Base::first_panels(work.first, g, group), *const x_t = Base::first_panels(work.first_t, g, group);
        for (int64_t v = 0; v < panels; ++v)
          add_bias(top, group + v, panel_back_t(0, g, group + v, x_t + v * stride, x + v * stride));
        Base::join_panels(x, panels, work.rows_t);
        Base::join_panels(x_t, panels, work.rows);
        if (sums != nullptr) Base::first_outer(group, panels, work.rows_t, g);
        Base::first_adjoint(group, panels, work.rows_t, filters, group > 0);
        Base::first_adjoint(group, panels, work.rows, filters_t, true);
      });
      Base::scatter_taps(first + g);
    }
  }
};

}  // namespace
}  // namespace pydistill
