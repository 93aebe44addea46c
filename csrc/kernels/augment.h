// One call of the siamese augmentation, as the CPU and the CUDA body receive it.
//
// Per image, with the parameters of its row of the record, in this order (each at its identity value does nothing):
//   brightness     x + brightness
//   saturation     (x - m) saturation + m     m: the pixel's mean over the channels
//   contrast       (x - M) contrast + M       M: the image's mean
//   crop           y[i, j] = x[i + crop_y, j + crop_x], zero outside the image
//   cutout         zero in rows [top, top + height) and columns [left, left + width)
//   flip           y[i, j] = x[i, W - 1 - j]
//   scale, rotate  one bilinear resampling each about the image's centre (grid_sample of an affine_grid, zeros outside)
// As brightness passes through both means, with saturation s and contrast c the colours are
//   c s x + c (1 - s) m + (1 - c) M + brightness, with m and M those of x.
// With two copies, image n of the result comes from image n % N, mirrored beforehand if n >= N.
//
// forward   images -> images; `linear` omits the brightness, the only part not linear in the images
// backward  its adjoint: gradients of the results -> gradients of the images, summed over the copies
//
// A record with a non-finite scale or angle makes its image NaN.
#pragma once

#include <cstdint>

#include "../common/scalar.h"

namespace pydistill {

struct Augment {
  enum class Form : int { forward, backward };
  enum Column : int {
    brightness,
    saturation,
    contrast,
    crop_y,
    crop_x,
    cutout_top,
    cutout_left,
    cutout_height,
    cutout_width,
    flip,
    scale_x,
    scale_y,
    angle,  // in radians
    columns
  };

  Form form = Form::forward;
  Scalar scalar = Scalar::f32;
  int64_t N = 0, C = 0, H = 0, W = 0;  // of the images
  int64_t copies = 1;                  // 1 or 2
  bool align_corners = true;           // of affine_grid and grid_sample; no difference for square images
  bool linear = false;

  const float* record = nullptr;  // [copies N, columns]
  int64_t record_row = 0, record_column = 0;

  Map from;  // images; backward: gradients of the results, [copies N, C, H, W]
  Map to;    // results; backward: gradients of the images
};

}  // namespace pydistill
