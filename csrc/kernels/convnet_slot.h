// The passes over a slot's images if whole blocks are run at once. Part of convnet_step.inl.
#pragma once

#include "convnet_first_layer.h"

namespace pydistill {
namespace {

// Takes the images of one slot through the network, a chunk at a time, adding to the slot's sums.
template <class T, class A>
class Slot : protected SlotFirst<T, A> {
 protected:
  using V = Vec<T>;
  using R = Register<T>;
  using Operand = typename A::Operand;
  static constexpr int L = Lanes<T>::count, kParts = Wide<T>::parts, kLanes = Registers<T>::lanes;
  using Base = SlotFirst<T, A>;
  using Base::add_norm, Base::add_outer, Base::affine, Base::at, Base::begin, Base::clear_rest, Base::columns,
      Base::count, Base::e, Base::end, Base::fill, Base::filter, Base::filters, Base::filters_t, Base::first,
      Base::first_panels, Base::first_product, Base::for_bunches, Base::fresh, Base::join_panels, Base::keep_tape,
      Base::kept_tape, Base::layout, Base::multiply_grads, Base::multiply_inputs, Base::panel, Base::scale,
      Base::scatter_taps, Base::split, Base::step, Base::sums, Base::take_tape, Base::tape, Base::tape_t,
      Base::transform_grad, Base::transform_input, Base::transform_input_adjoint, Base::transform_output,
      Base::use_input, Base::value, Base::work;

 public:
  using Base::Base;

  void run() {
    if (sums != nullptr)
      for (int64_t l = 0; l < layout.depth; ++l) fill(sums + layout.layer[l].sum_norm, 2 * layout.layer[l].out);
    for (first = begin; first < end; first += count) {
      count = smaller(step.chunk, end - first);
      fresh = first == begin;
      tape = work.tape;
      if (kTapeInPlace<T, A> && step.tape_use != Step::Tape::none) tape = reinterpret_cast<T*>(kept_tape(0));
      if (step.form != Step::Form::tangent) {
        if (step.tape_use != Step::Tape::read)
          forward();
        else if (!kTapeInPlace<T, A>)
          take_tape();
        if (step.form == Step::Form::gradient) backward(true);
        if (step.form == Step::Form::features_backward) features_backward();
        if (!kTapeInPlace<T, A> && step.tape_use == Step::Tape::write) keep_tape();
      } else {
        if (step.tape_use != Step::Tape::read) {
          forward();
          backward(false);
        } else if (!kTapeInPlace<T, A>) {
          take_tape();
        }
        tangent_forward();
        tangent_backward();
      }
    }
    if (begin == end && sums != nullptr) fill(sums, layout.partials / sizeof(T));
  }

 protected:
  // ---- features

  bool attends(int64_t l) const { return step.features.attended >> l & 1; }

  // Where block l's maps begin in image g's rows.
  int64_t spatial_offset(int64_t l, int64_t g) const {
    int64_t at = (e * step.N + first + g) * step.features.spatial_row;
    for (int64_t k = 0; k < l; ++k) at += attends(k) ? layout.layer[k].H * layout.layer[k].W : 0;
    return at;
  }
  int64_t channel_offset(int64_t l, int64_t g) const {
    int64_t at = (e * step.N + first + g) * step.features.channel_row;
    for (int64_t k = 0; k < l; ++k) at += attends(k) ? step.layer[k].out : 0;
    return at;
  }

  // A block after its convolution, and its attention maps: panels of an image come in order.
  void forward_panel(int64_t l, int64_t g, int64_t group, V* conv) {
    const LayerLayout& at = layout.layer[l];
    const Panels<T> panels = {conv, nullptr, nullptr, nullptr, panel(tape, g, at.pooled, group, at.OH * at.OW)};
    if (step.form != Step::Form::features || !attends(l)) {
      run_panel<T, Form::forward, true>(at.H, at.W, T(step.eps), affine(at, group, false), true, panels);
      return;
    }
    const Step::Features& to = step.features;
    Attention<T> attention;
    attention.power = T(to.power);
    attention.spatial = to.spatial != nullptr ? work.attention : nullptr;
    if (group == 0) fill(work.attention, at.H * at.W);
    run_panel<T, Form::forward, true, true>(at.H, at.W, T(step.eps), affine(at, group, false), true, panels,
                                            &attention);
    if (to.channel != nullptr) {
      T* const out = static_cast<T*>(to.channel) + channel_offset(l, g) + group * L;
      for (int i = 0; i < L && group * L + i < step.layer[l].out; ++i) out[i] = attention.channel[i];
    }
    if (to.spatial != nullptr && group == at.out_groups - 1) {
      T* const out = static_cast<T*>(to.spatial) + spatial_offset(l, g);
      for (int64_t i = 0; i < at.H * at.W; ++i) out[i] = lane_sum(reinterpret_cast<const T*>(work.attention + i));
    }
  }

