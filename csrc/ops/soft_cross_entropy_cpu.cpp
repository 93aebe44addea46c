#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "../common/isa.h"
#include "../common/scratch.h"
#include "soft_cross_entropy.h"

namespace pydistill {

using SoftCrossEntropyKernel = void(const SoftCrossEntropy& call, int64_t begin, int64_t end, void* scratch);
SoftCrossEntropyKernel soft_cross_entropy_base, soft_cross_entropy_avx2, soft_cross_entropy_avx512;

namespace {

struct Cpu {
  static void run(const SoftCrossEntropy& call, const Tensor&) {
    static constexpr SoftCrossEntropyKernel* kernels[] = {soft_cross_entropy_base, soft_cross_entropy_avx2,
                                                          soft_cross_entropy_avx512};
    SoftCrossEntropyKernel* const kernel = best_of(kernels, call.scalar);
    const int64_t grain = std::max<int64_t>(1, 4096 / call.K);  // rows that are worth a thread's while
    torch::stable::parallel_for(0, call.N, grain, [&](int64_t begin, int64_t end) {
      kernel(call, begin, end, scratch(5 * call.K * sizeof(double)));  // at most five rows
    });
  }
};

using Ops = SoftCrossEntropyOps<Cpu>;

}  // namespace
}  // namespace pydistill

STABLE_TORCH_LIBRARY_IMPL(pydistill, CPU, m) {
  m.impl("soft_cross_entropy", TORCH_BOX(&pydistill::Ops::forward));
  m.impl("soft_cross_entropy_backward", TORCH_BOX(&pydistill::Ops::backward));
  m.impl("soft_cross_entropy_jvp", TORCH_BOX(&pydistill::Ops::jvp));
  m.impl("soft_cross_entropy_backward_jvp", TORCH_BOX(&pydistill::Ops::backward_jvp));
}
