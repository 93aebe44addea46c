#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "../common/cuda_stream.h"
#include "../kernels/bn_stat_match.cuh"
#include "bn_stat_match.h"

namespace pydistill {
namespace {

struct Cuda {
  static int64_t tile(const BnStatMatch& call) { return bn_stat_match::tile(call); }

  static void allocated(Tensor&) {}

  static void run(const BnStatMatch& call, const Tensor& x) {
    const int32_t device = x.get_device();
    const torch::stable::accelerator::DeviceGuard guard(device);
    launch_bn_stat_match(call, static_cast<cudaStream_t>(current_cuda_stream(device)));
  }
};

using Ops = BnStatMatchOps<Cuda>;

}  // namespace
}  // namespace pydistill

STABLE_TORCH_LIBRARY_IMPL(pydistill, CUDA, m) {
  m.impl("bn_stat_match", TORCH_BOX(&pydistill::Ops::forward));
  m.impl("bn_stat_match_backward", TORCH_BOX(&pydistill::Ops::backward));
}
