// CPU body: see conv2d_weight_grad.h for what is computed and winograd.h for the transforms.
#include "conv2d_weight_grad.h"
#include "frozen_conv2d_points.h"
#include "vocabulary/cpu_vocabulary.h"
#include "vocabulary/matrix_product.h"
#include "vocabulary/storage_registers.h"

namespace pydistill {
namespace {

constexpr int kPoints = Winograd::kPoints;

template <class T, int TAPS>
class WeightGrad {
  using R = Register<T>;
  using Call = Conv2dWeightGrad;
  static constexpr int L = Lanes<T>::count, kLanes = Registers<T>::lanes, SIDE = 7 - TAPS;

 public:
  WeightGrad(const Call& call, void* scratch)
      : call(call),
        H(call.H),
        W(call.W),
        C(call.C),
        K(call.K),
        x_plane(call.x_plane() * L),
        grad_plane(call.grad_plane() * L),
        sum_plane(call.sum_plane() * L),
        xs(static_cast<T*>(scratch)),
        grads(xs + kPoints * x_plane),
        sums(grads + kPoints * grad_plane),
        zeros(sums + kPoints * sum_plane) {
    for (int64_t i = 0; i < (C > K ? C : K); ++i) zeros[i] = 0;
  }

  void run(int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t slot = unit / call.blocks(), block = unit % call.blocks();
      c = block / call.blocks_of_grad() * Call::kChannels, k = block % call.blocks_of_grad() * Call::kVectors * L;
      channels = C - c < Call::kChannels ? C - c : Call::kChannels;
      columns = K - k < Call::kVectors * L ? K - k : Call::kVectors * L;
      const int64_t first = call.tiles() * slot / call.slots, last = call.tiles() * (slot + 1) / call.slots;
      for (int64_t t = first; t < last; t += Call::kChunk) {
        const int64_t count = last - t < Call::kChunk ? last - t : Call::kChunk;
        transform(t, count);
        for (int64_t p = 0; p < kPoints; ++p)
          multiply<T>(channels, count, vectors(), {xs + p * x_plane, 1, Call::kChannels},
                      {grads + p * grad_plane, Call::kVectors * L, L, false},
                      {sums + p * sum_plane, Call::kVectors * L, L, t > first});
      }
      put(static_cast<T*>(call.sums) + slot * K * C * TAPS * TAPS);
    }
  }

 private:
  const Call& call;
  const int64_t H, W, C, K, x_plane, grad_plane, sum_plane;
  T *const xs, *const grads, *const sums;           // [36][tiles][channels], twice, and [36][channels][columns]
  T* const zeros;                                   // a pixel outside the image
  int64_t c = 0, k = 0, channels = 0, columns = 0;  // of the block

  int64_t vectors() const { return (columns + L - 1) / L; }
  PYDISTILL_INLINE static bool inside(int64_t position, int64_t size) { return position >= 0 && position < size; }

  void transform(int64_t first, int64_t count) {
    const int64_t across = call.columns(), plane = call.rows() * across, of_pair = call.N * plane;
    for (int64_t t = 0; t < count; ++t) {
      const int64_t tile = first + t, pair = tile / of_pair, n = tile % of_pair / plane;
      const int64_t h = tile % plane / across * SIDE, w = tile % across * SIDE;
      transform_x(static_cast<const T*>(call.x[pair]) + n * H * W * C, h - TAPS / 2, w - TAPS / 2, t);
      transform_grad(static_cast<const T*>(call.grad[pair]) + n * H * W * K, h, w, t);
    }
  }

  // Pixels of a tile, with zeros outside the image.
  template <int SIZE>
  PYDISTILL_INLINE void find(const T* image, int64_t top, int64_t left, int64_t channels_of_image,
                             const T* (&pixels)[SIZE][SIZE]) const {
#pragma GCC unroll 6
    for (int i = 0; i < SIZE; ++i)
#pragma GCC unroll 6
      for (int j = 0; j < SIZE; ++j)
        pixels[i][j] =
            inside(top + i, H) & inside(left + j, W) ? image + ((top + i) * W + left + j) * channels_of_image : zeros;
  }

