#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>

#include "../common/isa.h"
#include "../common/tensor.h"
#include "../kernels/max_pool2d.h"

namespace pydistill {

using MaxPool2dKernel = void(const MaxPool2d& call, int64_t begin, int64_t end);
MaxPool2dKernel max_pool2d_base, max_pool2d_avx2, max_pool2d_avx512;

namespace {

using Pass = MaxPool2d::Pass;
using torch::headeronly::MemoryFormat;

// `like` has the images, the channels, the element type and the device; `height` and `width` are what is pooled.
MaxPool2d call_of(Pass pass, const Tensor& like, const char* name, int64_t height, int64_t width, int64_t kernel,
                  int64_t stride, int64_t padding) {
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

Tensor channels_last(const Tensor& t) { return torch::stable::contiguous(t, MemoryFormat::ChannelsLast); }

Tensor empty(const Tensor& like, ScalarType type, int64_t N, int64_t C, int64_t H, int64_t W) {
  const int64_t shape[] = {N, C, H, W};
  return torch::stable::empty(torch::headeronly::IntHeaderOnlyArrayRef(shape, 4), type, std::nullopt, like.device(),
                              std::nullopt, MemoryFormat::ChannelsLast);
}

void check_which(const Tensor& which, const Tensor& like, const MaxPool2d& call) {
  check(which.scalar_type() == ScalarType::Byte && which.device() == like.device(),
        "which: expected uint8 on the device of the other tensor");
  const int64_t shape[] = {call.N, call.C, call.rows(), call.columns()};
  bool fits = which.dim() == 4;
  for (int i = 0; fits && i < 4; ++i) fits = which.sizes()[i] == shape[i];
  check(fits, "which: expected [", shape[0], ", ", shape[1], ", ", shape[2], ", ", shape[3], "]");
}

void run(const MaxPool2d& call) {
  static constexpr MaxPool2dKernel* kernels[] = {max_pool2d_base, max_pool2d_avx2, max_pool2d_avx512};
  MaxPool2dKernel* const kernel = best_of(kernels);
  const int64_t elements = call.C * (call.pass == Pass::scatter ? call.W : call.columns());  // of a unit
  const int64_t grain = std::max<int64_t>(1, 32768 / elements);                              // worth a thread's while
  torch::stable::parallel_for(0, call.units(), grain, [&](int64_t begin, int64_t end) { kernel(call, begin, end); });
}

std::tuple<Tensor, Tensor> max_pool2d(const Tensor& x, int64_t kernel, int64_t stride, int64_t padding) {
  check(x.dim() == 4, "x: expected [N, C, H, W], got ", x.dim(), " dimensions");
  MaxPool2d call = call_of(Pass::pool, x, "x", x.sizes()[2], x.sizes()[3], kernel, stride, padding);
  Tensor y = empty(x, x.scalar_type(), call.N, call.C, call.rows(), call.columns());
  Tensor which = empty(x, ScalarType::Byte, call.N, call.C, call.rows(), call.columns());
  if (call.N == 0) return {y, which};
  const Tensor from = channels_last(x);
  call.from = from.const_data_ptr();
  call.to = on_large_pages(y).mutable_data_ptr();
  call.which = static_cast<uint8_t*>(on_large_pages(which).mutable_data_ptr());
  run(call);
  return {y, which};
}

Tensor max_pool2d_gather(const Tensor& x, const Tensor& which, int64_t kernel, int64_t stride, int64_t padding) {
  check(x.dim() == 4, "x: expected [N, C, H, W], got ", x.dim(), " dimensions");
  MaxPool2d call = call_of(Pass::pick, x, "x", x.sizes()[2], x.sizes()[3], kernel, stride, padding);
  check_which(which, x, call);
  Tensor y = empty(x, x.scalar_type(), call.N, call.C, call.rows(), call.columns());
  if (call.N == 0) return y;
  const Tensor from = channels_last(x), numbers = channels_last(which);
  call.from = from.const_data_ptr();
  call.to = on_large_pages(y).mutable_data_ptr();
  call.which = const_cast<uint8_t*>(numbers.const_data_ptr<uint8_t>());  // read only in this pass
  run(call);
  return y;
}

Tensor max_pool2d_backward(const Tensor& grad, const Tensor& which, int64_t height, int64_t width, int64_t kernel,
                           int64_t stride, int64_t padding) {
  check(grad.dim() == 4, "grad: expected [N, C, H, W], got ", grad.dim(), " dimensions");
  MaxPool2d call = call_of(Pass::scatter, grad, "grad", height, width, kernel, stride, padding);
  check_which(which, grad, call);
  check_image(grad, "grad", {call.N, call.C, call.rows(), call.columns()}, grad);
  Tensor grad_x = empty(grad, grad.scalar_type(), call.N, call.C, height, width);
  if (call.N == 0) return grad_x;
  const Tensor from = channels_last(grad), numbers = channels_last(which);
  call.from = from.const_data_ptr();
  call.to = on_large_pages(grad_x).mutable_data_ptr();
  call.which = const_cast<uint8_t*>(numbers.const_data_ptr<uint8_t>());  // read only in this pass
  run(call);
  return grad_x;
}

}  // namespace
}  // namespace pydistill

STABLE_TORCH_LIBRARY_IMPL(pydistill, CPU, m) {
  m.impl("max_pool2d", TORCH_BOX(&pydistill::max_pool2d));
  m.impl("max_pool2d_gather", TORCH_BOX(&pydistill::max_pool2d_gather));
  m.impl("max_pool2d_backward", TORCH_BOX(&pydistill::max_pool2d_backward));
}
