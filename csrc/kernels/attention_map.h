// Attention maps of features x [N, C, positions]: with f the `order`-th derivative of |x|^power, times `factor` if
// given,
//
//   reduce    spatial [N, positions] = sum of f over the channels,  channel [N, C] = sum of f over the positions
//   adjoint   out [N, C, positions] = f (spatial + channel)
//
// Each is the other's adjoint in its sums, and differentiation raises the order: the pair is closed under it. At zero,
// derivatives are zero, as torch's of abs are.
#pragma once

#include <cstdint>

#include "../common/scalar.h"

namespace pydistill {

// x is dense in memory as [N][outer][inner]: the outer index is the channel, or the position if channels are last.
struct AttentionMap {
  Scalar scalar = Scalar::f32;  // of x, factor and out; maps are float32, or float64 with f64
  int64_t N = 0, outer = 0, inner = 0;
  double power = 1;
  int64_t order = 0;
  bool adjoint = false;
  const void* x = nullptr;
  const void* factor = nullptr;  // null: one
  void* over_outer = nullptr;    // [N, inner]: summed over the outer index; null: not wanted, or zero
  void* over_inner = nullptr;    // [N, outer]
  void* out = nullptr;
};

}  // namespace pydistill