  // The gradient of the input to a block's norm, in place of x, from those of its pooled output and its maps.
  AffineGradient<T> backward_panel(int64_t l, int64_t g, int64_t group, V* x) {
    const LayerLayout& at = layout.layer[l];
    const Panels<T> panels = {x, nullptr, panel(tape, g, at.grad_pooled, group, at.OH * at.OW), nullptr, nullptr};
    if (step.form != Step::Form::features_backward || !attends(l))
      return run_panel<T, Form::backward, true>(at.H, at.W, T(step.eps), affine(at, group, false), true, panels);
    const Step::Features& from = step.features;
    Attention<T> attention;
    attention.power = T(from.power);
    if (from.spatial_grad != nullptr)
      attention.grad_spatial = static_cast<const T*>(from.spatial_grad) + spatial_offset(l, g);
    if (from.channel_grad != nullptr) {
      const T* const grad = static_cast<const T*>(from.channel_grad) + channel_offset(l, g) + group * L;
      for (int i = 0; i < L && group * L + i < step.layer[l].out; ++i) attention.grad_channel[i] = grad[i];
    }
    return run_panel<T, Form::backward, true, true>(at.H, at.W, T(step.eps), affine(at, group, false), true, panels,
                                                    &attention);
  }

  // Visits the chunk's embeddings, or their gradients, as visit(image of all students', feature, value in the tape).
  template <class Visit>
  void for_embedding(Visit visit) {
    const LayerLayout& at = layout.layer[layout.depth - 1];
    const bool of_grad = step.form == Step::Form::features_backward;
    const int64_t plane = at.OH * at.OW, channels = step.layer[layout.depth - 1].out;
    for (int64_t g = 0; g < count; ++g)
      for (int64_t group = 0; group < at.out_groups; ++group) {
        T* const values = reinterpret_cast<T*>(panel(tape, g, of_grad ? at.grad_pooled : at.pooled, group, plane));
        for (int i = 0; i < L && group * L + i < channels; ++i)
          for (int64_t p = 0; p < plane; ++p)
            visit(e * step.N + first + g, (group * L + i) * plane + p, values[p * L + i]);
      }
  }

  void embedding_backward() {
    const LayerLayout& at = layout.layer[layout.depth - 1];
    for (int64_t g = 0; g < count; ++g)  // padded channels have no gradient
      fill(panel(tape, g, at.grad_pooled, 0, 0), at.OH * at.OW * at.out_groups);
    if (step.features.embedding_grad != nullptr)
      for_embedding([&](int64_t n, int64_t f, T& value) {
        value = static_cast<const T*>(step.features.embedding_grad)[n * step.features.embedding_row + f];
      });
  }

  void features_backward() {
    embedding_backward();
    blocks_backward(false);
    const int64_t stride = layout.first_stride();
    for (int64_t g = 0; g < count; ++g) {
      use_input(g, false);
      for_bunches([&](int64_t group, int64_t panels) {
        V* const x = first_panels(work.first, g, group);
        if (!layout.keeps_first) first_product(filters, group, panels, x);
        for (int64_t v = 0; v < panels; ++v) backward_panel(0, g, group + v, x + v * stride);
        join_panels(x, panels, work.rows);
        first_adjoint(group, panels, work.rows, filters, group > 0);
      });
      scatter_taps(first + g);
    }
  }

  // ---- passes over the chunk

  // Whether the primal forward pass has left the tiles of its inputs for tangents.
  bool has_inputs() const { return !layout.primal_apart && step.tape_use != Step::Tape::read && !step.over_batch(); }

