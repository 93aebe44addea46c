// A convolution with fixed filters whose output is as large as its input, as the CPU body receives it: Winograd's
// F(4x4, 3x3) or, with four, two or (float and double) five taps per side, F(3x3, 4x4), F(5x5, 2x2) or F(2x2, 5x5).
//
// y[n, h, w, k] = sum over c, i, j of x[n, h + i - before, w + j - before, c] w[k, c, i, j], in channels-last memory,
// with zeros around x. The adjoint is of the same kind, with `taps - 1 - before`. The filters come transformed: for
// each of the 36 points a matrix [C][K], divided into vectors of 64 bytes of output channels.
//
// Four taps are those of a 7x7 convolution with stride 2, two those of a 3x3 one. Their positions are cells of 2x2
// pixels: x (with half of the taps before the position) or y (in the adjoint, with one less) is an image of twice the
// height and width and a quarter of the channels, and a cell's channels are those of its pixels in order.
//
// For bf16 the products are of 16-bit integers, in pairs of input channels (int16_pairs.h): each tile's and each
// filter's channels at a point are scaled to the largest norm for which no sum overflows. Of the 15 bits that this
// leaves, a sum over 512 channels uses 11 for an input of average size: rounding at the 36 points, which the inverse
// transform magnifies five times, stays below that of the output to bf16. Factors in bf16 would be as fast, but off by
// a hundredth.
#pragma once

#include <cstdint>

#include "../common/scalar.h"

namespace pydistill {

struct FrozenConv2d {
  Scalar scalar = Scalar::f32;  // of x and y
  int64_t N = 0, C = 0, K = 0, H = 0, W = 0;
  int64_t taps = 3, before = 1;
  const void* x = nullptr;  // [N][H][W][C], or cells
  // [36][vectors][C][lanes] of double for f64, else float; for bf16 [36][vectors][1 + C / 2][lanes] of int16 pairs,
  // of which the first row holds float factors that undo the scaling. Zero if there is no channel.
  const void* filters = nullptr;
  void* y = nullptr;  // [N][H][W][K], or cells

  // A unit of work is `part` vectors of output channels of a chunk of `chunk` tiles; the units of a chunk are
  // consecutive, so that a thread transforms its inputs once.
  int64_t chunk = 1, part = 1;

  bool of_cells() const { return taps % 2 == 0 && before == taps / 2; }      // x
  bool to_cells() const { return taps % 2 == 0 && before == taps / 2 - 1; }  // y
  bool paired() const { return scalar == Scalar::bf16; }
  int64_t bytes() const { return scalar == Scalar::f64 ? 8 : 4; }  // of a number, or a pair, in filters
  int64_t lanes() const { return 64 / bytes(); }
  int64_t depth() const { return paired() ? C / 2 : C; }                // of the products
  int64_t filter_rows() const { return paired() ? 1 + depth() : C; }    // of a vector of output channels
  int64_t inputs() const { return (depth() + lanes() - 1) / lanes(); }  // vectors of input channels, or pairs
  int64_t outputs() const { return (K + lanes() - 1) / lanes(); }       // vectors of output channels
  int64_t side() const { return 7 - taps; }                             // of a tile's output; its input has 6
  int64_t rows() const { return (H + side() - 1) / side(); }
  int64_t columns() const { return (W + side() - 1) / side(); }
  int64_t tiles() const { return N * rows() * columns(); }
  int64_t chunks() const { return (tiles() + chunk - 1) / chunk; }
  int64_t parts() const { return (outputs() + part - 1) / part; }
  int64_t units() const { return chunks() * parts(); }

  // Stride of points, in 64-byte vectors: one more than their tiles take, or a tile's 36 points would all fall into one
  // set of the first-level cache.
  int64_t input_plane() const { return chunk * inputs() + 1; }
  int64_t product_plane() const { return chunk * part + 1; }
  int64_t tile_plane() const { return 2 * inputs() + 1; }  // of one tile in float, before it is scaled
  static constexpr int64_t kFactors = 3;                   // vectors of a tile's 36 factors
  int64_t scratch_bytes() const {
    const int64_t scaled = paired() ? 36 * tile_plane() + kFactors * chunk : 0;
    return 64 * (36 * (input_plane() + product_plane()) + scaled) + 8 * (chunk + C);
  }
};

}  // namespace pydistill