  __attribute__((noinline)) void transform_x(const T* image, int64_t top, int64_t left, int64_t t) {
    const T* pixels[6][6];
    find<6>(image, top, left, C, pixels);
    T* const to = xs + t * Call::kChannels;
    int64_t i = 0;
    for (; i + kLanes <= channels; i += kLanes)
      transform_tile<6>(to + i, x_plane, Winograd::input<T>,
                        [&](int a, int b) PYDISTILL_LAMBDA { return load_register(pixels[a][b] + c + i); });
    if (const int64_t rest = channels - i)
      transform_tile<6>(to + i, x_plane, Winograd::input<T>,
                        [&](int a, int b) PYDISTILL_LAMBDA { return widened_register<T>(pixels[a][b] + c + i, rest); });
  }

  __attribute__((noinline)) void transform_grad(const T* image, int64_t top, int64_t left, int64_t t) {
    const T* pixels[SIDE][SIDE];
    find<SIDE>(image, top, left, K, pixels);
    T* const to = grads + t * Call::kVectors * L;
    for (int64_t i = 0; i < vectors() * L; i += kLanes) {
      if (i + kLanes <= columns)
        transform_tile<SIDE>(to + i, grad_plane, output_adjoint<T, SIDE>,
                             [&](int a, int b) PYDISTILL_LAMBDA { return load_register(pixels[a][b] + k + i); });
      else
        transform_tile<SIDE>(to + i, grad_plane, output_adjoint<T, SIDE>, [&](int a, int b) PYDISTILL_LAMBDA {
          return i < columns ? widened_register<T>(pixels[a][b] + k + i, columns - i) : R{};
        });
    }
  }

  template <int FROM, class One, class Pixel>
  PYDISTILL_INLINE static void transform_tile(T* to, int64_t plane, One one, Pixel pixel) {
    R half[6][FROM];
#pragma GCC unroll 6
    for (int j = 0; j < FROM; ++j) {
      R column[FROM], out[6];
#pragma GCC unroll 6
      for (int i = 0; i < FROM; ++i) column[i] = pixel(i, j);
      one(column, out);
#pragma GCC unroll 6
      for (int i = 0; i < 6; ++i) half[i][j] = out[i];
      in_order();
    }
#pragma GCC unroll 6
    for (int i = 0; i < 6; ++i) {
      R out[6];
      one(half[i], out);
#pragma GCC unroll 6
      for (int j = 0; j < 6; ++j) *reinterpret_cast<R*>(to + (6 * i + j) * plane) = out[j];
      in_order();
    }
  }

  // The block's sums as filters.
  __attribute__((noinline)) void put(T* out) const {
    constexpr int kTaps = TAPS * TAPS;
    for (int64_t row = 0; row < channels; ++row)
      for (int64_t i = 0; i < columns; i += kLanes) {
        const T* const from = sums + row * Call::kVectors * L + i;
        R half[TAPS][6];
        alignas(64) T taps[kTaps][kLanes];
#pragma GCC unroll 6
        for (int j = 0; j < 6; ++j) {
          R column[6], filter[TAPS];
#pragma GCC unroll 6
          for (int p = 0; p < 6; ++p) column[p] = *reinterpret_cast<const R*>(from + (6 * p + j) * sum_plane);
          filter_adjoint<T, TAPS>(column, filter);
#pragma GCC unroll 6
          for (int p = 0; p < TAPS; ++p) half[p][j] = filter[p];
          in_order();
        }
#pragma GCC unroll 6
        for (int p = 0; p < TAPS; ++p) {
          R filter[TAPS];
          filter_adjoint<T, TAPS>(half[p], filter);
#pragma GCC unroll 6
          for (int q = 0; q < TAPS; ++q) *reinterpret_cast<R*>(taps[p * TAPS + q]) = filter[q];
        }
        const int64_t lanes = columns - i < kLanes ? columns - i : kLanes;
        for (int64_t lane = 0; lane < lanes; ++lane) {
          T* const to = out + ((k + i + lane) * C + c + row) * kTaps;
#pragma GCC unroll 25
          for (int tap = 0; tap < kTaps; ++tap) to[tap] = taps[tap][lane];
        }
      }
  }
};

}  // namespace

void PYDISTILL_KERNEL(const Conv2dWeightGrad& call, int64_t begin, int64_t end, void* scratch) {
  with_number(call.scalar, [&](auto t) PYDISTILL_LAMBDA {
    using T = decltype(t);
    if (call.taps == 3) WeightGrad<T, 3>(call, scratch).run(begin, end);
    if (call.taps == 5) WeightGrad<T, 5>(call, scratch).run(begin, end);
  });
}

}  // namespace pydistill
