#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "../common/cuda_stream.h"
#include "../kernels/augment.cuh"
#include "augment.h"

namespace pydistill {
namespace {

struct Cuda {
  static void run(const Augment& call, const Tensor& images) {
    const int32_t device = images.get_device();
    const torch::stable::accelerator::DeviceGuard guard(device);
    launch_augment(call, static_cast<cudaStream_t>(current_cuda_stream(device)));
  }
};

using Ops = AugmentOps<Cuda>;

}  // namespace
}  // namespace pydistill

STABLE_TORCH_LIBRARY_IMPL(pydistill, CUDA, m) {
  m.impl("augment", TORCH_BOX(&pydistill::Ops::forward));
  m.impl("augment_backward", TORCH_BOX(&pydistill::Ops::backward));
}
