// The siamese augmentation on CUDA; augment.h says what is computed.
//
// One block owns an image. The colours are affine in a pixel and its image's mean, so they commute with the index
// arithmetic and the resamplings: a thread gathers a result's pixel straight from the image, at most four taps of the
// rotation with four of the scaling each, and mixes the channels afterwards. Nothing in between is stored. The adjoint
// gathers too: a thread visits the results whose taps could reach its pixel, so nothing is added atomically.
#pragma once

#include <cmath>
#include <cstdint>
#include <stdexcept>
#include <type_traits>

#include "augment.h"
#include "vocabulary/cuda_vocabulary.h"

namespace pydistill::augment {

using Call = Augment;
using Form = Call::Form;

constexpr int threads = 256, channels_at_once = 3;

constexpr int blocks_at_once = 2;  // 128 registers per thread: with fewer it spills

// An image's row of the record, in the words of the loops below.
template <class A>
struct Parameters {
  A brightness, saturation, contrast;
  int crop_y, crop_x, cutout_top, cutout_left, cutout_bottom, cutout_right;
  bool flip, mirrored;
  bool scales, rotates, finite;
  A scale_x, scale_y;
  A xx, xy, yx, yy;  // rotation: from the result's place about the centre to the source's
  A back_xx, back_xy, back_yx, back_yy, reach_x, reach_y;  // the inverse, and how far from a source its results can be
};

template <class A>
__device__ A between(A low, A value, A high) {  // a NaN comes out as low
  return value > low ? (value < high ? value : high) : low;
}

template <class A>
__device__ Parameters<A> parameters_of(const Call& call, int64_t n) {
  const auto value = [&](Call::Column column) {
    return global_load(call.record + n * call.record_row + column * call.record_column);
  };
  const auto whole = [&](Call::Column column, float limit) {
    return static_cast<int>(between(-limit, value(column), limit));
  };
  const A H = static_cast<A>(call.H), W = static_cast<A>(call.W);
  Parameters<A> p;
  p.brightness = call.linear ? 0 : value(Call::brightness);
  p.saturation = value(Call::saturation), p.contrast = value(Call::contrast);
  p.crop_y = whole(Call::crop_y, 1e6f), p.crop_x = whole(Call::crop_x, 1e6f);
  p.cutout_top = whole(Call::cutout_top, 1e6f), p.cutout_left = whole(Call::cutout_left, 1e6f);
  p.cutout_bottom = p.cutout_top + whole(Call::cutout_height, 1e8f);
  p.cutout_right = p.cutout_left + whole(Call::cutout_width, 1e8f);
  p.flip = value(Call::flip) != 0;
  p.mirrored = n >= call.N;
  p.scale_x = value(Call::scale_x), p.scale_y = value(Call::scale_y);
  const A angle = value(Call::angle);
  p.finite = 0 * (p.scale_x + p.scale_y + angle) == 0;
  p.scales = p.scale_x != 1 || p.scale_y != 1;
  p.rotates = angle != 0;
  // grid coordinates run from -1 to 1 between the centres of the outer pixels, or their outer edges
  const A across = call.align_corners ? W - 1 : W, down = call.align_corners ? H - 1 : H;
  const A sine = std::sin(angle), cosine = std::cos(angle);
  p.xx = p.yy = cosine;
  p.xy = down > 0 ? -sine * across / down : 0;
  p.yx = across > 0 ? sine * down / across : 0;
  const A determinant = p.xx * p.yy - p.xy * p.yx;
  if (std::abs(determinant) > A(1e-3)) {  // in an image of one row or column it can be any value up to 1
    p.back_xx = p.yy / determinant, p.back_xy = -p.xy / determinant;
    p.back_yx = -p.yx / determinant, p.back_yy = p.xx / determinant;
    p.reach_x = std::abs(p.back_xx) + std::abs(p.back_xy), p.reach_y = std::abs(p.back_yx) + std::abs(p.back_yy);
  } else {
    p.back_xx = p.back_xy = p.back_yx = p.back_yy = 0;
    p.reach_x = W, p.reach_y = H;
  }
  return p;
}

// A block's shared memory: parameters take too many registers, and a sine, for every thread to have its own.
template <class A>
struct Shared {
  Parameters<A> parameters[2];  // by copy
  A parts[threads / 32];
};

// Every thread gets the total of the block, with the same bits. Use once per kernel.
template <class A>
__device__ A sum_over_block(A* parts, A value) {
  for (int step = 16; step; step /= 2) value += __shfl_xor_sync(0xFFFFFFFF, value, step);
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = value;
  __syncthreads();
  A total = 0;
  for (int warp = 0; warp < threads / 32; ++warp) total += parts[warp];
  return total;
}

// The one or two sources of a place on an axis: the first one's index, and the weight of the second.
template <class A>
struct Tap {
  int index;
  A far;
};

template <class A>
__device__ Tap<A> tap(A at, int size) {
  at = between<A>(-2, at, static_cast<A>(size));  // beyond, both sources are outside the image
  const A index = std::floor(at);
  return {static_cast<int>(index), at - index};
}

// `visit(i, j, weight)` with every pixel that four taps about (y, x) reach inside an image of [H, W].
template <class A, class Visit>
__device__ void for_each_tap(A y, A x, int H, int W, Visit visit) {
  const Tap<A> down = tap(y, H), across = tap(x, W);
  for (int a = 0; a < 2; ++a) {
    const int i = down.index + a;
    if (i < 0 || i >= H) continue;
    for (int b = 0; b < 2; ++b) {
      const int j = across.index + b;
      if (j < 0 || j >= W) continue;
      visit(i, j, (a ? down.far : 1 - down.far) * (b ? across.far : 1 - across.far));
    }
  }
}

// `visit(i, j, weight)` with every pixel of the image that contributes to pixel (i, j) of the result.
template <class A, class Visit>
__device__ void for_each_source(const Parameters<A>& p, int H, int W, int i, int j, Visit visit) {
  const A centre_y = static_cast<A>(H - 1) / 2, centre_x = static_cast<A>(W - 1) / 2;
  const auto placed = [&](int row, int column, A weight) {
    if (p.flip) column = W - 1 - column;
    if (row >= p.cutout_top && row < p.cutout_bottom && column >= p.cutout_left && column < p.cutout_right) return;
    row += p.crop_y, column += p.crop_x;
    if (row < 0 || row >= H || column < 0 || column >= W) return;
    visit(row, p.mirrored ? W - 1 - column : column, weight);
  };
  const auto scaled = [&](int row, int column, A weight) {
    if (!p.scales) return placed(row, column, weight);
    for_each_tap(p.scale_y * (static_cast<A>(row) - centre_y) + centre_y,
                 p.scale_x * (static_cast<A>(column) - centre_x) + centre_x, H, W,
                 [&](int y, int x, A part) { placed(y, x, weight * part); });
  };
  if (!p.rotates) return scaled(i, j, A(1));
  const A v = static_cast<A>(i) - centre_y, u = static_cast<A>(j) - centre_x;
  for_each_tap(p.yx * u + p.yy * v + centre_y, p.xx * u + p.xy * v + centre_x, H, W, scaled);
}

struct Range {
  int begin, end;
};

// The places on an axis that are within `reach` of `at`, and perhaps one more at either end.
template <class A>
__device__ Range around(A at, A reach, int size) {
  const A last = static_cast<A>(size - 1);
  return {static_cast<int>(std::floor(between<A>(0, at - reach, last))),
          static_cast<int>(std::ceil(between<A>(0, at + reach, last))) + 1};
}

// The result of subtracting and adding an infinite mean again: NaN.
template <class A>
__device__ A nan_if_infinite(A mean) {
  return mean + 0 * mean;
}

template <class A>
__device__ A tent(A distance) {
  const A weight = 1 - std::abs(distance);
  return weight > 0 ? weight : 0;
}

// The places of an axis whose taps under `scale` reach `at`.
template <class A>
__device__ Range reached_by(A scale, int at, int size) {
  const A centre = static_cast<A>(size - 1) / 2, smallest = A(1e-6);
  if (std::abs(scale) < smallest) return {0, size};
  return around((static_cast<A>(at) - centre) / scale + centre, 1 / std::abs(scale), size);
}

// `visit(i, j, weight)` with every pixel of the result to which pixel (y, x) of the image contributes.
template <class A, class Visit>
__device__ void for_each_result(const Parameters<A>& p, int H, int W, int y, int x, Visit visit) {
  const A centre_y = static_cast<A>(H - 1) / 2, centre_x = static_cast<A>(W - 1) / 2;
  if (p.mirrored) x = W - 1 - x;
  const int row = y - p.crop_y, before_flip = x - p.crop_x;
  if (row < 0 || row >= H || before_flip < 0 || before_flip >= W) return;
  if (row >= p.cutout_top && row < p.cutout_bottom && before_flip >= p.cutout_left && before_flip < p.cutout_right) {
    return;
  }
  const int column = p.flip ? W - 1 - before_flip : before_flip;

  const auto rotated = [&](int r, int c, A weight) {
    if (!p.rotates) return visit(r, c, weight);
    const A v = static_cast<A>(r) - centre_y, u = static_cast<A>(c) - centre_x;
    const Range rows = around(p.back_yx * u + p.back_yy * v + centre_y, p.reach_y, H);
    const Range columns = around(p.back_xx * u + p.back_xy * v + centre_x, p.reach_x, W);
    for (int i = rows.begin; i < rows.end; ++i) {
      for (int j = columns.begin; j < columns.end; ++j) {
        const A down = static_cast<A>(i) - centre_y, across = static_cast<A>(j) - centre_x;
        const A part = tent(p.yx * across + p.yy * down - v) * tent(p.xx * across + p.xy * down - u);
        if (part > 0) visit(i, j, weight * part);
      }
    }
  };
  if (!p.scales) return rotated(row, column, A(1));
  const Range rows = reached_by(p.scale_y, row, H), columns = reached_by(p.scale_x, column, W);
  for (int r = rows.begin; r < rows.end; ++r) {
    const A down = tent(p.scale_y * (static_cast<A>(r) - centre_y) + centre_y - static_cast<A>(row));
    if (down == 0) continue;
    for (int c = columns.begin; c < columns.end; ++c) {
      const A across = tent(p.scale_x * (static_cast<A>(c) - centre_x) + centre_x - static_cast<A>(column));
      if (across > 0) rotated(r, c, down * across);
    }
  }
}

template <class T, Form form>
__global__ void __launch_bounds__(threads, blocks_at_once) kernel(const Call call) {
  using A = Accumulator<T>;
  const int64_t n = blockIdx.x, C = call.C;
  const int H = static_cast<int>(call.H), W = static_cast<int>(call.W), pixels = H * W;
  const int64_t of_image = form == Form::forward && n >= call.N ? n - call.N : n;
  const auto load = [&](int64_t image, int64_t c, int i, int j) {
    const Map& from = call.from;
    return widen(global_load(static_cast<const T*>(from.data) + image * from.n + c * from.c + i * from.h + j * from.w));
  };
  const auto store = [&](int64_t c, int pixel, A value) {
    global_store(static_cast<T*>(call.to.data) + (n * C + c) * pixels + pixel, narrow<T>(value));
  };
  const int copies = form == Form::forward ? 1 : static_cast<int>(call.copies);
  Shared<A>& shared = *reinterpret_cast<Shared<A>*>(dynamic_shared());
  if (static_cast<int>(threadIdx.x) < copies) {
    shared.parameters[threadIdx.x] = parameters_of<A>(call, n + static_cast<int>(threadIdx.x) * call.N);
  }
  __syncthreads();

  // What is added to each pixel of the result: in the forward, in proportion to its share of image.
  A part = 0, brightness = 0;
  bool finite = true, sums = false;
  for (int copy = 0; copy < copies; ++copy) {
    const Parameters<A>& p = shared.parameters[copy];
    finite = finite && p.finite;
    brightness = p.brightness;
    if (p.contrast == 1) continue;
    sums = true;
    const A factor = (1 - p.contrast) / (static_cast<A>(C) * static_cast<A>(pixels));
    for (int pixel = static_cast<int>(threadIdx.x); pixel < pixels; pixel += threads) {
      const int i = pixel / W, j = pixel % W;
      A weight = 1, total = 0;
      if constexpr (form == Form::backward) {
        weight = 0;
        for_each_source(p, H, W, i, j, [&](int, int, A w) { weight += w; });
      }
      for (int64_t c = 0; c < C; ++c) total += load(of_image + copy * call.N, c, i, j);
      part += factor * (weight * total);
    }
  }
  const A constant = sums ? nan_if_infinite(sum_over_block(shared.parts, part)) : A(0);

  for (int pixel = static_cast<int>(threadIdx.x); pixel < pixels; pixel += threads) {
    const int i = pixel / W, j = pixel % W;
    for (int64_t first = 0; first < C; first += channels_at_once) {
      A out[channels_at_once] = {};
      for (int copy = 0; copy < copies; ++copy) {
        const Parameters<A>& p = shared.parameters[copy];
        A own[channels_at_once] = {}, all = 0, weight = 0;
        const bool mixes = p.saturation != 1;
        const auto visit = [&](int y, int x, A w) {
          weight += w;
          for (int l = 0; l < channels_at_once; ++l) {
            if (first + l < C) own[l] += w * load(of_image + copy * call.N, first + l, y, x);
          }
          if (!mixes || C <= channels_at_once) return;
          for (int64_t c = 0; c < C; ++c) all += w * load(of_image + copy * call.N, c, y, x);
        };
        if constexpr (form == Form::forward)
          for_each_source(p, H, W, i, j, visit);
        else
          for_each_result(p, H, W, i, j, visit);
        if (C <= channels_at_once) {
          for (int l = 0; l < channels_at_once; ++l) all += own[l];
        }
        A alike = mixes ? p.contrast * (1 - p.saturation) * nan_if_infinite(all / static_cast<A>(C)) : A(0);
        if (form == Form::forward && weight != 0)
          alike += (constant + brightness) * weight;  // NaN only where the image is
        for (int l = 0; l < channels_at_once; ++l) out[l] += p.contrast * p.saturation * own[l] + alike;
      }
      for (int l = 0; l < channels_at_once; ++l) {
        if (first + l >= C) continue;
        const A sum = form == Form::backward && sums ? out[l] + constant : out[l];
        store(first + l, pixel, finite ? sum : A(NAN));
      }
    }
  }
}

template <class T>
void launch_scalar(const Call& call, cudaStream_t stream) {
  using A = Accumulator<T>;
  const int64_t images = call.form == Form::forward ? call.copies * call.N : call.N;
  if (images == 0) return;
  if (images > 0x7FFFFFFF) throw std::invalid_argument("images: more than 2^31");
  const auto run = [&](void (*kernel)(Call)) {
    launch(kernel, dim3(static_cast<unsigned>(images)), dim3(threads), sizeof(Shared<A>), stream, call);
  };
  call.form == Form::forward ? run(&kernel<T, Form::forward>) : run(&kernel<T, Form::backward>);
}

}  // namespace pydistill::augment

namespace pydistill {

inline void launch_augment(const Augment& call, cudaStream_t stream) {
  with_scalar(call.scalar, [&](auto zero) { augment::launch_scalar<decltype(zero)>(call, stream); });
}

}  // namespace pydistill
