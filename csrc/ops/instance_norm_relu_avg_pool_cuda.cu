#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "../kernels/instance_norm_relu_avg_pool.cuh"
#include "instance_norm_relu_avg_pool.h"

// torch's header declares it only where torch itself was built with CUDA; this library is built without such a torch
// and loaded only where one is there.
extern "C" AOTI_TORCH_EXPORT AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace pydistill {
namespace {

struct Cuda {
  static void run(const InstanceNormReluAvgPool& call, const Tensor& x) {
    on_stream_of(x, [&](cudaStream_t stream) { launch_instance_norm_relu_avg_pool(call, stream); });
  }

  static void sum_over_batch(const void* shares, void* sum, const InstanceNormReluAvgPool& call, const Tensor& x) {
    on_stream_of(x,
                 [&](cudaStream_t stream) { launch_sum_over_batch(call.scalar, shares, sum, call.N, call.C, stream); });
  }

 private:
  template <class Launch>
  static void on_stream_of(const Tensor& x, Launch launch) {
    const int32_t device = x.get_device();
    const torch::stable::accelerator::DeviceGuard guard(device);
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
    launch(static_cast<cudaStream_t>(stream));
  }
};

using Ops = InstanceNormReluAvgPoolOps<Cuda>;

}  // namespace
}  // namespace pydistill

STABLE_TORCH_LIBRARY_IMPL(pydistill, CUDA, m) {
  m.impl("instance_norm_relu_avg_pool", TORCH_BOX(&pydistill::Ops::forward));
  m.impl("instance_norm_relu_avg_pool_backward", TORCH_BOX(&pydistill::Ops::backward));
  m.impl("instance_norm_relu_avg_pool_jvp", TORCH_BOX(&pydistill::Ops::jvp));
  m.impl("instance_norm_relu_avg_pool_backward_jvp", TORCH_BOX(&pydistill::Ops::backward_jvp));
}
