#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "../common/cuda_stream.h"
#include "../kernels/soft_cross_entropy.cuh"
#include "soft_cross_entropy.h"

namespace pydistill {
namespace {

struct Cuda {
  static void run(const SoftCrossEntropy& call, const Tensor& logits) {
    const int32_t device = logits.get_device();
    const torch::stable::accelerator::DeviceGuard guard(device);
    launch_soft_cross_entropy(call, static_cast<cudaStream_t>(current_cuda_stream(device)));
  }
};

using Ops = SoftCrossEntropyOps<Cuda>;

}  // namespace
}  // namespace pydistill

STABLE_TORCH_LIBRARY_IMPL(pydistill, CUDA, m) {
  m.impl("soft_cross_entropy", TORCH_BOX(&pydistill::Ops::forward));
  m.impl("soft_cross_entropy_backward", TORCH_BOX(&pydistill::Ops::backward));
  m.impl("soft_cross_entropy_jvp", TORCH_BOX(&pydistill::Ops::jvp));
  m.impl("soft_cross_entropy_backward_jvp", TORCH_BOX(&pydistill::Ops::backward_jvp));
}
