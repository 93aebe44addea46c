#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>

#include "../common/isa.h"
#include "../common/scratch.h"
#include "../common/tensor.h"
#include "../kernels/conv2d_weight_grad.h"

namespace pydistill {

using Conv2dWeightGradKernel = void(const Conv2dWeightGrad& call, int64_t begin, int64_t end, void* scratch);
Conv2dWeightGradKernel conv2d_weight_grad_base, conv2d_weight_grad_avx2, conv2d_weight_grad_avx512;

namespace {

using torch::headeronly::MemoryFormat;

template <class T>
void add_slots(const void* sums, void* out, int64_t slots, int64_t count, int64_t begin, int64_t end) {
  const T* const from = static_cast<const T*>(sums);
  T* const to = static_cast<T*>(out);
  for (int64_t i = begin; i < end; ++i) to[i] = from[i];
  for (int64_t slot = 1; slot < slots; ++slot)
    for (int64_t i = begin; i < end; ++i) to[i] += from[slot * count + i];
}

Tensor conv2d_weight_grad(const Tensor& x, const Tensor& grad, const std::optional<Tensor>& x_2,
                          const std::optional<Tensor>& grad_2, int64_t taps) {
  check(x.dim() == 4, "x: expected [N, C, H, W], got ", x.dim(), " dimensions");
  check(grad.dim() == 4, "grad: expected [N, K, H, W], got ", grad.dim(), " dimensions");
  check(taps == 3 || taps == 5, "taps: expected 3 or 5 a side, got ", taps);
  check(x_2.has_value() == grad_2.has_value(), "grad_2: expected where x_2 is, and nowhere else");
  Conv2dWeightGrad call;
  call.scalar = scalar_of(x, "x");
  check(call.scalar == Scalar::f32 || call.scalar == Scalar::f64, "x: expected float32 or float64");
  call.N = x.sizes()[0], call.C = x.sizes()[1], call.H = x.sizes()[2], call.W = x.sizes()[3];
  call.K = grad.sizes()[1], call.taps = taps, call.pairs = x_2 ? 2 : 1;
  check_image(grad, "grad", {call.N, call.K, call.H, call.W}, x);
  if (x_2) {
    check_image(*x_2, "x_2", {call.N, call.C, call.H, call.W}, x);
    check_image(*grad_2, "grad_2", {call.N, call.K, call.H, call.W}, x);
  }
  const auto dense = [](const Tensor& t) { return torch::stable::contiguous(t, MemoryFormat::ChannelsLast); };
  const Tensor xs[] = {dense(x), dense(x_2 ? *x_2 : x)}, grads[] = {dense(grad), dense(grad_2 ? *grad_2 : grad)};
  for (int i = 0; i < 2; ++i) call.x[i] = xs[i].const_data_ptr(), call.grad[i] = grads[i].const_data_ptr();

  // A slot's sums cost about as much as the products of 20 tiles. The number of slots depends on shapes alone.
  call.slots =
      call.blocks() == 0
          ? 1
          : std::max<int64_t>(1, std::min<int64_t>((32 + call.blocks() - 1) / call.blocks(), call.tiles() / 96));
  const int64_t count = call.K * call.C * taps * taps, shape[] = {call.K, call.C, taps, taps};
  Tensor out = torch::stable::empty(torch::headeronly::IntHeaderOnlyArrayRef(shape, 4), x.scalar_type(), std::nullopt,
                                    x.device());
  if (count == 0) return out;
  if (call.tiles() == 0) return torch::stable::zero_(out);
  const Tensor sums = call.slots == 1 ? out : empty_matrix(x, x.scalar_type(), call.slots, count);
  call.sums = const_cast<void*>(sums.const_data_ptr());
  static constexpr Conv2dWeightGradKernel* kernels[] = {conv2d_weight_grad_base, conv2d_weight_grad_avx2,
                                                        conv2d_weight_grad_avx512};
  Conv2dWeightGradKernel* const kernel = best_of(kernels, call.scalar);
  torch::stable::parallel_for(
      0, call.units(), 1, [&](int64_t begin, int64_t end) { kernel(call, begin, end, scratch(call.scratch_bytes())); });
  if (call.slots > 1) {
    void* const to = out.mutable_data_ptr();
    torch::stable::parallel_for(0, count, 4096, [&](int64_t begin, int64_t end) {
      (call.scalar == Scalar::f64 ? add_slots<double> : add_slots<float>)(call.sums, to, call.slots, count, begin, end);
    });
  }
  return out;
}

}  // namespace
}  // namespace pydistill

STABLE_TORCH_LIBRARY_IMPL(pydistill, CPU, m) {
  m.impl("conv2d_weight_grad", TORCH_BOX(&pydistill::conv2d_weight_grad));
}
