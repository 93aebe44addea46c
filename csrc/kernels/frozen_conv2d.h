// A 3x3 convolution with padding 1 and filters that stay, as the CPU body receives it: Winograd's F(4x4, 3x3).
//
// y[n, h, w, k] = sum over c, i, j of x[n, h + i - 1, w + j - 1, c] w[k, c, i, j], in channels-last memory. The filters
// come transformed: for each of the 36 points a matrix [C][K], cut into vectors of 64 bytes of output channels.
#pragma once

#include <cstdint>

#include "../common/scalar.h"

namespace pydistill {

struct FrozenConv2d {
  Scalar scalar = Scalar::f32;  // of x and y; filters and arithmetic are double for f64, else float
  int64_t N = 0, C = 0, K = 0, H = 0, W = 0;
  const void* x = nullptr;        // [N][H][W][C]
  const void* filters = nullptr;  // [36][vectors][C][lanes], zero where there is no output channel
  void* y = nullptr;              // [N][H][W][K]

  // A unit of work is `part` vectors of output channels of a chunk of `chunk` tiles; the units of a chunk are
  // neighbours, so that a thread transforms its inputs once.
  int64_t chunk = 1, part = 1;

  int64_t bytes() const { return scalar == Scalar::f64 ? 8 : 4; }  // of a number in filters
  int64_t lanes() const { return 64 / bytes(); }
  int64_t rows() const { return (H + 3) / 4; }
  int64_t columns() const { return (W + 3) / 4; }
  int64_t tiles() const { return N * rows() * columns(); }
  int64_t inputs() const { return (C + lanes() - 1) / lanes(); }   // vectors of input channels
  int64_t outputs() const { return (K + lanes() - 1) / lanes(); }  // vectors of output channels
  int64_t chunks() const { return (tiles() + chunk - 1) / chunk; }
  int64_t parts() const { return (outputs() + part - 1) / part; }
  int64_t units() const { return chunks() * parts(); }

  // From one point's tiles to the next one's, in 64-byte vectors: one more than they take, or a tile's 36 points would
  // all fall into one set of the first-level cache.
  int64_t input_plane() const { return chunk * inputs() + 1; }
  int64_t product_plane() const { return chunk * part + 1; }
  int64_t scratch_bytes() const { return 36 * 64 * (input_plane() + product_plane()); }
};

}  // namespace pydistill