  // The products of a later layer's primal forward pass.
  void convolve_tiles(int64_t l) {
    const LayerLayout& at = layout.layer[l];
    Operand* const rest = split ? work.grad : nullptr;  // unused before the backward pass
    if (layout.primal_apart) {
      Base::template transform_input<typename A::Primal>(l, tape, work.primal);
      Base::template multiply_inputs<typename A::Primal>(
          at, {{work.primal, reinterpret_cast<const typename A::Primal::Operand*>(filter(filters, at.filter_primal))}});
    } else {
      Operand* const input = work.input + at.input;
      transform_input(l, tape, input, rest);
      if (split)
        multiply_inputs(at, {{input, filter(filters, at.filter)},
                             {rest, filter(filters, at.filter)},
                             {input, filter(filters, at.filter_rest)}});
      else
        multiply_inputs(at, {{input, filter(filters, at.filter)}});
    }
  }

  void forward() {
    const int64_t stride = layout.first_stride();
    for (int64_t g = 0; g < count; ++g) {
      use_input(g, true);
      for_bunches([&](int64_t group, int64_t panels) {
        V* const x = first_panels(work.first, g, group);
        first_product(filters, group, panels, x);
        for (int64_t v = 0; v < panels; ++v) forward_panel(0, g, group + v, x + v * stride);
      });
    }
    for (int64_t l = 1; l < layout.depth; ++l) {
      const LayerLayout& at = layout.layer[l];
      convolve_tiles(l);
      for (int64_t g = 0; g < count; ++g)
        for (int64_t group = 0; group < at.out_groups; ++group) {
          // The panel leaves its deviations from the mean, which serve all later purposes equally well.
          V* conv = panel(tape, g, at.conv, group, at.H * at.W);
          transform_output(at, g, group, conv);
          forward_panel(l, g, group, conv);
        }
    }
    head_forward();
  }

  // From the last block's pooled output: the embedding, the logits, or the loss and its gradient in the logits.
  void head_forward() {
    if (step.form == Step::Form::features)
      return for_embedding([&](int64_t n, int64_t f, T& value) {
        static_cast<T*>(step.features.embedding)[n * step.features.embedding_row + f] = value;
      });
    if (step.form == Step::Form::features_backward) return;
    const int64_t row = layout.tape / sizeof(T);
    T* const logits = at(tape, 0, layout.logits_grad);
    multiply<T>(count, layout.features, layout.classes / L,
                {at(tape, 0, layout.layer[layout.depth - 1].pooled), row, 1}, {value(filters, layout.head), 0, 0, true},
                {logits, row, L, false});
    for (int64_t g = 0; g < count; ++g) {
      const T* bias = value(filters, layout.head_bias);
      for (int64_t k = 0; k < step.classes; ++k) logits[g * row + k] += bias[k];
      if (step.form == Step::Form::logits) {
        T* out = static_cast<T*>(step.logits) + (e * step.N + first + g) * step.classes;
        for (int64_t k = 0; k < step.classes; ++k) out[k] = logits[g * row + k];
      } else {
        cross_entropy(first + g, logits + g * row);
      }
    }
  }

  // The target's weight of class k, and the sum of all.
  T target(int64_t n, int64_t k, T high) const {
    if (step.kind == Step::Labels::hard)
      return static_cast<const int64_t*>(step.labels)[e * step.labels_student + n] == k ? T(1) : T(0);
    const T* row = static_cast<const T*>(step.labels) + e * step.labels_student + n * step.classes;
    return step.kind == Step::Labels::probs ? row[k] : exp_scalar(row[k] - high);
  }
  T target_scale(int64_t n) const {  // log-sum-exp of label logits
    if (step.kind != Step::Labels::logits) return 0;
    return log_sum_exp(static_cast<const T*>(step.labels) + e * step.labels_student + n * step.classes);
  }
  T log_sum_exp(const T* row) const {
    T high = row[0], sum = 0;
    for (int64_t k = 1; k < step.classes; ++k) high = row[k] > high ? row[k] : high;
    for (int64_t k = 0; k < step.classes; ++k) sum += exp_scalar(row[k] - high);
    return high + log_scalar(sum);
  }

