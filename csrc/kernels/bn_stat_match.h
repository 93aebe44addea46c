// One call of the BatchNorm statistics with the frozen BatchNorm itself, as the CPU and the CUDA body receive it.
//
// With M = N P elements per channel, mean and var those of x over all but the channels (var with the divisor M):
//   forward   mean, var; and if there is a scale  y = relu(scale x + shift + residual)
//   backward  g = grad_y where the ReLU was open
//             grad_x = scale g + grad_mean / M + 2 grad_var / M (x - mean)     grad_residual = g
// A null scale omits the BatchNorm, a null residual is zero, null statistics' gradients are zero.
//
// The forward runs in two passes. The first goes over tiles of `tile` positions of one sample and leaves three numbers
// per channel: the tile's first element s, the sum of x - s and the sum of (x - s)^2; sums of squares about an element
// of the tile lose no significant digits, wherever the mean is. The second merges the tiles in order.
#pragma once

#include <cstdint>

#include "../common/scalar.h"

namespace pydistill {

struct BnStatMatch {
  enum class Pass : int { tiles, merge, backward };
  static constexpr int64_t kPanel = 256;  // channels per unit of work on the CPU, of a tile or in the merge

  // [N, C, P]: base pointer and strides in elements; a null `data` means "absent".
  struct Planes {
    void* data = nullptr;
    int64_t n = 0, c = 0, p = 0;
  };

  Pass pass = Pass::tiles;
  Scalar scalar = Scalar::f32;  // of the [N, C, P] tensors; per-channel values are double for f64, else float
  bool relu = false;
  int64_t N = 0, C = 0, P = 0;
  int64_t M = 0;     // elements per channel: N P, or those of the call that this is a part of
  int64_t tile = 0;  // positions in one

  Planes x, residual, y;
  Planes grad_y, grad_x, grad_residual;
  const void *scale = nullptr, *shift = nullptr;  // [C]
  const void* mean = nullptr;                     // [C], for the backward
  const void* grad_statistics = nullptr;          // [2, C]: of mean and var

  void* partial = nullptr;     // [tiles, 3, C]
  void* statistics = nullptr;  // [2, C]: mean and var
  void* kept_mean = nullptr;   // [C]: mean again

  int64_t tiles_of_sample() const { return (P + tile - 1) / tile; }
  int64_t tiles() const { return N * tiles_of_sample(); }
};

using BnStatMatchKernel = void(const BnStatMatch& call, int64_t begin, int64_t end);

}  // namespace pydistill
