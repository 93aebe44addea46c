#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>

#include "../common/isa.h"
#include "max_pool2d.h"

namespace pydistill {

MaxPool2dKernel max_pool2d_base, max_pool2d_avx2, max_pool2d_avx512;

namespace {

using Pass = MaxPool2d::Pass;

void run(const MaxPool2d& call) {
  static constexpr MaxPool2dKernel* kernels[] = {max_pool2d_base, max_pool2d_avx2, max_pool2d_avx512};
  MaxPool2dKernel* const kernel = best_of(kernels, call.scalar);
  const int64_t elements = call.C * (call.pass == Pass::scatter ? call.W : call.columns());  // of a unit
  const int64_t grain = std::max<int64_t>(1, 32768 / elements);                              // worth a thread's while
  torch::stable::parallel_for(0, call.units(), grain, [&](int64_t begin, int64_t end) { kernel(call, begin, end); });
}

std::tuple<Tensor, Tensor> max_pool2d(const Tensor& x, int64_t kernel, int64_t stride, int64_t padding) {
  check(x.dim() == 4, "x: expected [N, C, H, W], got ", x.dim(), " dimensions");
  MaxPool2d call = max_pool2d_call(Pass::pool, x, "x", x.sizes()[2], x.sizes()[3], kernel, stride, padding);
  Tensor y = empty_channels_last(x, x.scalar_type(), call.N, call.C, call.rows(), call.columns());
  Tensor which = empty_channels_last(x, ScalarType::Byte, call.N, call.C, call.rows(), call.columns());
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
  MaxPool2d call = max_pool2d_call(Pass::pick, x, "x", x.sizes()[2], x.sizes()[3], kernel, stride, padding);
  check_which(which, x, call);
  Tensor y = empty_channels_last(x, x.scalar_type(), call.N, call.C, call.rows(), call.columns());
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
  MaxPool2d call = max_pool2d_call(Pass::scatter, grad, "grad", height, width, kernel, stride, padding);
  check_which(which, grad, call);
  check_image(grad, "grad", {call.N, call.C, call.rows(), call.columns()}, grad);
  Tensor grad_x = empty_channels_last(grad, grad.scalar_type(), call.N, call.C, height, width);
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
