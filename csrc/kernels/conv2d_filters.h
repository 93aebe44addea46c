// The filters of a convolution for frozen_conv2d, as the CPU body receives them: at each of Winograd's 36 points a
// matrix [C][K], divided into vectors of 64 bytes of output channels (frozen_conv2d.h).
#pragma once

#include <cstdint>

#include "../common/scalar.h"

namespace pydistill {

struct Conv2dFilters {
  Scalar scalar = Scalar::f32;  // f32 or f64
  int64_t K = 0, C = 0, taps = 3;
  Map weight;           // [K, C, taps, taps], any strides: turned filters have negative ones
  void* out = nullptr;  // [36][vectors][C][lanes], zero where there is no channel

  static constexpr int64_t kChannels = 16;  // gathered at a time

  int64_t lanes() const { return scalar == Scalar::f64 ? 8 : 16; }
  int64_t vectors() const { return (K + lanes() - 1) / lanes(); }
  int64_t blocks() const { return (C + kChannels - 1) / kChannels; }
  int64_t units() const { return vectors() * blocks(); }
};

}  // namespace pydistill
