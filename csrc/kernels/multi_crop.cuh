// The crops of a batch on CUDA; multi_crop.h says what is computed.
//
// A thread makes all channels of a result's pixel straight from the images' pixels that its filters reach: nothing in
// between is stored. The adjoint gathers too: a thread owns a pixel of an image and visits the records' parts in order
// and the places whose filters reach it, so nothing is added atomically. Filters are in integers (see multi_crop.h), so
// that both directions agree on every weight to the last bit.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <type_traits>

#include "multi_crop.h"
#include "vocabulary/cuda_vocabulary.h"

namespace pydistill::multi_crop {

using Call = MultiCrop;
using Form = Call::Form;

constexpr int threads = 256, channels_at_once = 3;

// 80 registers per thread (128 for double): with fewer it spills.
template <class T>
constexpr int blocks_at_once = std::is_same_v<T, double> ? 2 : 3;

struct Span {
  int begin, end;
};

// A part's row of the record, in the words of the loops below.
struct Part {
  int source, top, left, height, width;
  bool flip, valid;
  int roll_y, roll_x;  // from 0 up to the resized crop's size
  int to_top, to_left, to_bottom, to_right;
  int rows, columns, origin_y, origin_x;  // of the resized crop, and where it begins in the result
  float alpha;
};

__device__ inline Part part_of(const Call& call, int64_t b, int64_t p) {
  const float* const row = call.record + b * call.record_row + p * call.record_part;
  const auto value = [&](Call::Column column) { return global_load(row + column * call.record_column); };
  bool finite = true;
  const auto whole = [&](Call::Column column) {
    const float v = value(column), limit = 1e9f;
    const bool ordinary = v > -limit && v < limit;
    finite = finite && ordinary;
    return ordinary ? static_cast<int>(v) : -1;
  };
  Part part;
  part.source = whole(Call::source), part.top = whole(Call::top), part.left = whole(Call::left);
  part.height = whole(Call::height), part.width = whole(Call::width);
  whole(Call::flip), part.flip = value(Call::flip) != 0;
  part.to_top = whole(Call::to_top), part.to_left = whole(Call::to_left);
  const int to_height = whole(Call::to_height), to_width = whole(Call::to_width);
  const int roll_y = whole(Call::roll_y), roll_x = whole(Call::roll_x);
  whole(Call::fit);
  const bool fit = value(Call::fit) != 0;
  part.alpha = value(Call::alpha);
  // differences, which do not overflow
  const auto within = [](int begin, int length, int size) {
    return begin >= 0 && begin <= size && length >= 0 && length <= size - begin;
  };
  const int H = static_cast<int>(call.H), W = static_cast<int>(call.W);
  const int h = static_cast<int>(call.height_out), w = static_cast<int>(call.width_out);
  part.valid = finite && part.source >= 0 && part.source < call.N && part.height > 0 && part.width > 0 &&
               within(part.top, part.height, H) && within(part.left, part.width, W) &&
               within(part.to_top, to_height, h) && within(part.to_left, to_width, w);
  if (!part.valid) return part;
  part.to_bottom = part.to_top + to_height, part.to_right = part.to_left + to_width;
  part.rows = fit ? to_height : h, part.columns = fit ? to_width : w;
  part.origin_y = fit ? part.to_top : 0, part.origin_x = fit ? part.to_left : 0;
  part.roll_y = part.rows ? roll_y % part.rows : 0, part.roll_x = part.columns ? roll_x % part.columns : 0;
  part.roll_y += part.roll_y < 0 ? part.rows : 0, part.roll_x += part.roll_x < 0 ? part.columns : 0;
  return part;
}

__device__ inline bool sees(const Part& part, int i, int j) {
  return i >= part.to_top && i < part.to_bottom && j >= part.to_left && j < part.to_right;
}

// One axis of a crop: `in` pixels become `size` places.
struct Filter {
  int in, size, most;

  __device__ Filter(int in, int size) : in(in), size(size), most(in > size ? in : size) {}

