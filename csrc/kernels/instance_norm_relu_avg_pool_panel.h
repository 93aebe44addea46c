// The block's arithmetic on one packed panel (one sample, L adjacent channels): shared by every kernel that contains
// the block. See instance_norm_relu_avg_pool.h for what is computed.
#pragma once

#include "instance_norm_relu_avg_pool.h"
#include "vocabulary/cpu_vocabulary.h"

namespace pydistill {
namespace {

using Form = InstanceNormReluAvgPool::Form;

// Input panels are [H * W], of which `x_t` is read by the tangent forms only; the others are [output positions].
// Overwritten: x, by grad_x (backward) or its tangent (backward_jvp); x_t, by grad_x (backward_jvp); y, by the output
// or its tangent (all forms but backward). A null grad_y_t stands for zero.
template <class T>
struct Panels {
  Vec<T>*x, *x_t;
  Vec<T>*grad_y, *grad_y_t, *y;
};

// The affine parameters of the panel's channels and, for tangent forms, their derivatives along the direction.
template <class T>
struct Affine {
  Vec<T> g{}, b{}, g_t{}, b_t{};
};

// Sums over the panel: the gradients of g and b, or in backward_jvp their tangents.
template <class T>
struct AffineGradient {
  Vec<T> g{}, b{};
};

// Attention maps of the activation a = relu(h g + b): sums of a^power over the channels, for every position, and over
// the positions, for every channel.
template <class T>
struct Attention {
  T power = 1;
  // forward: `spatial` [H * W] is added to, its lanes still single channels; null: not wanted. `channel` is set.
  Vec<T>* spatial = nullptr;
  Vec<T> channel{};
  // backward: the gradients of both; null: zero
  const T* grad_spatial = nullptr;
  Vec<T> grad_channel{};
};

// Visits every input position that reaches the output, as visit(position, output position). Positions that a pool of
// an odd-sized plane drops are left out: their only gradient is that through mean and variance, and that of attention
// maps.
template <bool POOL, class Visit>
PYDISTILL_INLINE void for_pooled(int64_t out_row, int64_t out_w, int64_t W, Visit visit) {
  const int64_t o = out_row * (POOL ? W / 2 : W) + out_w;
  if constexpr (POOL) {
    const int64_t i = 2 * out_row * W + 2 * out_w;
    visit(i, o);
    visit(i + 1, o);
    visit(i + W, o);
    visit(i + W + 1, o);
  } else {
    visit(o, o);
  }
}

// And those that it drops, as visit(position).
template <bool POOL, class Visit>
PYDISTILL_INLINE void for_dropped(int64_t H, int64_t W, Visit visit) {
  if constexpr (POOL) {
    if (W % 2)
      for (int64_t h = 0; h < H / 2 * 2; ++h) visit(h * W + W - 1);
    if (H % 2)
      for (int64_t w = 0; w < W; ++w) visit((H - 1) * W + w);
  }
}

template <class T, Form FORM, bool POOL, bool ATTENTION = false>
__attribute__((noinline)) AffineGradient<T> run_panel(int64_t H, int64_t W, T eps, const Affine<T>& affine, bool relu,
                                                      const Panels<T>& panels,
                                                      [[maybe_unused]] Attention<T>* attention = nullptr) {
  using V = Wide<T>;
  static_assert(!ATTENTION || FORM == Form::forward || FORM == Form::backward);
  constexpr bool TANGENT = FORM == Form::jvp || FORM == Form::backward_jvp;
  constexpr bool BACKWARD = FORM == Form::backward || FORM == Form::backward_jvp;
  const int64_t OH = POOL ? H / 2 : H, OW = POOL ? W / 2 : W;
  const T share = T(POOL ? 0.25 : 1);  // each input's share of an output's gradient
  const T count = T(H * W);
  const V g = wide_of<T>(affine.g), b = wide_of<T>(affine.b);
  const V g_t = wide_of<T>(affine.g_t), b_t = wide_of<T>(affine.b_t);
  const V zero{};
  struct {
    V *x, *x_t, *grad_y, *grad_y_t, *y;
  } const panel = {wide<T>(panels.x), wide<T>(panels.x_t), wide<T>(panels.grad_y), wide<T>(panels.grad_y_t),
                   wide<T>(panels.y)};

  // Statistics. The mean of the deviations, zero up to rounding, corrects the mean that they were taken from: without
  // it a plane far from zero loses digits. Along a direction: h_t = r (x_t - mean x_t - h slope), slope = mean(h x_t).
  V r, rest, rest_t = zero, slope = zero;
  {
    V mean[2], moment[4];
    sum_positions(H, W, mean, [&](int64_t i, V(&sum)[2]) PYDISTILL_LAMBDA {
      sum[0] += panel.x[i];
      if constexpr (TANGENT) sum[1] += panel.x_t[i];
    });
    mean[0] /= count, mean[1] /= count;
    sum_positions(H, W, moment, [&](int64_t i, V(&sum)[4]) PYDISTILL_LAMBDA {
      const V d = panel.x[i] - mean[0];
      panel.x[i] = d;
      sum[0] += d;
      sum[1] += d * d;
      if constexpr (TANGENT) {
        const V d_t = panel.x_t[i] - mean[1];
        panel.x_t[i] = d_t;
        sum[2] += d_t;
        sum[3] += d * d_t;
      }
    });
    for (V& m : moment) m /= count;
    rest = moment[0], rest_t = moment[2];
    r = wide_of<T>(reciprocal_sqrt<T>(vector_of(moment[1] - rest * rest + eps)));
    slope = r * (moment[3] - rest * rest_t);
  }
  const auto normalised = [&](int64_t i) PYDISTILL_LAMBDA { return (panel.x[i] - rest) * r; };
  const auto normalised_t = [&](int64_t i, V h) PYDISTILL_LAMBDA { return r * (panel.x_t[i] - rest_t - h * slope); };

  // h and the activation's argument are computed alike in every form, so that all agree on which units are on.
  const V floor = zero + (relu ? T(0) : T(__builtin_nanf("")));  // nothing is below a NaN
  const auto through = [&](V h, V value) PYDISTILL_LAMBDA { return where_on(h * g + b, value, floor); };

  if constexpr (!BACKWARD) {
    const auto activation = [&](int64_t i) PYDISTILL_LAMBDA {
      const V h = normalised(i);
      V a = h * g + b;
      if constexpr (TANGENT) a = g_t * h + g * normalised_t(i, h) + b_t;
      return through(h, a);
    };
    if constexpr (!ATTENTION) {
      for (int64_t oh = 0; oh < OH; ++oh)
        for (int64_t ow = 0; ow < OW; ++ow) {
          V sum{};
          for_pooled<POOL>(oh, ow, W, [&](int64_t i, int64_t) PYDISTILL_LAMBDA { sum += activation(i); });
          panel.y[oh * OW + ow] = sum * share;
        }
    } else {
      with_power(attention->power, [&](auto power) PYDISTILL_LAMBDA {
        V* const spatial = wide<T>(attention->spatial);
        V total{};
        const auto attend = [&](int64_t i, V a, V& attended) PYDISTILL_LAMBDA {
          const V p = power(a);
          attended += p;
          if (spatial != nullptr) spatial[i] += p;
        };
        for (int64_t oh = 0; oh < OH; ++oh)
          for (int64_t ow = 0; ow < OW; ++ow) {
            V sum{}, attended{};
            for_pooled<POOL>(oh, ow, W, [&](int64_t i, int64_t) PYDISTILL_LAMBDA {
              const V a = activation(i);
              sum += a;
              attend(i, a, attended);
            });
            panel.y[oh * OW + ow] = sum * share;
            total += attended;
          }
        for_dropped<POOL>(H, W, [&](int64_t i) PYDISTILL_LAMBDA { attend(i, activation(i), total); });
        attention->channel = vector_of(total);
      });
    }
    return AffineGradient<T>{};
  } else {
    const bool moving = TANGENT && panel.grad_y_t != nullptr;
    // `attended(i, h)`: the gradient of position i's activation from the attention maps
    const auto run = [&](auto attended) PYDISTILL_LAMBDA -> AffineGradient<T> {
      // e: the gradient that reaches the activation's argument; sums over positions of e, e h, e h_t, e_t, e_t h
      V total[5];
      for (V& t : total) t = zero;
      for (int64_t oh = 0; oh < OH; ++oh) {
        V row[5] = {};
        for (int64_t ow = 0; ow < OW; ++ow) {
          V y{};
          for_pooled<POOL>(oh, ow, W, [&](int64_t i, int64_t o) PYDISTILL_LAMBDA {
            const V h = normalised(i);
            V e = panel.grad_y[o] * share;
            if constexpr (ATTENTION) e += attended(i, h);
            e = through(h, e);
            row[0] += e;
            row[1] += e * h;
            if constexpr (TANGENT) {
              const V h_t = normalised_t(i, h);
              y += through(h, g_t * h + g * h_t + b_t);
              row[2] += e * h_t;
              if (moving) {
                const V grad_t = through(h, panel.grad_y_t[o] * share);
                row[3] += grad_t;
                row[4] += grad_t * h;
              }
            }
          });
          if constexpr (TANGENT) panel.y[oh * OW + ow] = y * share;
        }
        for (int k = 0; k < 5; ++k) total[k] += row[k];
      }
      if constexpr (ATTENTION)
        for_dropped<POOL>(H, W, [&](int64_t i) PYDISTILL_LAMBDA {
          const V h = normalised(i), e = through(h, attended(i, h));
          total[0] += e;
          total[1] += e * h;
        });

      const V m1 = g * total[0] / count, m2 = g * total[1] / count;
      V n1 = zero, n2 = zero;
      if constexpr (TANGENT) {
        n1 = (g_t * total[0] + g * total[3]) / count;
        n2 = (g_t * total[1] + g * (total[4] + total[2])) / count;
      }
      // grad_x = r (g e - m1 - h m2); its tangent = -r slope grad_x + r (g_t e + g e_t - n1 - h_t m2 - h n2)
      const auto finish = [&](int64_t i, V e, V e_t) PYDISTILL_LAMBDA {
        const V h = normalised(i);
        const V grad = r * (g * e - m1 - h * m2);
        if constexpr (TANGENT) {
          const V h_t = normalised_t(i, h);
          panel.x_t[i] = grad;
          panel.x[i] = r * (g_t * e + g * e_t - n1 - h_t * m2 - h * n2) - r * slope * grad;
        } else {
          panel.x[i] = grad;
        }
      };
      for (int64_t oh = 0; oh < OH; ++oh)
        for (int64_t ow = 0; ow < OW; ++ow)
          for_pooled<POOL>(oh, ow, W, [&](int64_t i, int64_t o) PYDISTILL_LAMBDA {
            const V h = normalised(i);
            V e = panel.grad_y[o] * share;
            if constexpr (ATTENTION) e += attended(i, h);
            finish(i, through(h, e), moving ? through(h, panel.grad_y_t[o] * share) : zero);
          });
      for_dropped<POOL>(H, W, [&](int64_t i) PYDISTILL_LAMBDA {
        V e = zero;
        if constexpr (ATTENTION) {
          const V h = normalised(i);
          e = through(h, attended(i, h));
        }
        finish(i, e, zero);
      });
      if constexpr (TANGENT)
        return AffineGradient<T>{vector_of(total[4] + total[2]), vector_of(total[3])};
      else
        return AffineGradient<T>{vector_of(total[1]), vector_of(total[0])};
    };
    if constexpr (!ATTENTION) {
      return run([](int64_t, V) { return V{}; });
    } else {
      AffineGradient<T> found;
      with_power(attention->power - T(1), [&](auto power) PYDISTILL_LAMBDA {
        const T* const spatial = attention->grad_spatial;
        const V of_channel = wide_of<T>(attention->grad_channel);
        const T factor = attention->power;
        found = run([&](int64_t i, V h) PYDISTILL_LAMBDA {
          const V a = through(h, h * g + b), grad = spatial != nullptr ? of_channel + spatial[i] : of_channel;
          return where_on(a, power(a) * factor) * grad;
        });
      });
      return found;
    }
  }
}

}  // namespace
}  // namespace pydistill
