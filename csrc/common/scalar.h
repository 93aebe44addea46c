// Element types and tensor views used by kernels; torch-free.
#pragma once

#include <cstdint>

namespace pydistill {

enum class Scalar : int { f32, f64, bf16, f16 };

// A [N, C, H, W] tensor: base pointer and strides counted in elements, so that NCHW, channels-last
// and expanded tensors all look alike. A null `data` means "absent".
struct Map {
  void* data = nullptr;
  int64_t n = 0, c = 0, h = 0, w = 0;
};

}  // namespace pydistill