  // Logits to the loss and, in their place, the gradient with respect to them; the row's padding is set to zero.
  __attribute__((noinline)) void cross_entropy(int64_t n, T* row) {
    const T high = target_scale(n), log_sum = log_sum_exp(row);
    T loss = 0, mass = 0;
    for (int64_t k = 0; k < step.classes; ++k) {
      const T t = target(n, k, high);
      mass += t;
      if (t != 0) loss -= t * (row[k] - log_sum);
    }
    for (int64_t k = 0; k < step.classes; ++k) {
      const T p = exp_scalar(row[k] - log_sum);
      row[k] = (mass * p - target(n, k, high)) / T(step.N);
    }
    for (int64_t k = step.classes; k < layout.classes; ++k) row[k] = 0;
    if (step.form == Step::Form::gradient) static_cast<T*>(step.losses)[e * step.N + n] = loss;
  }

  // From the logits' tangents to the tangent of their gradient, in their place; the loss's slope; the labels' gradient.
  // The gradient is (mass p - target) / N, from which mass p is recovered.
  void cross_entropy_tangent(int64_t n, const T* grad, T* row_t) {
    const T high = target_scale(n), N = T(step.N);
    T slope = 0, mass = 0, mean = 0, target_mean = 0;
    for (int64_t k = 0; k < step.classes; ++k) {
      const T t = target(n, k, high);
      slope += grad[k] * row_t[k];
      mass += t;
      mean += (grad[k] * N + t) * row_t[k];
      target_mean += t * row_t[k];
    }
    static_cast<T*>(step.losses)[e * step.N + n] = slope * N;
    const T average = mass != 0 ? mean / mass : T(0);
    if (step.labels_grad != nullptr) {
      T* out = static_cast<T*>(step.labels_grad) + (e * step.N + n) * step.classes;
      for (int64_t k = 0; k < step.classes; ++k)
        out[k] = scale * (step.kind == Step::Labels::probs ? (average - row_t[k]) / N
                                                           : target(n, k, high) * (target_mean - row_t[k]) / N);
    }
    for (int64_t k = 0; k < step.classes; ++k) row_t[k] = (grad[k] * N + target(n, k, high)) * (row_t[k] - average) / N;
    for (int64_t k = step.classes; k < layout.classes; ++k) row_t[k] = 0;
  }

  void head_backward(T* grad_of, const T* logits_grad, void* set, bool add) {
    const int64_t row = layout.tape / sizeof(T);
    multiply<T>(count, step.classes, layout.features / L, {logits_grad, row, 1},
                {value(set, layout.head_t), 0, 0, true},
                {at(grad_of, 0, layout.layer[layout.depth - 1].grad_pooled), row, L, add});
  }

  void head_outer(T* features_of, const T* logits_grad, bool add) {
    const int64_t row = layout.tape / sizeof(T);
    multiply<T>(step.classes, count, layout.features / L, {logits_grad, 1, row},
                {at(features_of, 0, layout.layer[layout.depth - 1].pooled), row, L, false},
                {sums + layout.sum_head, layout.features, L, add});
  }

  void head_bias(const T* logits_grad) {
    T* const sum = sums + layout.sum_head_bias;
    for (int64_t k = 0; k < layout.classes; ++k) {
      T total = fresh ? T(0) : sum[k];
      for (int64_t g = 0; g < count; ++g) total += logits_grad[g * (layout.tape / sizeof(T)) + k];
      sum[k] = total;
    }
  }

  __attribute__((noinline)) static void copy(const V* from, V* to, int64_t n) {
    for (int64_t i = 0; i < n; ++i) to[i] = from[i];
  }

  void head_gradient(bool weights) {
    const T* const logits_grad = at(tape, 0, layout.logits_grad);
    head_backward(tape, logits_grad, filters, false);
    if (weights) {
      head_outer(tape, logits_grad, !fresh);
      head_bias(logits_grad);
    }
  }

  void backward(bool weights) {
    head_gradient(weights);
    blocks_backward(weights);
    if (weights) first_backward();
  }

