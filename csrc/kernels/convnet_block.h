// A ConvNet's block after its convolution, of any norm, activation and pool, on one packed panel (one image, L
// adjacent channels). What the fused block of instance_norm_relu_avg_pool_panel.h does in one loop is done here in
// stages over a few positions at a time, in buffers that stay in the first-level cache: the switches are between the
// stages, outside all loops.
//
//   h = (x - mean) r,  z = h g + b,  a = activation(z),  y = pool(a)
//
// _t is the derivative along a direction: h_t = r (x_t - mean_t - h tilt), with tilt = mean(h x_t). Backwards, e is the
// gradient that reaches z and c = g e that of h; m1 and m2 are the means of c and c h over all values sharing a mean:
//
//   grad x = r (c - m1 - h m2),  its tangent r (c_t - n1 - h_t m2 - h n2) - r tilt grad x,
//
// with n1 and n2 the means of c_t and c_t h + c h_t. Without a norm, or with fixed statistics, all four are zero.
#pragma once

#include "convnet_step.h"
#include "vocabulary/cpu_vocabulary.h"

namespace pydistill {
namespace {

template <class T>
struct BlockAttention {  // like Attention in instance_norm_relu_avg_pool_panel.h, of |a|
  T power = 1;
  Wide<T>* spatial = nullptr;
  Wide<T> channel{};
  Wide<T> mask{};  // one in lanes with a channel
  const T* grad_spatial = nullptr;
  Wide<T> grad_channel{};
};

template <class T>
struct BlockPanel {
  using V = Wide<T>;
  ConvNetStep::Activation activation;
  ConvNetStep::Pool pool;
  T slope;  // of a leaky ReLU below zero
  int64_t H, W;
  const V *x, *x_t;
  V mean, r, mean_t, tilt;
  const V *g, *b, *g_t, *b_t;  // position i's at i * each
  int64_t each;                // 1 if every position has its own parameters, else 0
  const V *grad_y, *grad_y_t;  // null: zero
  BlockAttention<T>* attention;

