// One call of the ConvNet block after the convolution, as the CPU and the CUDA body receive it.
//
// Per plane (n, c):  m = mean x,  r = 1/sqrt(var x + eps),  h = (x - m) r,  a = h weight + bias,
//                    y = pool(relu(a)),  pool = 2x2 average, odd rows and columns dropped.
// The forms, with _t for the derivative along a direction (x_t, weight_t, bias_t, grad_y_t):
//   forward       x                        -> y
//   backward      x, grad_y                -> grad_x, grad_weight, grad_bias
//   jvp           x, x_t                   -> y                                  (holding y_t)
//   backward_jvp  x, x_t, grad_y, grad_y_t -> y, grad_x, grad_weight, grad_bias  (all holding tangents)
// The backward's own vector-Jacobian product is backward_jvp along the incoming gradients with grad_y_t
// absent: the Hessian of <grad_y, y> is symmetric, so no fifth form is needed.
#pragma once

#include <cstdint>

#include "../common/scalar.h"

namespace pydistill {

struct InstanceNormReluAvgPool {
  enum class Form : int { forward, backward, jvp, backward_jvp };

  Form form = Form::forward;
  Scalar scalar = Scalar::f32;  // of every Map; weights and their gradients are double for f64, else float
  int64_t N = 0, C = 0, H = 0, W = 0;
  double eps = 0;
  bool relu = true, pool = true;

  Map x, x_t;                    // [N, C, H, W]
  Map grad_y, grad_y_t;          // [N, C, H/2, W/2] with pool, else [N, C, H, W]; grad_y_t may be absent
  const void* weight = nullptr;  // [C], contiguous, like the next three
  const void* bias = nullptr;
  const void* weight_t = nullptr;
  const void* bias_t = nullptr;

  Map y;                        // as grad_y
  Map grad_x;                   // as x
  void* grad_weight = nullptr;  // [N, C], contiguous: one sample's share, summed over N by the caller
  void* grad_bias = nullptr;
};

}  // namespace pydistill
