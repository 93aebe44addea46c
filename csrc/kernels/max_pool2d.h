// Max pooling with square windows, as the CPU body receives it: in channels-last memory, with one byte per output for
// the element of its window that won (row * kernel + column, counted from the window's own corner, padding included).
#pragma once

#include <cstdint>

#include "../common/scalar.h"

namespace pydistill {

struct MaxPool2d {
  // pool: the largest of each window and its number. pick: the element that the number names. scatter: the adjoint of
  // pick, as a gather: each position collects its gradient from the windows that cover it.
  enum class Pass : int { pool, pick, scatter };
  static constexpr int kLargest = 15;  // of kernel, whose elements a byte can number

  Pass pass = Pass::pool;
  Scalar scalar = Scalar::f32;
  int64_t N = 0, C = 0, H = 0, W = 0;  // of the input of the pooling
  int64_t kernel = 1, stride = 1, padding = 0;
  const void* from = nullptr;  // [N][H][W][C]; in scatter [N][rows][columns][C]
  void* to = nullptr;          // [N][rows][columns][C]; in scatter [N][H][W][C]
  uint8_t* which = nullptr;    // [N][rows][columns][C]; written in pool only
  int64_t first_row = 0;       // of H, if N is one and memory begins with the first row that the requested units need

  int64_t rows() const { return pooled(H); }
  int64_t columns() const { return pooled(W); }
  // A unit of work is an output row.
  int64_t units() const { return N * (pass == Pass::scatter ? H : rows()); }

 private:
  int64_t pooled(int64_t size) const { return (size - kernel + 2 * padding) / stride + 1; }
};

using MaxPool2dKernel = void(const MaxPool2d& call, int64_t begin, int64_t end);

}  // namespace pydistill