  bool curved() const { return activation > ConvNetStep::Activation::leaky_relu; }
};

// Positions processed at a time: `n` outputs, each from `inputs` positions, or n positions that a pool drops.
struct Segment {
  static constexpr int kMost = 32;
  int64_t base, stride, row, output;  // of input k of output j: base + j stride + k % 2 + k / 2 row
  int n, inputs;
  bool dropped;
  PYDISTILL_INLINE int64_t position(int k, int j) const { return base + j * stride + (k & 1) + (k >> 1) * row; }
  PYDISTILL_INLINE int count() const { return n * inputs; }
};

template <class Visit>
PYDISTILL_INLINE void for_segments(int64_t H, int64_t W, bool pooled, Visit visit) {
  const auto run = [&](int64_t base, int64_t stride, int64_t output, int64_t count, bool dropped) {
    for (int64_t at = 0; at < count; at += Segment::kMost) {
      const int n = static_cast<int>(count - at < Segment::kMost ? count - at : Segment::kMost);
      visit(Segment{base + at * stride, stride, 0, output + at, n, 1, dropped});
    }
  };
  if (!pooled) return run(0, 1, 0, H * W, false);
  const int64_t OH = H / 2, OW = W / 2, most = Segment::kMost / 4;
  for (int64_t oh = 0; oh < OH; ++oh)
    for (int64_t ow = 0; ow < OW; ow += most) {
      const int n = static_cast<int>(OW - ow < most ? OW - ow : most);
      visit(Segment{2 * oh * W + 2 * ow, 2, W, oh * OW + ow, n, 4, false});
    }
  if (W % 2) run(W - 1, W, 0, 2 * OH, true);
  if (H % 2) run((H - 1) * W, 1, 0, W, true);
}

template <class T>
PYDISTILL_INLINE Wide<T> where_above(Wide<T> a, Wide<T> b, Wide<T> yes, Wide<T> no) {
  for (int i = 0; i < Wide<T>::parts; ++i) yes.part[i] = a.part[i] > b.part[i] ? yes.part[i] : no.part[i];
  return yes;
}

PYDISTILL_INLINE float tanh_lane(float x) {
  const float s = x * x, size = x < 0 ? -x : x;
  float p = -5.70498872745e-3f;  // Cephes' tanhf, for |x| < 0.625
  p = p * s + 2.06390887954e-2f;
  p = p * s - 5.37397155531e-2f;
  p = p * s + 1.33314422036e-1f;
  p = p * s - 3.33332819422e-1f;
  const float near = p * s * x + x, e = exp_lane(2 * size), far = 1 - 2 / (e + 1);
  return size < 0.625f ? near : x < 0 ? -far : far;
}
PYDISTILL_INLINE double tanh_lane(double x) { return __builtin_tanh(x); }
PYDISTILL_INLINE float sigmoid_lane(float x) { return 1 / (1 + exp_lane(-x)); }
PYDISTILL_INLINE double sigmoid_lane(double x) { return 1 / (1 + exp_lane(-x)); }

template <class T, class Function>
PYDISTILL_INLINE void map_lanes(int n, const Wide<T>* from, Wide<T>* to, Function function) {
  const T* in = reinterpret_cast<const T*>(from);
  T* out = reinterpret_cast<T*>(to);
  for (int64_t i = 0; i < n * Lanes<T>::count; ++i) out[i] = function(in[i]);
}

// a and the first and second derivative of the activation at z; d2 only if it is curved.
template <class T>
__attribute__((noinline)) void activate(ConvNetStep::Activation activation, T slope, int n, const Wide<T>* z,
                                        Wide<T>* a, Wide<T>* d1, Wide<T>* d2) {
  using V = Wide<T>;
  const V one = V{} + T(1), below = V{} + slope;
  switch (activation) {
    case ConvNetStep::Activation::relu:
      for (int i = 0; i < n; ++i) a[i] = where_on(z[i], z[i]), d1[i] = where_on(z[i], one);
      return;
    case ConvNetStep::Activation::leaky_relu:
      for (int i = 0; i < n; ++i) {
        d1[i] = where_above(z[i], V{}, one, below);
        a[i] = z[i] * d1[i];
      }
      return;
    case ConvNetStep::Activation::sigmoid:
      map_lanes(n, z, a, [](T v) PYDISTILL_LAMBDA { return sigmoid_lane(v); });
      for (int i = 0; i < n; ++i) d1[i] = a[i] * (one - a[i]), d2[i] = d1[i] * (one - a[i] - a[i]);
      return;
    case ConvNetStep::Activation::tanh:
      map_lanes(n, z, a, [](T v) PYDISTILL_LAMBDA { return tanh_lane(v); });
      for (int i = 0; i < n; ++i) d1[i] = one - a[i] * a[i], d2[i] = (a[i] + a[i]) * d1[i] * T(-1);
      return;
    case ConvNetStep::Activation::swish:
      map_lanes(n, z, a, [](T v) PYDISTILL_LAMBDA { return sigmoid_lane(v); });
      for (int i = 0; i < n; ++i) {
        const V s = a[i], rest = one - s;
        d1[i] = s * (one + z[i] * rest);
        d2[i] = s * rest * (one + one + z[i] * (rest - s));
        a[i] = z[i] * s;
      }
      return;
  }
}

// |a|^p, with the sign of a if wanted (none at zero).
template <class T>
__attribute__((noinline)) void powers(T p, bool with_sign, int n, const Wide<T>* a, Wide<T>* out) {
  with_power(p, [&](auto power) PYDISTILL_LAMBDA {
    for (int i = 0; i < n; ++i) {
      const Wide<T> zero{}, size = where_above(a[i], zero, a[i], zero - a[i]);
      Wide<T> value = power(size);
      if (with_sign) value = where_above(a[i], zero, value, where_above(zero, a[i], zero - value, zero));
      out[i] = value;
    }
  });
}

// The values at a segment's positions, input k of output j at [k * n + j].
template <class T>
struct BlockValues {
  using V = Wide<T>;
  V h[Segment::kMost], h_t[Segment::kMost], z[Segment::kMost], z_t[Segment::kMost];
  V a[Segment::kMost], d1[Segment::kMost], d2[Segment::kMost];
  V share[Segment::kMost];  // each input's share of an output's gradient
  V e[Segment::kMost], e_t[Segment::kMost];
};

template <class T, bool TANGENT>
__attribute__((noinline)) void evaluate(const BlockPanel<T>& p, const Segment& s, BlockValues<T>& v) {
  using V = Wide<T>;
  int i = 0;
  for (int k = 0; k < s.inputs; ++k)
    for (int j = 0; j < s.n; ++j, ++i) {
      const int64_t at = s.position(k, j), of = at * p.each;
      const V h = (p.x[at] - p.mean) * p.r;
      v.h[i] = h;
      v.z[i] = h * p.g[of] + p.b[of];
      if constexpr (TANGENT) {
        const V h_t = p.r * (p.x_t[at] - p.mean_t - h * p.tilt);
        v.h_t[i] = h_t;
        v.z_t[i] = p.g_t[of] * h + p.g[of] * h_t + p.b_t[of];
      }
    }
  activate(p.activation, p.slope, s.count(), v.z, v.a, v.d1, v.d2);
  if (p.pool == ConvNetStep::Pool::max && s.inputs == 4)
    for (int j = 0; j < s.n; ++j) {  // the first of equals is the maximum, as in torch
      const V one = V{} + T(1), zero{};
      V most = v.a[j], share[4] = {one, zero, zero, zero};
#pragma GCC unroll 4
      for (int k = 1; k < 4; ++k) {
        const V a = v.a[k * s.n + j];
#pragma GCC unroll 4
        for (int q = 0; q < k; ++q) share[q] = where_above(a, most, zero, share[q]);
        share[k] = where_above(a, most, one, zero);
        most = where_above(a, most, a, most);
      }
      for (int k = 0; k < 4; ++k) v.share[k * s.n + j] = share[k];
    }
  else
    for (int k = 0; k < s.count(); ++k) v.share[k] = V{} + T(s.inputs == 4 ? 0.25 : 1);
}

// A block's pooled output, or its tangent along the direction; and its attention maps.
template <class T, bool TANGENT>
__attribute__((noinline)) void block_forward(const BlockPanel<T>& p, Wide<T>* y) {
  using V = Wide<T>;
  BlockValues<T> v;
  for_segments(p.H, p.W, p.pool != ConvNetStep::Pool::none, [&](const Segment& s) {
    if (s.dropped && p.attention == nullptr) return;
    evaluate<T, TANGENT>(p, s, v);
    if (!s.dropped)
      for (int j = 0; j < s.n; ++j) {
        V sum{};
        for (int k = 0, i = j; k < s.inputs; ++k, i += s.n) {
          if constexpr (TANGENT)
            sum += v.share[i] * v.d1[i] * v.z_t[i];
          else
            sum += v.share[i] * v.a[i];
        }
        y[s.output + j] = sum;
      }
    if (BlockAttention<T>* const to = p.attention) {
      powers(to->power, false, s.count(), v.a, v.e);
      for (int k = 0, i = 0; k < s.inputs; ++k)
        for (int j = 0; j < s.n; ++j, ++i) {
          to->channel += v.e[i];
          if (to->spatial != nullptr) to->spatial[s.position(k, j)] += v.e[i] * to->mask;
        }
    }
  });
}

// e and e_t of a segment that has been evaluated.
template <class T, bool TANGENT>
PYDISTILL_INLINE void block_gradient(const BlockPanel<T>& p, const Segment& s, BlockValues<T>& v) {
  using V = Wide<T>;
  for (int k = 0, i = 0; k < s.inputs; ++k)
    for (int j = 0; j < s.n; ++j, ++i) {
      v.e[i] = s.dropped || p.grad_y == nullptr ? V{} : v.share[i] * p.grad_y[s.output + j];
      if constexpr (TANGENT)
        v.e_t[i] = s.dropped || p.grad_y_t == nullptr ? V{} : v.share[i] * p.grad_y_t[s.output + j];
    }
  if (const BlockAttention<T>* const from = p.attention) {
    V slopes[Segment::kMost];
    powers(from->power - T(1), true, s.count(), v.a, slopes);
    for (int k = 0, i = 0; k < s.inputs; ++k)
      for (int j = 0; j < s.n; ++j, ++i) {
        V grad = from->grad_channel;
        if (from->grad_spatial != nullptr) grad += from->grad_spatial[s.position(k, j)];
        v.e[i] += slopes[i] * grad * from->power;
      }
  }
  const bool curved = TANGENT && p.curved();
  for (int i = 0; i < s.count(); ++i) {
    if constexpr (TANGENT) {
      v.e_t[i] = v.e_t[i] * v.d1[i];
      if (curved) v.e_t[i] += v.d2[i] * v.z_t[i] * v.e[i];
    }
    v.e[i] = v.e[i] * v.d1[i];
  }
}

// Sums over the panel: of c, c h, and in tangents c_t, c_t h + c h_t; and the gradients of g and b, or their tangents,
// which are added to `each_g` and `each_b` [H * W] if every position has its own parameters.
template <class T>
struct BlockSums {
  Wide<T> c{}, c_h{}, c_t{}, c_t_h{}, g{}, b{};
};

template <class T, bool TANGENT>
__attribute__((noinline)) BlockSums<T> block_sums(const BlockPanel<T>& p, Wide<T>* each_g, Wide<T>* each_b) {
  using V = Wide<T>;
  BlockValues<T> v;
  BlockSums<T> total;
  for_segments(p.H, p.W, p.pool != ConvNetStep::Pool::none, [&](const Segment& s) {
    if (s.dropped && p.attention == nullptr) return;
    evaluate<T, TANGENT>(p, s, v);
    block_gradient<T, TANGENT>(p, s, v);
    BlockSums<T> part;
    for (int k = 0, i = 0; k < s.inputs; ++k)
      for (int j = 0; j < s.n; ++j, ++i) {
        const V e = v.e[i], h = v.h[i];
        V to_g = e * h, to_b = e;
        if (p.each == 0) {  // c = g e, once for all of them
          part.c += e, part.c_h += to_g;
          if constexpr (TANGENT) {
            to_b = v.e_t[i], to_g = to_b * h + e * v.h_t[i];
            part.c_t += to_b, part.c_t_h += to_g;
          }
        } else {
          const int64_t at = s.position(k, j);
          const V c = p.g[at] * e;
          part.c += c, part.c_h += c * h;
          if constexpr (TANGENT) {
            to_b = v.e_t[i], to_g = to_b * h + e * v.h_t[i];
            const V c_t = p.g_t[at] * e + p.g[at] * to_b;
            part.c_t += c_t, part.c_t_h += c_t * h + c * v.h_t[i];
          }
          if (each_g != nullptr) each_g[at] += to_g, each_b[at] += to_b;
        }
      }
    total.c += part.c, total.c_h += part.c_h;
    if constexpr (TANGENT) total.c_t += part.c_t, total.c_t_h += part.c_t_h;
  });
  if (p.each == 0) {
    total.g = TANGENT ? total.c_t_h : total.c_h, total.b = TANGENT ? total.c_t : total.c;
    if constexpr (TANGENT) {
      total.c_t = p.g_t[0] * total.c + p.g[0] * total.c_t;
      total.c_t_h = p.g_t[0] * total.c_h + p.g[0] * total.c_t_h;
    }
    total.c = p.g[0] * total.c, total.c_h = p.g[0] * total.c_h;
  }
  return total;
}

template <class T>
struct BlockMeans {
  Wide<T> m1{}, m2{}, n1{}, n2{};
};

// The gradient of x, and in tangents its tangent; `grad` may be x and `grad_t` x_t. Returns the sum of the last of
// these over the panel: the gradient of a convolution's bias.
template <class T, bool TANGENT>
__attribute__((noinline)) Wide<T> block_backward(const BlockPanel<T>& p, const BlockMeans<T>& m, Wide<T>* grad,
                                                 Wide<T>* grad_t) {
  using V = Wide<T>;
  BlockValues<T> v;
  V total{};
  for_segments(p.H, p.W, p.pool != ConvNetStep::Pool::none, [&](const Segment& s) {
    evaluate<T, TANGENT>(p, s, v);
    block_gradient<T, TANGENT>(p, s, v);
    V part{};
    for (int k = 0, i = 0; k < s.inputs; ++k)
      for (int j = 0; j < s.n; ++j, ++i) {
        const int64_t at = s.position(k, j), of = at * p.each;
        const V h = v.h[i], e = v.e[i];
        const V found = p.r * (p.g[of] * e - m.m1 - h * m.m2);
        grad[at] = found;
        if constexpr (TANGENT) {
          const V c_t = p.g_t[of] * e + p.g[of] * v.e_t[i];
          const V found_t = p.r * (c_t - m.n1 - v.h_t[i] * m.m2 - h * m.n2) - p.r * p.tilt * found;
          grad_t[at] = found_t;
          part += found_t;
        } else {
          part += found;
        }
      }
    total += part;
  });
  return total;
}

}  // namespace
}  // namespace pydistill
