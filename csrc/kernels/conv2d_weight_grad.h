// The gradient of a convolution with respect to its filters, as the CPU body receives it: Winograd's F(4x4, 3x3) or,
// with five taps per side, F(2x2, 5x5).
//
// out[k, c, i, j] = sum over n, h, w of x[n, h + i - taps / 2, w + j - taps / 2, c] grad[n, h, w, k], in channels-last
// memory with zeros around x; summed over up to two pairs of x and grad. At each of the 36 points the transformed tiles
// of x and of grad are multiplied, and the sum over all tiles is transformed back (winograd.h).
#pragma once

#include <cstdint>

#include "../common/scalar.h"

namespace pydistill {

struct Conv2dWeightGrad {
  Scalar scalar = Scalar::f32;  // f32 or f64
  int64_t N = 0, C = 0, K = 0, H = 0, W = 0;
  int64_t taps = 3;
  int64_t pairs = 1;
  const void* x[2] = {};     // [N][H][W][C]
  const void* grad[2] = {};  // [N][H][W][K]
  // [slots][K][C][taps][taps]: of a slot's share of the tiles. The result is the sum over slots, whatever the threads.
  void* sums = nullptr;
  int64_t slots = 1;

  // A unit of work is a slot and a block of channels whose sums at 36 points stay in the second-level cache.
  static constexpr int64_t kChannels = 64;  // of x
  static constexpr int64_t kVectors = 4;    // of 64 bytes, of channels of grad
  static constexpr int64_t kChunk = 24;     // tiles transformed and multiplied at a time

  int64_t bytes() const { return scalar == Scalar::f64 ? 8 : 4; }
  int64_t lanes() const { return 64 / bytes(); }
  int64_t side() const { return 7 - taps; }  // of a tile of grad; one of x has 6
  int64_t rows() const { return (H + side() - 1) / side(); }
  int64_t columns() const { return (W + side() - 1) / side(); }
  int64_t tiles() const { return pairs * N * rows() * columns(); }
  int64_t blocks_of_x() const { return (C + kChannels - 1) / kChannels; }
  int64_t blocks_of_grad() const { return (K + kVectors * lanes() - 1) / (kVectors * lanes()); }
  int64_t blocks() const { return blocks_of_x() * blocks_of_grad(); }
  int64_t units() const { return blocks() * slots; }

  // Stride of points, in 64-byte vectors: one more than needed, or a tile's 36 points would all fall into one set of
  // the first-level cache.
  int64_t x_plane() const { return kChunk * kChannels / lanes() + 1; }
  int64_t grad_plane() const { return kChunk * kVectors + 1; }
  int64_t sum_plane() const { return kChannels * kVectors + 1; }
  int64_t scratch_bytes() const {
    return 64 * 36 * (x_plane() + grad_plane() + sum_plane()) + bytes() * (C > K ? C : K);
  }
};

}  // namespace pydistill
