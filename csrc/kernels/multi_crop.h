// One call of the crops of a batch, as the CPU and the CUDA body receive it.
//
// A record has `parts` parts, painted one over the other; a part is a row of `columns` numbers. It takes
// source[:, top : top + height, left : left + width] of one image, and in this order
//   resizes it    by torch's antialiased bilinear filter, to the whole result or, if `fit`, to the part's own place
//   mirrors it    left to right if `flip`
//   rolls it      y[i, j] = x[(i - roll_y) mod h, (j - roll_x) mod w], h and w those of the resized crop
//   paints it     y = (1 - alpha) y + alpha crop in rows [to_top, to_top + to_height) and columns
//                 [to_left, to_left + to_width) of the result, which was zero before the first part.
// Finally a result becomes (y - mean) / std per channel, if `norm` is given.
//
// The filter, for place r of `size` made from `in` pixels: with m = max(in, size), pixel x has the weight
//   q(x, r) / sum over x of q(x, r),   q(x, r) = max(0, 2 m - |(2 x + 1) size - (2 r + 1) in|)
// in integers: it is torch's triangle without a rounding before the division.
//
// forward   images, base -> results; every image has `base` added before its crops are taken; `linear` omits the mean,
//           the only part not linear in images and base
// backward  its adjoint: gradients of the results -> gradients of the images or, `shared`, of the base
//
// A record with an invalid source, box or place makes its result NaN and contributes to no gradient.
#pragma once

#include <cstdint>

#include "../common/scalar.h"

namespace pydistill {

struct MultiCrop {
  enum class Form : int { forward, backward };
  enum Column : int {
    source,
    top,
    left,
    height,
    width,
    flip,
    roll_y,
    roll_x,
    fit,
    to_top,
    to_left,
    to_height,
    to_width,
    alpha,
    columns
  };
  static constexpr int64_t max_parts = 4, max_size = 16384;

  Form form = Form::forward;
  Scalar scalar = Scalar::f32;
  int64_t N = 0, C = 0, H = 0, W = 0;            // of the images
  int64_t B = 0, height_out = 0, width_out = 0;  // of the results
  int64_t parts = 1;
  bool linear = false;
  bool shared = false;
  bool in_place = false;  // on the CPU: no base, and the images' rows are contiguous and in the compute type

  const float* record = nullptr;                               // [B, parts, columns]
  int64_t record_row = 0, record_part = 0, record_column = 0;  // its strides
  const double* norm = nullptr;                                // [2, C], contiguous: mean, std; may be absent

  // On the CPU, for the backward: the record's parts, as row * parts + part, in this order for each image; those of
  // image n are parts_of[first[n]] up to parts_of[first[n + 1]]. `shared`: as if there were only one image.
  const int64_t *first = nullptr, *parts_of = nullptr;

  Map from;  // images; backward: gradients of the results
  Map base;  // [1, C, H, W], n is not used; may be absent
  Map to;    // contiguous: results; backward: gradients of the images, [1, C, H, W] for `shared`
};

}  // namespace pydistill
