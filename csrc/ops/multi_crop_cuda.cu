#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "../common/cuda_stream.h"
#include "../kernels/multi_crop.cuh"
#include "multi_crop.h"

namespace pydistill {
namespace {

struct Cuda {
  static void run(MultiCrop& call, const Tensor& from) {
    const int32_t device = from.get_device();
    const torch::stable::accelerator::DeviceGuard guard(device);
    launch_multi_crop(call, static_cast<cudaStream_t>(current_cuda_stream(device)));
  }
};

using Ops = MultiCropOps<Cuda>;

}  // namespace
}  // namespace pydistill

STABLE_TORCH_LIBRARY_IMPL(pydistill, CUDA, m) {
  m.impl("multi_crop", TORCH_BOX(&pydistill::Ops::forward));
  m.impl("multi_crop_backward", TORCH_BOX(&pydistill::Ops::backward));
}
