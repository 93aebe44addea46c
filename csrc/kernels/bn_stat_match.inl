// CPU body: see bn_stat_match.h for what is computed. Two layouts have their own loops: adjacent channels (rows, one
// lane per channel, whose sums stay in the nearest cache) and adjacent positions (planes, summed in the same number of
// parts in every instruction set). All others go element by element. The order of additions depends on neither threads
// nor register width, hence equal bits across both.
#include "bn_stat_match.h"
#include "vocabulary/cpu_vocabulary.h"
#include "vocabulary/storage_registers.h"

namespace pydistill {
namespace {

using Call = BnStatMatch;
using Planes = Call::Planes;

constexpr int64_t kPanel = Call::kPanel;

// V is a register of T, or T itself for the remainder: both are computed alike.
template <class V, class T, class S>
PYDISTILL_INLINE V load_lanes(const S* p) {
  if constexpr (sizeof(V) == sizeof(T))
    return widen(*p);
  else
    return widened_register<T>(p);
}

template <class V, class T, class S>
PYDISTILL_INLINE void store_lanes(S* p, V v) {
  if constexpr (sizeof(V) == sizeof(T))
    narrow(v, *p);
  else
    store_narrowed_register<T>(p, v);
}

template <class V>
PYDISTILL_INLINE V opened(V argument, V value) {  // zero where the ReLU is closed; NaN passes, as in torch
  return argument <= V{} ? V{} : value;
}

template <class S>
PYDISTILL_INLINE S* at(const Planes& planes, int64_t n, int64_t c, int64_t p) {
  return planes.data ? static_cast<S*>(planes.data) + n * planes.n + c * planes.c + p * planes.p : nullptr;
}

template <class T>
PYDISTILL_INLINE const T* channels(const void* values) {
  return static_cast<const T*>(values);
}

// What a call does with an element, known at compile time: the frozen BatchNorm, a residual, a ReLU.
template <bool kNorm, bool kResidual, bool kRelu>
struct Steps {
  static constexpr bool norm = kNorm, residual = kResidual, relu = kRelu;
};

// One tile of one panel of channels.
struct Tile {
  int64_t n, begin, end, first_channel, last_channel;
};

template <class How, class V, class T, class S>
PYDISTILL_INLINE V affine(V x, V scale, V shift, const S* residual) {
  V y = x * scale + shift;
  if constexpr (How::residual) y += load_lanes<V, T>(residual);
  return y;
}

template <class How, class V, class T, class S>
PYDISTILL_INLINE void write_y(V x, V scale, V shift, const S* residual, S* y) {
  V value = affine<How, V, T>(x, scale, shift, residual);
  if constexpr (How::relu) value = opened(value, value);
  store_lanes<V, T>(y, value);
}

template <class How, class V, class T, class S>
PYDISTILL_INLINE void write_gradient(V x, V mean, V scale, V shift, V level, V slope, const S* residual,
                                     const S* grad_y, S* grad_x, S* grad_residual) {
  V grad = level + slope * (x - mean);
  if constexpr (How::norm) {
    V g = load_lanes<V, T>(grad_y);
    if constexpr (How::relu) g = opened(affine<How, V, T>(x, scale, shift, residual), g);
    if constexpr (How::residual) store_lanes<V, T>(grad_residual, g);
    grad = scale * g + grad;
  }
  store_lanes<V, T>(grad_x, grad);
}

// R rows of lanes from channel c on: their sums are added to those of the tile.
template <class How, class V, int R, class T, class S>
PYDISTILL_INLINE void sum_rows(const Call& call, int64_t c, const S* x, const S* residual, S* y, T* partial) {
  const V first = load_lanes<V, T>(partial + c);
  V scale{}, shift{};
  if constexpr (How::norm) {
    scale = load_lanes<V, T>(channels<T>(call.scale) + c);
    shift = load_lanes<V, T>(channels<T>(call.shift) + c);
  }
  V d[R];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    const V v = load_lanes<V, T>(x + r * call.x.p + c);
    d[r] = v - first;
    if constexpr (How::norm)
      write_y<How, V, T>(v, scale, shift, How::residual ? residual + r * call.residual.p + c : nullptr,
                         y + r * call.y.p + c);
  }
  T *const sum = partial + call.C + c, *const squares = sum + call.C;
  if constexpr (R == 4) {
    store_lanes<V, T>(sum, load_lanes<V, T>(sum) + ((d[0] + d[1]) + (d[2] + d[3])));
    store_lanes<V, T>(squares, load_lanes<V, T>(squares) + ((d[0] * d[0] + d[1] * d[1]) + (d[2] * d[2] + d[3] * d[3])));
  } else {
    store_lanes<V, T>(sum, load_lanes<V, T>(sum) + d[0]);
    store_lanes<V, T>(squares, load_lanes<V, T>(squares) + d[0] * d[0]);
  }
}

template <class How, int R, class T, class S>
PYDISTILL_INLINE void sum_rows_of_panel(const Call& call, const Tile& tile, int64_t p, T* partial) {
  constexpr int L = Registers<T>::lanes;
  const S *const x = at<S>(call.x, tile.n, 0, p), *const residual = at<S>(call.residual, tile.n, 0, p);
  S* const y = at<S>(call.y, tile.n, 0, p);
  int64_t c = tile.first_channel;
  for (; c + L <= tile.last_channel; c += L) sum_rows<How, Register<T>, R>(call, c, x, residual, y, partial);
  for (; c < tile.last_channel; ++c) sum_rows<How, T, R>(call, c, x, residual, y, partial);
}

template <class How, class T, class S>
void forward_rows(const Call& call, const Tile& tile, T* partial) {
  const S* const x = at<S>(call.x, tile.n, 0, tile.begin);
  for (int64_t c = tile.first_channel; c < tile.last_channel; ++c) {
    partial[c] = widen(x[c]);
    partial[call.C + c] = partial[2 * call.C + c] = T(0);
  }
  int64_t p = tile.begin;
  for (; p + 4 <= tile.end; p += 4) sum_rows_of_panel<How, 4, T, S>(call, tile, p, partial);
  for (; p < tile.end; ++p) sum_rows_of_panel<How, 1, T, S>(call, tile, p, partial);
}

template <class How, class T, class S>
void backward_rows(const Call& call, const Tile& tile, const T* level, const T* slope) {
  constexpr int L = Registers<T>::lanes;
  const T *const mean = channels<T>(call.mean), *const scale = channels<T>(call.scale),
                 *const shift = channels<T>(call.shift);
  for (int64_t p = tile.begin; p < tile.end; ++p) {
    const S *const x = at<S>(call.x, tile.n, 0, p), *const residual = at<S>(call.residual, tile.n, 0, p),
                   *const grad_y = at<S>(call.grad_y, tile.n, 0, p);
    S *const grad_x = at<S>(call.grad_x, tile.n, 0, p), *const grad_residual = at<S>(call.grad_residual, tile.n, 0, p);
    const auto step = [&]<class V>(V, int64_t c) PYDISTILL_LAMBDA {
      V scale_c{}, shift_c{};
      if constexpr (How::norm) scale_c = load_lanes<V, T>(scale + c), shift_c = load_lanes<V, T>(shift + c);
      write_gradient<How, V, T>(load_lanes<V, T>(x + c), load_lanes<V, T>(mean + c), scale_c, shift_c,
                                load_lanes<V, T>(level + c - tile.first_channel),
                                load_lanes<V, T>(slope + c - tile.first_channel),
                                How::residual ? residual + c : nullptr, How::norm ? grad_y + c : nullptr, grad_x + c,
                                How::residual ? grad_residual + c : nullptr);
    };
    int64_t c = tile.first_channel;
    for (; c + L <= tile.last_channel; c += L) step(Register<T>{}, c);
    for (; c < tile.last_channel; ++c) step(T{}, c);
  }
}

// A channel of a tile, positions `stride` apart: in W partial sums if they are adjacent, otherwise in one.
template <class How, class T, class S>
void forward_plane(const Call& call, const Tile& tile, int64_t c, bool neighbours, T* partial) {
  using V = Register<T>;
  constexpr int L = Registers<T>::lanes, W = 128 / sizeof(T), Q = W / L;
  const S *const x = at<S>(call.x, tile.n, c, tile.begin), *const residual =
                                                               at<S>(call.residual, tile.n, c, tile.begin);
  S* const y = at<S>(call.y, tile.n, c, tile.begin);
  const int64_t length = tile.end - tile.begin;
  const T first = widen(x[0]);
  T scale{}, shift{};
  if constexpr (How::norm) scale = channels<T>(call.scale)[c], shift = channels<T>(call.shift)[c];

  T sums[W] = {}, squares[W] = {};
  int64_t i = 0;
  if (neighbours) {
    V sum[Q] = {}, square[Q] = {};
    for (; i + W <= length; i += W) {
#pragma GCC unroll 8
      for (int q = 0; q < Q; ++q) {
        const int64_t j = i + q * L;
        const V v = load_lanes<V, T>(x + j), d = v - first;
        sum[q] += d;
        square[q] += d * d;
        if constexpr (How::norm)
          write_y<How, V, T>(v, V{} + scale, V{} + shift, How::residual ? residual + j : nullptr, y + j);
      }
    }
    __builtin_memcpy(sums, sum, sizeof(sums));
    __builtin_memcpy(squares, square, sizeof(squares));
  }
  for (int lane = 0; i < length; ++i, lane = (lane + 1) % W) {
    const T v = widen(x[i * call.x.p]), d = v - first;
    sums[lane] += d;
    squares[lane] += d * d;
    if constexpr (How::norm)
      write_y<How, T, T>(v, scale, shift, How::residual ? residual + i * call.residual.p : nullptr, y + i * call.y.p);
  }
  for (int half = W / 2; half; half /= 2)
    for (int lane = 0; lane < half; ++lane) sums[lane] += sums[lane + half], squares[lane] += squares[lane + half];
  partial[c] = first, partial[call.C + c] = sums[0], partial[2 * call.C + c] = squares[0];
}

template <class How, class T, class S>
void backward_plane(const Call& call, const Tile& tile, int64_t c, bool neighbours, T level, T slope) {
  constexpr int L = Registers<T>::lanes;
  const S *const x = at<S>(call.x, tile.n, c, tile.begin),
                 *const residual = at<S>(call.residual, tile.n, c, tile.begin),
                 *const grad_y = at<S>(call.grad_y, tile.n, c, tile.begin);
  S *const grad_x = at<S>(call.grad_x, tile.n, c, tile.begin), *const grad_residual =
                                                                   at<S>(call.grad_residual, tile.n, c, tile.begin);
  const T mean = channels<T>(call.mean)[c];
  T scale{}, shift{};
  if constexpr (How::norm) scale = channels<T>(call.scale)[c], shift = channels<T>(call.shift)[c];
  const auto step = [&]<class V>(V zero, int64_t i) PYDISTILL_LAMBDA {
    write_gradient<How, V, T>(load_lanes<V, T>(x + i * call.x.p), zero + mean, zero + scale, zero + shift, zero + level,
                              zero + slope, How::residual ? residual + i * call.residual.p : nullptr,
                              How::norm ? grad_y + i * call.grad_y.p : nullptr, grad_x + i * call.grad_x.p,
                              How::residual ? grad_residual + i * call.grad_residual.p : nullptr);
  };
  const int64_t length = tile.end - tile.begin;
  int64_t i = 0;
  if (neighbours)
    for (; i + L <= length; i += L) step(Register<T>{}, i);
  for (; i < length; ++i) step(T{}, i);
}

template <class How, class T, class S>
void run_tile(const Call& call, const Tile& tile, int64_t index) {
  bool rows = true, planes = true;
  const Planes* const all[] = {&call.x, &call.residual, &call.y, &call.grad_y, &call.grad_x, &call.grad_residual};
  for (const Planes* each : all) {
    rows &= !each->data || each->c == 1;
    planes &= !each->data || each->p == 1;
  }
  rows &= !(planes && call.C == 1);
  if (call.pass == Call::Pass::tiles) {
    T* const partial = static_cast<T*>(call.partial) + index * 3 * call.C;
    if (rows) return forward_rows<How, T, S>(call, tile, partial);
    for (int64_t c = tile.first_channel; c < tile.last_channel; ++c)
      forward_plane<How, T, S>(call, tile, c, planes, partial);
    return;
  }
  T level[kPanel], slope[kPanel];
  const T* const of_mean = channels<T>(call.grad_statistics);
  const T count = static_cast<T>(call.M);
  for (int64_t c = tile.first_channel; c < tile.last_channel; ++c) {
    level[c - tile.first_channel] = of_mean[c] / count;
    slope[c - tile.first_channel] = T(2) * of_mean[call.C + c] / count;
  }
  if (rows) return backward_rows<How, T, S>(call, tile, level, slope);
  for (int64_t c = tile.first_channel; c < tile.last_channel; ++c)
    backward_plane<How, T, S>(call, tile, c, planes, level[c - tile.first_channel], slope[c - tile.first_channel]);
}

template <class T, class S>
void run_unit(const Call& call, const Tile& tile, int64_t index) {
  const bool norm = call.pass == Call::Pass::tiles ? call.y.data != nullptr : call.grad_y.data != nullptr;
  const bool residual = call.residual.data != nullptr;
  if (!norm) return run_tile<Steps<false, false, false>, T, S>(call, tile, index);
  if (residual && call.relu) return run_tile<Steps<true, true, true>, T, S>(call, tile, index);
  if (residual) return run_tile<Steps<true, true, false>, T, S>(call, tile, index);
  if (call.relu) return run_tile<Steps<true, false, true>, T, S>(call, tile, index);
  run_tile<Steps<true, false, false>, T, S>(call, tile, index);
}

// Mean and variance of a panel of channels, from those of the tiles in order, in double.
template <class T>
void merge_panel(const Call& call, int64_t first_channel, int64_t last_channel) {
  const int64_t C = call.C, tiles = call.tiles(), of_sample = call.tiles_of_sample();
  const int64_t last = call.P - (of_sample - 1) * call.tile;  // positions in a sample's last tile
  const double count = static_cast<double>(call.M);
  double mean[kPanel] = {}, squares[kPanel] = {};
  const auto each_tile = [&](auto body) PYDISTILL_LAMBDA {
    for (int64_t t = 0; t < tiles; ++t) {
      const double size = static_cast<double>(t % of_sample == of_sample - 1 ? last : call.tile), inverse = 1 / size;
      const T* const first = static_cast<const T*>(call.partial) + t * 3 * C;
      for (int64_t c = first_channel; c < last_channel; ++c)
        body(c - first_channel, size, inverse, static_cast<double>(first[c]), static_cast<double>(first[C + c]),
             static_cast<double>(first[2 * C + c]));
    }
  };
  each_tile([&](int64_t i, double size, double, double first, double sum, double)
                PYDISTILL_LAMBDA { mean[i] += size * first + sum; });
  for (double& m : mean) m /= count;
  each_tile([&](int64_t i, double size, double inverse, double first, double sum, double square) PYDISTILL_LAMBDA {
    const double apart = first + sum * inverse - mean[i];
    squares[i] += (square - sum * sum * inverse) + size * apart * apart;
  });
  T *const statistics = static_cast<T*>(call.statistics), *const kept = static_cast<T*>(call.kept_mean);
  for (int64_t c = first_channel; c < last_channel; ++c) {
    statistics[c] = kept[c] = static_cast<T>(mean[c - first_channel]);
    const double var = squares[c - first_channel] / count;
    statistics[C + c] = static_cast<T>(var < 0 ? 0 : var);  // rounding may make that of a constant negative
  }
}

}  // namespace

// Units [begin, end): panels of channels, times tiles except in the merge.
void PYDISTILL_KERNEL(const BnStatMatch& call, int64_t begin, int64_t end) {
  const int64_t panels = (call.C + kPanel - 1) / kPanel, of_sample = call.tiles_of_sample();
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t first = unit % panels * kPanel, index = unit / panels;
    const int64_t last = first + kPanel < call.C ? first + kPanel : call.C;
    if (call.pass == Call::Pass::merge) {
      with_number(call.scalar, [&](auto t) PYDISTILL_LAMBDA { merge_panel<decltype(t)>(call, first, last); });
      continue;
    }
    const int64_t position = index % of_sample * call.tile, behind = position + call.tile;
    const Tile tile{index / of_sample, position, behind < call.P ? behind : call.P, first, last};
    with_types(call.scalar,
               [&](auto t, auto s) PYDISTILL_LAMBDA { run_unit<decltype(t), decltype(s)>(call, tile, index); });
  }
}

}  // namespace pydistill