  // From the gradient of the last block's pooled output to that of the first's.
  void blocks_backward(bool weights) {
    for (int64_t l = layout.depth - 1; l > 0; --l) {
      const LayerLayout& at = layout.layer[l];
      for (int64_t g = 0; g < count; ++g)
        for (int64_t group = 0; group < at.out_groups; ++group) {
          copy(panel(tape, g, at.conv, group, at.H * at.W), work.x, at.H * at.W);
          const auto grad = backward_panel(l, g, group, work.x);
          if (weights) add_norm(at, group, grad);
          transform_grad(at, work.x, g, group, work.grad);
        }
      clear_rest(at, work.grad, at.out_row);
      if (weights) {
        if (layout.primal_apart) transform_input(l, tape, work.input + at.input);
        add_outer(at, {{work.input + at.input, work.grad}});
      }
      multiply_grads(at, {{work.grad, filter(filters, at.filter_t)}});
      transform_input_adjoint(l, tape);
    }
  }

  // The first block's weights' gradient.
  void first_backward() {
    const LayerLayout& top = layout.layer[0];
    const int64_t stride = layout.first_stride();
    for (int64_t g = 0; g < count; ++g) {
      use_input(g, false);
      for_bunches([&](int64_t group, int64_t panels) {
        V* const x = first_panels(work.first, g, group);
        if (!layout.keeps_first) first_product(filters, group, panels, x);
        for (int64_t v = 0; v < panels; ++v) add_norm(top, group + v, backward_panel(0, g, group + v, x + v * stride));
        join_panels(x, panels, work.rows);
        first_outer(group, panels, work.rows, g);
      });
    }
  }

  void first_outer(int64_t group, int64_t panels, const Operand* rows, int64_t g) {
    const LayerLayout& top = layout.layer[0];
    const Factors<Operand> factors = {columns, rows};
    A::outer(layout.used_taps, round_up(top.H * top.W, A::kTiles), panels, &factors, 1, layout.taps, panels * L,
             {sums + top.sum + group * L, top.out, L, !(fresh && g == 0)});
  }

  void first_adjoint(int64_t group, int64_t panels, const Operand* rows, const void* set, bool add) {
    const LayerLayout& top = layout.layer[0];
    const Factors<Operand> factors = {rows, filter(set, top.filter_t) + group * L * layout.taps};
    A::product(top.H * top.W, panels * L, layout.taps / L, &factors, 1, panels * L,
               {work.taps_grad, layout.taps, L, add});
  }

  void tangent_forward() {
    const LayerLayout& top = layout.layer[0];
    const int64_t stride = layout.first_stride();
    for (int64_t g = 0; g < count; ++g) {
      use_input(g, true);
      for_bunches([&](int64_t group, int64_t panels) {
        V *const x = first_panels(work.first, g, group), *const x_t = first_panels(work.first_t, g, group);
        first_product(filters, group, panels, x);
        first_product(filters_t, group, panels, x_t);
        for (int64_t v = 0; v < panels; ++v)
          run_panel<T, Form::jvp, true>(top.H, top.W, T(step.eps), affine(top, group + v, true), true,
                                        {x + v * stride, x_t + v * stride, nullptr, nullptr,
                                         panel(tape_t, g, top.pooled, group + v, top.OH * top.OW)});
      });
    }
    for (int64_t l = 1; l < layout.depth; ++l) {
      const LayerLayout& at = layout.layer[l];
      Operand *const input = work.input + at.input, *const input_t = work.input_t + at.input;
      if (!has_inputs()) transform_input(l, tape, input);
      transform_input(l, tape_t, input_t);
      multiply_inputs(at, {{input_t, filter(filters, at.filter)}, {input, filter(filters_t, at.filter)}});
      for (int64_t g = 0; g < count; ++g)
        for (int64_t group = 0; group < at.out_groups; ++group) {
          V* conv_t = panel(tape_t, g, at.conv, group, at.H * at.W);
          transform_output(at, g, group, conv_t);
          run_panel<T, Form::jvp, true>(at.H, at.W, T(step.eps), affine(at, group, true), true,
                                        {panel(tape, g, at.conv, group, at.H * at.W), conv_t, nullptr, nullptr,
                                         panel(tape_t, g, at.pooled, group, at.OH * at.OW)});
        }
    }
    head_tangent();
  }

