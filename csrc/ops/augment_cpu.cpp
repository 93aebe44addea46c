#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "../common/isa.h"
#include "../common/scratch.h"
#include "augment.h"

namespace pydistill {

using AugmentKernel = void(const Augment& call, int64_t begin, int64_t end, void* scratch);
AugmentKernel augment_base, augment_avx2, augment_avx512;

namespace {

// Four sets of planes, two interleaved frames with a ring, and rows: see augment.inl.
int64_t scratch_bytes(const Augment& call) {
  const int64_t lanes = call.C == 1 ? 1 : 4, framed = (call.H + 4) * (call.W + 4) * lanes;
  const int64_t planes = (3 * call.C + 2) * call.H * call.W, rows = (call.W + 4) * lanes + 8 * call.W + 3 * call.H;
  return (planes + 2 * framed + rows) * int64_t{sizeof(double)} + 32 * 64;
}

struct Cpu {
  static void run(const Augment& call, const Tensor&) {
    static constexpr AugmentKernel* kernels[] = {augment_base, augment_avx2, augment_avx512};
    AugmentKernel* const kernel = best_of(kernels, call.scalar);
    const int64_t rows = call.form == Augment::Form::forward ? call.copies * call.N : call.N;
    const int64_t grain = std::max<int64_t>(1, 8192 / (call.C * call.H * call.W));  // images worth a thread's while
    torch::stable::parallel_for(
        0, rows, grain, [&](int64_t begin, int64_t end) { kernel(call, begin, end, scratch(scratch_bytes(call))); });
  }
};

using Ops = AugmentOps<Cpu>;

}  // namespace
}  // namespace pydistill

STABLE_TORCH_LIBRARY_IMPL(pydistill, CPU, m) {
  m.impl("augment", TORCH_BOX(&pydistill::Ops::forward));
  m.impl("augment_backward", TORCH_BOX(&pydistill::Ops::backward));
}
