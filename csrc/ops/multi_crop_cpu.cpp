#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <vector>

#include "../common/isa.h"
#include "../common/scratch.h"
#include "multi_crop.h"

namespace pydistill {

using MultiCropKernel = void(const MultiCrop& call, int64_t begin, int64_t end, void* scratch);
MultiCropKernel multi_crop_base, multi_crop_avx2, multi_crop_avx512;

namespace {

// Two axes' tables of taps, the rows of as many lanes as a register has, and planes: see multi_crop.inl.
int64_t scratch_bytes(const MultiCrop& call) {
  const int64_t in = call.H + call.W, out = call.height_out + call.width_out;
  const bool forward = call.form == MultiCrop::Form::forward;
  const int64_t tables = (forward ? call.parts : 1) * (2 * in + 7 * out);
  const int64_t rows = 16 * (2 * (call.W + 16) + 3 * (call.width_out + 16)) + call.width_out;
  const int64_t planes = forward ? (call.in_place ? 0 : call.parts) : call.C;
  return (tables + rows + planes * call.H * call.W) * int64_t{sizeof(double)} + 64 * 64;
}

// The record's parts by source, in their own order: a counting sort. Parts without a valid source are omitted.
struct BySource {
  std::vector<int64_t> first, parts_of;

  explicit BySource(const MultiCrop& call) : first(static_cast<size_t>(call.shared ? 1 : call.N) + 1) {
    const auto place = [&](int64_t k) -> int64_t {  // of the part's source in `first`; -1: none
      const float n = call.record[k / call.parts * call.record_row + k % call.parts * call.record_part];
      if (!(n > -1.0f && n < static_cast<float>(call.N))) return -1;
      const int64_t whole = static_cast<int64_t>(n);
      return whole >= call.N ? -1 : call.shared ? 0 : whole;
    };
    const int64_t all = call.B * call.parts;
    for (int64_t k = 0; k < all; ++k)
      if (const int64_t n = place(k); n >= 0) ++first[static_cast<size_t>(n) + 1];
    for (size_t n = 1; n < first.size(); ++n) first[n] += first[n - 1];
    parts_of.resize(static_cast<size_t>(first.back()));
    std::vector<int64_t> next = first;
    for (int64_t k = 0; k < all; ++k)
      if (const int64_t n = place(k); n >= 0) parts_of[static_cast<size_t>(next[static_cast<size_t>(n)]++)] = k;
  }
};

struct Cpu {
  static void run(MultiCrop& call, const Tensor&) {
    static constexpr MultiCropKernel* kernels[] = {multi_crop_base, multi_crop_avx2, multi_crop_avx512};
    MultiCropKernel* const kernel = best_of(kernels, call.scalar);
    const auto go = [&](int64_t rows, int64_t width) {
      const int64_t grain = std::max<int64_t>(1, 16384 / width);  // rows worth a thread's while
      torch::stable::parallel_for(
          0, rows, grain, [&](int64_t begin, int64_t end) { kernel(call, begin, end, scratch(scratch_bytes(call))); });
    };
    if (call.form == MultiCrop::Form::forward) return go(call.B * call.C * call.height_out, call.width_out);
    const BySource sources(call);
    call.first = sources.first.data(), call.parts_of = sources.parts_of.data();
    go((call.shared ? 1 : call.N) * call.C * call.H, call.W);
  }
};

using Ops = MultiCropOps<Cpu>;

}  // namespace
}  // namespace pydistill

STABLE_TORCH_LIBRARY_IMPL(pydistill, CPU, m) {
  m.impl("multi_crop", TORCH_BOX(&pydistill::Ops::forward));
  m.impl("multi_crop_backward", TORCH_BOX(&pydistill::Ops::backward));
}