  void head_tangent() {
    const int64_t row = layout.tape / sizeof(T);
    const int64_t features = layout.layer[layout.depth - 1].pooled;
    T* const logits_t = at(tape_t, 0, layout.logits_grad);
    multiply<T>(count, layout.features, layout.classes / L, {at(tape_t, 0, features), row, 1},
                {value(filters, layout.head), 0, 0, true}, {logits_t, row, L, false});
    multiply<T>(count, layout.features, layout.classes / L, {at(tape, 0, features), row, 1},
                {value(filters_t, layout.head), 0, 0, true}, {logits_t, row, L, true});
    for (int64_t g = 0; g < count; ++g) {
      const T* bias = value(filters_t, layout.head_bias);
      for (int64_t k = 0; k < step.classes; ++k) logits_t[g * row + k] += bias[k];
      cross_entropy_tangent(first + g, at(tape, g, layout.logits_grad), logits_t + g * row);
    }
  }

  void head_tangent_backward() {
    const T* const logits_grad = at(tape, 0, layout.logits_grad);
    const T* const logits_grad_t = at(tape_t, 0, layout.logits_grad);
    head_backward(tape_t, logits_grad_t, filters, false);
    head_backward(tape_t, logits_grad, filters_t, true);
    if (sums != nullptr) {
      head_outer(tape, logits_grad_t, !fresh);
      head_outer(tape_t, logits_grad, true);
      head_bias(logits_grad_t);
    }
  }

  void tangent_backward() {
    head_tangent_backward();
    for (int64_t l = layout.depth - 1; l > 0; --l) {
      const LayerLayout& at = layout.layer[l];
      for (int64_t g = 0; g < count; ++g)
        for (int64_t group = 0; group < at.out_groups; ++group) {
          copy(panel(tape, g, at.conv, group, at.H * at.W), work.x, at.H * at.W);
          copy(panel(tape_t, g, at.conv, group, at.H * at.W), work.x_t, at.H * at.W);
          add_norm(at, group,
                   run_panel<T, Form::backward_jvp, true>(
                       at.H, at.W, T(step.eps), affine(at, group, true), true,
                       {work.x, work.x_t, panel(tape, g, at.grad_pooled, group, at.OH * at.OW),
                        panel(tape_t, g, at.grad_pooled, group, at.OH * at.OW), work.y}));
          transform_grad(at, work.x, g, group, work.grad_t);
          transform_grad(at, work.x_t, g, group, work.grad);
        }
      clear_rest(at, work.grad, at.out_row);
      clear_rest(at, work.grad_t, at.out_row);
      if (sums != nullptr) add_outer(at, {{work.input + at.input, work.grad_t}, {work.input_t + at.input, work.grad}});
      multiply_grads(at, {{work.grad_t, filter(filters, at.filter_t)}, {work.grad, filter(filters_t, at.filter_t)}});
      transform_input_adjoint(l, tape_t);
    }
    const LayerLayout& top = layout.layer[0];
    const int64_t stride = layout.first_stride();
    for (int64_t g = 0; g < count; ++g) {
      use_input(g, false);
      for_bunches([&](int64_t group, int64_t panels) {
        V *const x = first_panels(work.first, g, group), *const x_t = first_panels(work.first_t, g, group);
        if (!layout.keeps_first) {
          first_product(filters, group, panels, x);
          first_product(filters_t, group, panels, x_t);
        }
        for (int64_t v = 0; v < panels; ++v)
          add_norm(top, group + v,
                   run_panel<T, Form::backward_jvp, true>(
                       top.H, top.W, T(step.eps), affine(top, group + v, true), true,
                       {x + v * stride, x_t + v * stride, panel(tape, g, top.grad_pooled, group + v, top.OH * top.OW),
                        panel(tape_t, g, top.grad_pooled, group + v, top.OH * top.OW), work.y}));
        join_panels(x, panels, work.rows_t);
        join_panels(x_t, panels, work.rows);
        if (sums != nullptr) first_outer(group, panels, work.rows_t, g);
        first_adjoint(group, panels, work.rows_t, filters, group > 0);
        first_adjoint(group, panels, work.rows, filters_t, true);
      });
      scatter_taps(first + g);
    }
  }
};

}  // namespace
}  // namespace pydistill
