#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "../common/cuda_stream.h"
#include "../kernels/instance_norm_relu_avg_pool.cuh"
#include "instance_norm_relu_avg_pool.h"

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
    launch(static_cast<cudaStream_t>(current_cuda_stream(device)));
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