  __device__ int weight(int x, int r) const {
    const int off = (2 * x + 1) * size - (2 * r + 1) * in;
    const int q = 2 * most - (off < 0 ? -off : off);
    return q > 0 ? q : 0;
  }

  // Of the `count` pixels or places on one axis, `step` wide each, those within reach of `centre`.
  __device__ Span near(int centre, int step, int count) const {
    const int below = centre - 2 * most + step, above = centre + 2 * most + step - 1;
    const int begin = below > 0 ? below / (2 * step) : 0, end = above / (2 * step);
    return {begin, end < count ? end : count};
  }
  __device__ Span pixels(int r) const { return near((2 * r + 1) * in, size, in); }
  __device__ Span places(int x) const { return near((2 * x + 1) * size, in, size); }

  __device__ int total(int r) const {
    int total = 0;
    const Span span = pixels(r);
    for (int x = span.begin; x < span.end; ++x) total += weight(x, r);
    return total;
  }
  // Not times an inverse, which may not be exactly one where the whole weight is one pixel's.
  template <class A>
  __device__ A share(int x, int r, int total) const {
    return static_cast<A>(weight(x, r)) / static_cast<A>(total);
  }
};

// The place of the resized crop that place k of the result shows, and back.
__device__ inline int shown(int k, int origin, int roll, int size, bool mirrored) {
  int r = k - origin - roll;
  r += r < 0 ? size : 0;
  return mirrored ? size - 1 - r : r;
}
__device__ inline int showing(int r, int origin, int roll, int size, bool mirrored) {
  int k = (mirrored ? size - 1 - r : r) + roll;
  k -= k >= size ? size : 0;
  return k + origin;
}

template <class T, Form form>
__global__ void __launch_bounds__(threads, blocks_at_once<T>) kernel(const Call call) {
  using A = Accumulator<T>;
  constexpr bool forward = form == Form::forward;
  const int H = static_cast<int>(forward ? call.height_out : call.H);
  const int W = static_cast<int>(forward ? call.width_out : call.W);
  const int64_t pixels = int64_t{H} * W, tiles = (pixels + threads - 1) / threads;
  const int64_t n = blockIdx.x / tiles, pixel = blockIdx.x % tiles * threads + threadIdx.x;
  if (pixel >= pixels) return;  // no barrier follows
  const int i = static_cast<int>(pixel / W), j = static_cast<int>(pixel % W);

  const auto load = [&](const Map& map, int64_t m, int64_t c, int y, int x) {
    return widen(global_load(static_cast<const T*>(map.data) + m * map.n + c * map.c + y * map.h + x * map.w));
  };
  // How much of a record's part p is seen under the parts after it.
  const auto seen_through = [&](int64_t b, int64_t p, int y, int x) {
    A weight = 1;
    for (int64_t q = p + 1; q < call.parts; ++q) {
      const Part over = part_of(call, b, q);
      if (sees(over, y, x)) weight *= 1 - static_cast<A>(over.alpha);
    }
    return weight;
  };
  const auto all_valid = [&](int64_t b) {
    bool valid = true;
    for (int64_t p = 0; p < call.parts; ++p) valid = part_of(call, b, p).valid && valid;
    return valid;
  };

  const bool valid = !forward || all_valid(n);
  for (int64_t first = 0; first < call.C; first += channels_at_once) {
    A sum[channels_at_once] = {};
    if constexpr (forward) {
      for (int64_t p = 0; valid && p < call.parts; ++p) {
        const Part part = part_of(call, n, p);
        if (!sees(part, i, j)) continue;
        const A seen = static_cast<A>(part.alpha) * seen_through(n, p, i, j);
        if (seen == 0) continue;
        const Filter down(part.height, part.rows), across(part.width, part.columns);
        const int r = shown(i, part.origin_y, part.roll_y, part.rows, false);
        const int s = shown(j, part.origin_x, part.roll_x, part.columns, part.flip);
        const int total_y = down.total(r), total_x = across.total(s);
        const Span rows = down.pixels(r), columns = across.pixels(s);
        A own[channels_at_once] = {};
        for (int y = rows.begin; y < rows.end; ++y) {
          const A weight_y = down.share<A>(y, r, total_y);
          for (int x = columns.begin; x < columns.end; ++x) {
            const A weight = weight_y * across.share<A>(x, s, total_x);
            for (int l = 0; l < channels_at_once; ++l) {
              if (first + l >= call.C) continue;
              A v = load(call.from, part.source, first + l, part.top + y, part.left + x);
              if (call.base.data) v += load(call.base, 0, first + l, part.top + y, part.left + x);
              own[l] += weight * v;
            }
          }
        }
        for (int l = 0; l < channels_at_once; ++l) sum[l] += seen * own[l];
      }
    } else {
      for (int64_t k = 0; k < call.B * call.parts; ++k) {
        const int64_t b = k / call.parts, p = k % call.parts;
        if (!call.shared) {  // most parts are of other images: read no more than that
          const float source = global_load(call.record + b * call.record_row + p * call.record_part);
          if (!(source > -1 && source < static_cast<float>(call.N) && static_cast<int64_t>(source) == n)) continue;
        }
        const Part part = part_of(call, b, p);
        const int y = i - part.top, x = j - part.left;
        if (!part.valid || y < 0 || y >= part.height || x < 0 || x >= part.width) continue;
        if (part.rows == 0 || part.columns == 0 || !all_valid(b)) continue;
        const Filter down(part.height, part.rows), across(part.width, part.columns);
        const Span rows = down.places(y), columns = across.places(x);
        for (int r = rows.begin; r < rows.end; ++r) {
          const int to_y = showing(r, part.origin_y, part.roll_y, part.rows, false);
          if (to_y < part.to_top || to_y >= part.to_bottom) continue;
          const A weight_y = down.share<A>(y, r, down.total(r));
          for (int s = columns.begin; s < columns.end; ++s) {
            const int to_x = showing(s, part.origin_x, part.roll_x, part.columns, part.flip);
            if (to_x < part.to_left || to_x >= part.to_right) continue;
            const A seen = static_cast<A>(part.alpha) * seen_through(b, p, to_y, to_x);
            if (seen == 0) continue;
            const A weight = seen * (weight_y * across.share<A>(x, s, across.total(s)));
            for (int l = 0; l < channels_at_once; ++l) {
              if (first + l < call.C) sum[l] += weight * load(call.from, b, first + l, to_y, to_x);
            }
          }
        }
      }
    }
    for (int l = 0; l < channels_at_once; ++l) {
      const int64_t c = first + l;
      if (c >= call.C) continue;
      A value = valid ? sum[l] : A(NAN);
      if (call.norm) {
        const double mean = forward && !call.linear ? global_load(call.norm + c) : 0;
        value = (value - static_cast<A>(mean)) * static_cast<A>(1 / global_load(call.norm + call.C + c));
      }
      global_store(static_cast<T*>(call.to.data) + (n * call.C + c) * pixels + pixel, narrow<T>(value));
    }
  }
}

template <class T>
void launch_scalar(const Call& call, cudaStream_t stream) {
  const bool forward = call.form == Form::forward;
  const int64_t images = forward ? call.B : call.shared ? 1 : call.N;
  const int64_t pixels = forward ? call.height_out * call.width_out : call.H * call.W;
  const int64_t blocks = images * ((pixels + threads - 1) / threads);
  if (blocks == 0) return;
  if (blocks > 0x7FFFFFFF) throw std::invalid_argument("images: more than 2^31 blocks of pixels");
  const auto run = [&](void (*kernel)(Call)) {
    launch(kernel, dim3(static_cast<unsigned>(blocks)), dim3(threads), 0, stream, call);
  };
  forward ? run(&kernel<T, Form::forward>) : run(&kernel<T, Form::backward>);
}

}  // namespace pydistill::multi_crop

namespace pydistill {

inline void launch_multi_crop(const MultiCrop& call, cudaStream_t stream) {
  with_scalar(call.scalar, [&](auto zero) { multi_crop::launch_scalar<decltype(zero)>(call, stream); });
}

}  // namespace pydistill
