// An image's parameters, and its stages on planes of [H, W]: colour, crop, cutout, mirror, and their adjoints. Part of
// augment.inl.
#pragma once

#include "augment.h"
#include "vocabulary/cpu_vocabulary.h"
#include "vocabulary/sum_in_pairs.h"

namespace pydistill {
namespace {

using Call = Augment;
using Form = Call::Form;

constexpr int64_t ring = 2;

// An image's row of the record, in the words of the loops below.
struct Parameters {
  double brightness, saturation, contrast;
  int64_t crop_y, crop_x, cutout_top, cutout_left, cutout_bottom, cutout_right;
  bool flip, mirrored;
  bool scales, rotates, finite;
  double scale_x, scale_y;
  double xx, xy, yx, yy;  // rotation: from the result's place about the centre to the source's
};

PYDISTILL_INLINE double between(double low, double value, double high) {  // a NaN comes out as low
  return value > low ? (value < high ? value : high) : low;
}

Parameters parameters_of(const Call& call, int64_t n) {
  const double H = static_cast<double>(call.H), W = static_cast<double>(call.W);
  const auto value = [&](Call::Column column) PYDISTILL_LAMBDA {
    return double(call.record[n * call.record_row + column * call.record_column]);
  };
  const auto whole = [&](double v, double limit)
                         PYDISTILL_LAMBDA { return static_cast<int64_t>(between(-limit, v, limit)); };
  Parameters p;
  p.brightness = call.linear ? 0 : value(Call::brightness);
  p.saturation = value(Call::saturation), p.contrast = value(Call::contrast);
  p.crop_y = whole(value(Call::crop_y), H), p.crop_x = whole(value(Call::crop_x), W);
  p.cutout_top = whole(value(Call::cutout_top), 1e9), p.cutout_left = whole(value(Call::cutout_left), 1e9);
  p.cutout_bottom = p.cutout_top + whole(value(Call::cutout_height), 1e9);
  p.cutout_right = p.cutout_left + whole(value(Call::cutout_width), 1e9);
  p.flip = value(Call::flip) != 0;
  p.mirrored = n >= call.N;
  p.scale_x = value(Call::scale_x), p.scale_y = value(Call::scale_y);
  const double angle = value(Call::angle), zero = 0 * (p.scale_x + p.scale_y + angle);
  p.finite = zero == 0;
  p.scales = p.scale_x != 1 || p.scale_y != 1;
  p.rotates = angle != 0;
  // grid coordinates run from -1 to 1 between the centres of the outer pixels, or their outer edges
  const double across = call.align_corners ? W - 1 : W, down = call.align_corners ? H - 1 : H;
  const double sine = p.rotates && p.finite ? __builtin_sin(angle) : 0;
  p.xx = p.yy = p.rotates && p.finite ? __builtin_cos(angle) : 1;
  p.xy = down > 0 ? -sine * across / down : 0;
  p.yx = across > 0 ? sine * down / across : 0;
  return p;
}

// Scratch memory, allocated piece by piece.
struct Memory {
  unsigned char* next;
  template <class T>
  T* take(int64_t count) {
    T* const taken = reinterpret_cast<T*>(next);
    next += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    return taken;
  }
};

template <class S, class T>
void load_planes_of(const Map& map, int64_t n, int64_t C, int64_t H, int64_t W, T* planes) {
  for (int64_t c = 0; c < C; ++c)
    for (int64_t i = 0; i < H; ++i) {
      const S* const from = static_cast<const S*>(map.data) + n * map.n + c * map.c + i * map.h;
      T* const to = planes + (c * H + i) * W;
      if (map.w == 1)
        for (int64_t j = 0; j < W; ++j) to[j] = widen(from[j]);
      else
        for (int64_t j = 0; j < W; ++j) to[j] = widen(from[j * map.w]);
    }
}

template <class T>
void load_planes(const Call& call, int64_t n, T* planes) {
  if constexpr (sizeof(T) == 8) {
    load_planes_of<double>(call.from, n, call.C, call.H, call.W, planes);
  } else {
    if (call.scalar == Scalar::f32) load_planes_of<float>(call.from, n, call.C, call.H, call.W, planes);
    if (call.scalar == Scalar::bf16) load_planes_of<Bf16>(call.from, n, call.C, call.H, call.W, planes);
    if (call.scalar == Scalar::f16) load_planes_of<F16>(call.from, n, call.C, call.H, call.W, planes);
  }
}

template <class S, class T>
void store_planes_of(const T* planes, const Map& map, int64_t n, int64_t count) {
  S* const to = static_cast<S*>(map.data) + n * map.n;
  for (int64_t k = 0; k < count; ++k) narrow(planes[k], to[k]);
}

template <class T>
void store_planes(const Call& call, const T* planes, int64_t n) {
  const int64_t count = call.C * call.H * call.W;
  if constexpr (sizeof(T) == 8) {
    store_planes_of<double>(planes, call.to, n, count);
  } else {
    if (call.scalar == Scalar::f32) store_planes_of<float>(planes, call.to, n, count);
    if (call.scalar == Scalar::bf16) store_planes_of<Bf16>(planes, call.to, n, count);
    if (call.scalar == Scalar::f16) store_planes_of<F16>(planes, call.to, n, count);
  }
}

template <class T>
void channel_means(const T* x, int64_t C, int64_t count, T* means) {
  for (int64_t k = 0; k < count; ++k) means[k] = x[k];
  for (int64_t c = 1; c < C; ++c)
    for (int64_t k = 0; k < count; ++k) means[k] += x[c * count + k];
  for (int64_t k = 0; k < count; ++k) means[k] /= static_cast<T>(C);
}

template <class T>
void colour(const Parameters& p, int64_t C, int64_t count, T* x, T* means) {
  const T b = static_cast<T>(p.brightness), s = static_cast<T>(p.saturation), c = static_cast<T>(p.contrast);
  if (b != 0)
    for (int64_t k = 0; k < C * count; ++k) x[k] += b;
  if (s == 1 && c == 1) return;
  channel_means(x, C, count, means);
  const T M = sum<T>(count, [&](int64_t k) PYDISTILL_LAMBDA { return means[k]; }) / static_cast<T>(count);
  for (int64_t plane = 0; plane < C; ++plane) {
    T* const own = x + plane * count;
    if (s != 1)
      for (int64_t k = 0; k < count; ++k) own[k] = (own[k] - means[k]) * s + means[k];
    if (c != 1)
      for (int64_t k = 0; k < count; ++k) own[k] = (own[k] - M) * c + M;
  }
}

// total += the adjoint of `colour` at q.
template <class T>
void add_colour_adjoint(const Parameters& p, int64_t C, int64_t count, const T* q, T* means, T* total) {
  const T s = static_cast<T>(p.saturation), c = static_cast<T>(p.contrast);
  if (s == 1 && c == 1) {
    for (int64_t k = 0; k < C * count; ++k) total[k] += q[k];
    return;
  }
  channel_means(q, C, count, means);
  const T M = sum<T>(count, [&](int64_t k) PYDISTILL_LAMBDA { return means[k]; }) / static_cast<T>(count);
  const T own = c * s, shared = c * (1 - s), constant = (1 - c) * M;
  for (int64_t k = 0; k < count; ++k) means[k] = shared * means[k] + constant;
  for (int64_t plane = 0; plane < C; ++plane)
    for (int64_t k = 0; k < count; ++k) total[plane * count + k] += own * q[plane * count + k] + means[k];
}

PYDISTILL_INLINE bool moves(const Parameters& p) {
  return p.crop_y || p.crop_x || (p.cutout_bottom > p.cutout_top && p.cutout_right > p.cutout_left) || p.flip ||
         p.mirrored;
}

// Mirror, crop, cutout and flip as runs of adjacent elements: `run(to, from, step, count)` for results to, to + 1, ...
// that come from from, from + step, ... in a plane. Results in no run are zero.
template <class Run>
PYDISTILL_INLINE void for_each_run(const Parameters& p, int64_t H, int64_t W, Run run) {
  const int64_t step = p.flip != p.mirrored ? -1 : 1;
  const int64_t first = p.crop_x < 0 ? -p.crop_x : 0, last = p.crop_x > 0 ? W - p.crop_x : W;
  for (int64_t i = 0; i < H; ++i) {
    const int64_t source = i + p.crop_y;
    if (source < 0 || source >= H) continue;
    const auto columns = [&](int64_t begin, int64_t end) PYDISTILL_LAMBDA {  // of the result before its flip
      if (begin >= end) return;
      const int64_t leftmost = p.flip ? end - 1 : begin;  // of them, in the result
      const int64_t to = p.flip ? W - end : begin, from = leftmost + p.crop_x;
      run(i * W + to, source * W + (p.mirrored ? W - 1 - from : from), step, end - begin);
    };
    const bool cut = i >= p.cutout_top && i < p.cutout_bottom && p.cutout_left < p.cutout_right;
    columns(first, cut && p.cutout_left < last ? p.cutout_left : last);
    if (cut) columns(p.cutout_right > first ? p.cutout_right : first, last);
  }
}

template <class T>
void place(const Parameters& p, int64_t C, int64_t H, int64_t W, const T* x, T* y) {
  for (int64_t k = 0; k < C * H * W; ++k) y[k] = 0;
  for_each_run(p, H, W, [&](int64_t to, int64_t from, int64_t step, int64_t count) PYDISTILL_LAMBDA {
    for (int64_t c = 0; c < C; ++c) {
      T* const t = y + c * H * W + to;
      const T* const f = x + c * H * W + from;
      if (step == 1)
        for (int64_t k = 0; k < count; ++k) t[k] = f[k];
      else
        for (int64_t k = 0; k < count; ++k) t[k] = f[-k];
    }
  });
}

template <class T>
void place_adjoint(const Parameters& p, int64_t C, int64_t H, int64_t W, const T* y, T* x) {
  for (int64_t k = 0; k < C * H * W; ++k) x[k] = 0;
  for_each_run(p, H, W, [&](int64_t to, int64_t from, int64_t step, int64_t count) PYDISTILL_LAMBDA {
    for (int64_t c = 0; c < C; ++c) {
      const T* const t = y + c * H * W + to;
      T* const f = x + c * H * W + from;
      if (step == 1)
        for (int64_t k = 0; k < count; ++k) f[k] = t[k];
      else
        for (int64_t k = 0; k < count; ++k) f[-k] = t[k];
    }
  });
}

}  // namespace
}  // namespace pydistill
