// An operator library of the kind that has kernels for the CPU and for CUDA, written against torch's stable ABI.
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <stdexcept>

namespace {

using torch::stable::Tensor;

Tensor scaled(const Tensor& x, float factor) {
  Tensor out = torch::stable::empty_like(x);
  const auto* const from = static_cast<const float*>(x.const_data_ptr());
  auto* const to = static_cast<float*>(out.mutable_data_ptr());
  for (int64_t i = 0; i < x.numel(); ++i) to[i] = factor * from[i];
  return out;
}

Tensor twice(const Tensor& x) { return scaled(x, 2); }

// The stream's number is in the value, so that a test sees which kernel ran, and where.
Tensor twice_on_current_device(const Tensor& x) {
  using Function = AOTITorchError(int32_t device, void** stream);
  void* const library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
  auto* const get =
      reinterpret_cast<Function*>(library ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr);
  if (!get) throw std::runtime_error("no current stream");
  void* stream = nullptr;
  get(x.get_device_index(), &stream);
  return scaled(x, 2 + 1000 * static_cast<float>(reinterpret_cast<intptr_t>(stream)));
}

Tensor twice_on_device(const Tensor& x) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  return twice_on_current_device(x);
}

}  // namespace

STABLE_TORCH_LIBRARY(stand_in_foreign, m) {
  m.def("twice(Tensor x) -> Tensor");
  m.def("twice_without_guard(Tensor x) -> Tensor");
  m.def("of_the_host(Tensor x) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(stand_in_foreign, CPU, m) {
  m.impl("twice", TORCH_BOX(&twice));
  m.impl("of_the_host", TORCH_BOX(&twice));
}

STABLE_TORCH_LIBRARY_IMPL(stand_in_foreign, CUDA, m) {
  m.impl("twice", TORCH_BOX(&twice_on_device));
  m.impl("twice_without_guard", TORCH_BOX(&twice_on_current_device));
}
