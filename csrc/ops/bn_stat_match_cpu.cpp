#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "../common/isa.h"
#include "../common/scratch.h"
#include "bn_stat_match.h"

namespace pydistill {

BnStatMatchKernel bn_stat_match_base, bn_stat_match_avx2, bn_stat_match_avx512;

namespace {

struct Cpu {
  // Rows: three numbers per tile, few compared with what is read, and no sum too long for single precision. Planes: as
  // many terms in each of their partial sums.
  static int64_t tile(const BnStatMatch& call) { return call.x.p == 1 ? 2048 : 128; }

  static void allocated(Tensor& planes) { on_large_pages(planes); }

  static void run(const BnStatMatch& call, const Tensor&) {
    static constexpr BnStatMatchKernel* kernels[] = {bn_stat_match_base, bn_stat_match_avx2, bn_stat_match_avx512};
    BnStatMatchKernel* const kernel = best_of(kernels, call.scalar);
    const int64_t panels = (call.C + BnStatMatch::kPanel - 1) / BnStatMatch::kPanel;
    const bool merge = call.pass == BnStatMatch::Pass::merge;
    const int64_t units = merge ? panels : panels * call.tiles();
    const int64_t elements = std::min(call.C, BnStatMatch::kPanel) * std::min(call.tile, call.P);  // of a unit
    const int64_t grain = merge ? 1 : std::max<int64_t>(1, 32768 / elements);  // units worth a thread's while
    torch::stable::parallel_for(0, units, grain, [&](int64_t begin, int64_t end) { kernel(call, begin, end); });
  }
};

using Ops = BnStatMatchOps<Cpu>;

}  // namespace
}  // namespace pydistill

STABLE_TORCH_LIBRARY_IMPL(pydistill, CPU, m) {
  m.impl("bn_stat_match", TORCH_BOX(&pydistill::Ops::forward));
  m.impl("bn_stat_match_backward", TORCH_BOX(&pydistill::Ops::backward));
}
