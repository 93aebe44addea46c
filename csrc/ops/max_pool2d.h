// Checks and allocation for everything that pools.
#pragma once

#include <algorithm>

#include "../common/tensor.h"
#include "../kernels/max_pool2d.h"

namespace pydistill {

// `like` has the images, channels, element type and device; `height` and `width` are those of the pooling's input.
inline MaxPool2d max_pool2d_call(MaxPool2d::Pass pass, const Tensor& like, const char* name, int64_t height,
                                 int64_t width, int64_t kernel, int64_t stride, int64_t padding) {
  check(kernel >= 1 && kernel <= MaxPool2d::kLargest, "kernel: expected 1 to ", MaxPool2d::kLargest, ", got ", kernel);
  check(stride >= 1, "stride: expected at least 1, got ", stride);
  check(padding >= 0 && padding <= kernel / 2, "padding: expected 0 to half the kernel, got ", padding);
  MaxPool2d call;
  call.pass = pass;
  call.scalar = scalar_of(like, name);
  call.N = like.sizes()[0], call.C = like.sizes()[1], call.H = height, call.W = width;
  call.kernel = kernel, call.stride = stride, call.padding = padding;
  check(call.C > 0, name, ": expected channels");
  const int64_t least = std::max<int64_t>(1, kernel - 2 * padding);
  check(height >= least && width >= least, "x: expected at least ", least, " x ", least, " pixels, got ", height, " x ",
        width);
  return call;
}

inline Tensor channels_last(const Tensor& t) {
  return torch::stable::contiguous(t, torch::headeronly::MemoryFormat::ChannelsLast);
}

inline Tensor empty_channels_last(const Tensor& like, ScalarType type, int64_t N, int64_t C, int64_t H, int64_t W) {
  const int64_t shape[] = {N, C, H, W};
  return torch::stable::empty(torch::headeronly::IntHeaderOnlyArrayRef(shape, 4), type, std::nullopt, like.device(),
                              std::nullopt, torch::headeronly::MemoryFormat::ChannelsLast);
}

inline void check_which(const Tensor& which, const Tensor& like, const MaxPool2d& call) {
  check(which.scalar_type() == ScalarType::Byte && which.device() == like.device(),
        "which: expected uint8 on the device of the other tensor");
  const int64_t shape[] = {call.N, call.C, call.rows(), call.columns()};
  bool fits = which.dim() == 4;
  for (int i = 0; fits && i < 4; ++i) fits = which.sizes()[i] == shape[i];
  check(fits, "which: expected [", shape[0], ", ", shape[1], ", ", shape[2], ", ", shape[3], "]");
}

}  // namespace pydistill
