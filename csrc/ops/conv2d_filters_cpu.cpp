#include <torch/csrc/stable/library.h>

#include <utility>

#include "../common/isa.h"
#include "../common/tensor.h"
#include "../kernels/conv2d_filters.h"

namespace pydistill {

using Conv2dFiltersKernel = void(const Conv2dFilters& call, int64_t begin, int64_t end);
Conv2dFiltersKernel conv2d_filters_base, conv2d_filters_avx2, conv2d_filters_avx512;

namespace {

Tensor conv2d_filters(const Tensor& weight, bool turned) {
  check(weight.dim() == 4, "weight: expected [K, C, taps, taps], got ", weight.dim(), " dimensions");
  Conv2dFilters call;
  call.scalar = scalar_of(weight, "weight");
  check(call.scalar == Scalar::f32 || call.scalar == Scalar::f64, "weight: expected float32 or float64");
  const auto size = weight.sizes();
  call.K = size[0], call.C = size[1], call.taps = size[2];
  check((call.taps == 3 || call.taps == 5) && size[3] == call.taps && call.K > 0 && call.C > 0,
        "weight: expected channels, and 3 or 5 taps a side");
  call.weight = map_of(weight);
  if (turned) {
    Map& map = call.weight;
    const int64_t last = (call.taps - 1) * (map.h + map.w);
    map.data = static_cast<char*>(map.data) + last * static_cast<int64_t>(weight.element_size());
    map = {map.data, map.c, map.n, -map.h, -map.w};
    std::swap(call.K, call.C);
  }
  const int64_t shape[] = {36, call.vectors(), call.C, call.lanes()};
  Tensor out = torch::stable::empty(torch::headeronly::IntHeaderOnlyArrayRef(shape, 4), weight.scalar_type(),
                                    std::nullopt, weight.device());
  on_large_pages(out);
  call.out = out.mutable_data_ptr();
  static constexpr Conv2dFiltersKernel* kernels[] = {conv2d_filters_base, conv2d_filters_avx2, conv2d_filters_avx512};
  Conv2dFiltersKernel* const kernel = best_of(kernels, call.scalar);
  torch::stable::parallel_for(0, call.units(), 16, [&](int64_t begin, int64_t end) { kernel(call, begin, end); });
  return out;
}

}  // namespace
}  // namespace pydistill

STABLE_TORCH_LIBRARY_IMPL(pydistill, CPU, m) { m.impl("conv2d_filters", TORCH_BOX(&pydistill::conv2d_filters)); }
