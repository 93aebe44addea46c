// The block's arithmetic on one packed panel (one sample, L neighbouring channels): shared by every kernel that has the
// block in it. See instance_norm_relu_avg_pool.h for what is computed.
#pragma once

#include "cpu_vocabulary.h"
#include "instance_norm_relu_avg_pool.h"

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

// Visits every input position that reaches the output, as visit(position, output position). Positions that a pool of
// an odd-sized plane drops are left out: no gradient comes back to them but that through mean and variance.
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

template <class T, Form FORM, bool RELU, bool POOL>
__attribute__((noinline)) AffineGradient<T> run_panel(int64_t H, int64_t W, T eps, const Affine<T>& affine,
                                                      const Panels<T>& panel) {
  using V = Vec<T>;
  constexpr bool TANGENT = FORM == Form::jvp || FORM == Form::backward_jvp;
  constexpr bool BACKWARD = FORM == Form::backward || FORM == Form::backward_jvp;
  const int64_t OH = POOL ? H / 2 : H, OW = POOL ? W / 2 : W;
  const T share = T(POOL ? 0.25 : 1);  // of an output's gradient that each of its inputs gets
  const T count = T(H * W);
  const V g = affine.g, b = affine.b, g_t = affine.g_t, b_t = affine.b_t;
  const V zero{};

  // Statistics. The deviations' own mean, zero but for rounding, corrects the mean that they were taken from: without
  // it a plane far from zero loses digits. Along a direction: h_t = r (x_t - mean x_t - h slope), slope = mean(h x_t).
  V r, rest, rest_t = zero, slope = zero;
  {
    V mean[2], moment[4];
    sum_positions<T>(H, W, mean, [&](int64_t i, V(&sum)[2]) PYDISTILL_LAMBDA {
      sum[0] += panel.x[i];
      if constexpr (TANGENT) sum[1] += panel.x_t[i];
    });
    mean[0] /= count, mean[1] /= count;
    sum_positions<T>(H, W, moment, [&](int64_t i, V(&sum)[4]) PYDISTILL_LAMBDA {
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
    r = reciprocal_sqrt<T>(moment[1] - rest * rest + eps);
    slope = r * (moment[3] - rest * rest_t);
  }
  const auto normalised = [&](int64_t i) PYDISTILL_LAMBDA { return (panel.x[i] - rest) * r; };
  const auto normalised_t = [&](int64_t i, V h) PYDISTILL_LAMBDA { return r * (panel.x_t[i] - rest_t - h * slope); };

  // h and the activation's argument are formed alike in every form, so that all agree on which units are on. NaN is
  // neither above nor below zero and stays NaN, as in torch.
  const auto off = [&](V h) PYDISTILL_LAMBDA { return h * g + b <= zero; };

  if constexpr (!BACKWARD) {
    for (int64_t oh = 0; oh < OH; ++oh)
      for (int64_t ow = 0; ow < OW; ++ow) {
        V sum{};
        for_pooled<POOL>(oh, ow, W, [&](int64_t i, int64_t) PYDISTILL_LAMBDA {
          const V h = normalised(i);
          V a = h * g + b;
          if constexpr (TANGENT) a = g_t * h + g * normalised_t(i, h) + b_t;
          if constexpr (RELU) a = off(h) ? zero : a;
          sum += a;
        });
        panel.y[oh * OW + ow] = sum * share;
      }
  } else {
    const bool moving = TANGENT && panel.grad_y_t != nullptr;
    // e: the gradient that reaches the activation's argument; sums over positions of e, e h, e h_t, e_t, e_t h
    V total[5];
    for (V& t : total) t = zero;
    for (int64_t oh = 0; oh < OH; ++oh) {
      V row[5] = {};
      for (int64_t ow = 0; ow < OW; ++ow) {
        V y{};
        for_pooled<POOL>(oh, ow, W, [&](int64_t i, int64_t o) PYDISTILL_LAMBDA {
          const V h = normalised(i);
          const auto is_off = off(h);
          V e = panel.grad_y[o] * share;
          if constexpr (RELU) e = is_off ? zero : e;
          row[0] += e;
          row[1] += e * h;
          if constexpr (TANGENT) {
            const V h_t = normalised_t(i, h);
            V e_t = g_t * h + g * h_t + b_t;
            if constexpr (RELU) e_t = is_off ? zero : e_t;
            y += e_t;
            row[2] += e * h_t;
            if (moving) {
              V grad_t = panel.grad_y_t[o] * share;
              if constexpr (RELU) grad_t = is_off ? zero : grad_t;
              row[3] += grad_t;
              row[4] += grad_t * h;
            }
          }
        });
        if constexpr (TANGENT) panel.y[oh * OW + ow] = y * share;
      }
      for (int k = 0; k < 5; ++k) total[k] += row[k];
    }

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
          V e = panel.grad_y[o] * share, e_t = moving ? panel.grad_y_t[o] * share : zero;
          if constexpr (RELU) {
            const auto is_off = off(normalised(i));
            e = is_off ? zero : e;
            e_t = is_off ? zero : e_t;
          }
          finish(i, e, e_t);
        });
    if constexpr (POOL) {
      if (W % 2)
        for (int64_t h = 0; h < 2 * OH; ++h) finish(h * W + W - 1, zero, zero);
      if (H % 2)
        for (int64_t w = 0; w < W; ++w) finish((H - 1) * W + w, zero, zero);
    }
    if constexpr (TANGENT)
      return AffineGradient<T>{total[4] + total[2], total[3]};
    else
      return AffineGradient<T>{total[1], total[0]};
  }
  return AffineGradient<T>{};
}

}  // namespace
}  // namespace pydistill
