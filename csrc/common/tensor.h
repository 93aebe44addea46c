// From torch tensors (stable ABI) to the kernels' types, with checks that keep a direct call within bounds.
// The public Python functions check first and say more; these guard torch.ops.pydistill.*.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <sstream>
#include <stdexcept>

#include "scalar.h"
#include "scratch.h"

namespace pydistill {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class... Parts>
void check(bool ok, const Parts&... parts) {
  if (ok) return;
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

inline Scalar scalar_of(const Tensor& x, const char* name) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return Scalar::f32;
    case ScalarType::Double:
      return Scalar::f64;
    case ScalarType::BFloat16:
      return Scalar::bf16;
    case ScalarType::Half:
      return Scalar::f16;
    default:
      check(false, name, ": expected float32, float64, bfloat16 or float16");
  }
  return Scalar::f32;
}

// The compute type of x, which is also the type of its per-channel parameters.
inline ScalarType compute_type(Scalar scalar) { return scalar == Scalar::f64 ? ScalarType::Double : ScalarType::Float; }

inline void check_image(const Tensor& t, const char* name, std::initializer_list<int64_t> shape, const Tensor& like) {
  check(t.dim() == 4, name, ": expected [N, C, H, W], got ", t.dim(), " dimensions");
  int i = 0;
  for (int64_t size : shape) {
    check(t.sizes()[i] == size, name, ": expected size ", size, " in dimension ", i, ", got ", t.sizes()[i]);
    ++i;
  }
  check(t.scalar_type() == like.scalar_type(), name, ": expected the dtype of x");
  check(t.device() == like.device(), name, ": expected the device of x");
}

inline Map map_of(const Tensor& t) {
  const auto stride = t.strides();
  // const is cast away for inputs: one Map type serves both, and kernels write to outputs only
  return {const_cast<void*>(t.const_data_ptr()), stride[0], stride[1], stride[2], stride[3]};
}

// torch's is_contiguous(channels_last), for tensors that are not also NCHW-contiguous: NCHW wins if both hold.
inline bool is_channels_last(const Tensor& t) {
  if (t.is_contiguous()) return false;
  const auto size = t.sizes(), stride = t.strides();
  int64_t expected = 1;
  for (int dim : {1, 3, 2, 0}) {
    if (size[dim] != 1 && stride[dim] != expected) return false;
    expected *= size[dim];
  }
  return true;
}

// [N, C, H, W], uninitialised, in the layout, dtype and device of x.
inline Tensor empty_image(const Tensor& x, int64_t N, int64_t C, int64_t H, int64_t W) {
  using torch::headeronly::MemoryFormat;
  const int64_t shape[] = {N, C, H, W};
  return torch::stable::empty(torch::headeronly::IntHeaderOnlyArrayRef(shape, 4), x.scalar_type(), std::nullopt,
                              x.device(), std::nullopt,
                              is_channels_last(x) ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

// The same, contiguous whatever the layout of x.
inline Tensor empty_planes(const Tensor& x, int64_t N, int64_t C, int64_t H, int64_t W) {
  const int64_t shape[] = {N, C, H, W};
  return torch::stable::empty(torch::headeronly::IntHeaderOnlyArrayRef(shape, 4), x.scalar_type(), std::nullopt,
                              x.device());
}

// An output in the CPU's memory that is yet to be written. Activations are larger than what malloc keeps, so each has
// fresh pages, which cost several times as much as the kernel.
inline Tensor& on_large_pages(Tensor& planes) {
  const int64_t bytes = planes.numel() * static_cast<int64_t>(planes.element_size());
  if (bytes >= int64_t{2} << 20) advise_large_pages(planes.mutable_data_ptr(), bytes);
  return planes;
}

inline Tensor empty_matrix(const Tensor& x, ScalarType type, int64_t rows, int64_t columns) {
  const int64_t shape[] = {rows, columns};
  return torch::stable::empty(torch::headeronly::IntHeaderOnlyArrayRef(shape, 2), type, std::nullopt, x.device());
}

inline Tensor empty_vector(const Tensor& x, ScalarType type, int64_t size) {
  return torch::stable::empty(torch::headeronly::IntHeaderOnlyArrayRef(&size, 1), type, std::nullopt, x.device());
}

}  // namespace pydistill
