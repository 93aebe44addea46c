#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "../common/isa.h"
#include "../common/scratch.h"
#include "../common/tensor.h"
#include "../kernels/frozen_conv2d.h"

namespace pydistill {

using FrozenConv2dKernel = void(const FrozenConv2d& call, int64_t begin, int64_t end, void* scratch);
FrozenConv2dKernel frozen_conv2d_base, frozen_conv2d_avx2, frozen_conv2d_avx512, frozen_conv2d_avx512_bf16;

namespace {

using torch::headeronly::MemoryFormat;

// filters [36, vectors of K, C, lanes], as large as one of the two counts says and the other's vectors hold.
void check_filters(const Tensor& t, const char* name, int64_t from, int64_t to, const FrozenConv2d& call,
                   const Tensor& x) {
  const int64_t vectors = (to + call.lanes() - 1) / call.lanes();
  const int64_t rows = call.paired() ? 1 + from / 2 : from, numbers = call.paired() ? 2 * call.lanes() : call.lanes();
  const int64_t shape[] = {36, vectors, rows, numbers};
  bool fits = t.dim() == 4 && t.is_contiguous();
  for (int i = 0; fits && i < 4; ++i) fits = t.sizes()[i] == shape[i];
  check(fits, name, ": expected contiguous [36, ", vectors, ", ", rows, ", ", numbers, "]");
  check(t.scalar_type() == (call.paired() ? ScalarType::Short : compute_type(call.scalar)) && t.device() == x.device(),
        name, ": expected float32 (float64 for float64, int16 for bfloat16) on the device of x");
}

Tensor frozen_conv2d(const Tensor& x, const Tensor& filters, const Tensor& adjoint, int64_t taps, int64_t before) {
  check(x.dim() == 4, "x: expected [N, C, H, W], got ", x.dim(), " dimensions");
  FrozenConv2d call;
  call.scalar = scalar_of(x, "x");
  check(call.scalar != Scalar::f16, "x: expected float32, float64 or bfloat16, got float16");
  call.N = x.sizes()[0], call.C = x.sizes()[1], call.H = x.sizes()[2], call.W = x.sizes()[3];
  const bool wide = taps == 5 && before == 2 && !call.paired();
  const bool odd = (taps == 3 && before == 1) || wide;
  check(odd || ((taps == 2 || taps == 4) && (before == taps / 2 || before == taps / 2 - 1)),
        "taps: expected 3 a side with 1 before the position, 4 with 1 or 2, 2 with 0 or 1, or 5 with 2 in float32 or "
        "float64, got ",
        taps, " and ", before);
  call.taps = taps, call.before = before;
  if (call.of_cells()) {
    check(call.H % 2 == 0 && call.W % 2 == 0, "x: expected an even height and width, got ", call.H, " x ", call.W);
    call.C *= 4, call.H /= 2, call.W /= 2;
  }
  check(call.C > 0 && call.H > 0 && call.W > 0, "x: expected channels and pixels");
  check(adjoint.dim() == 4, "adjoint: expected [36, vectors, K, lanes], got ", adjoint.dim(), " dimensions");
  call.K = call.paired() ? 2 * (adjoint.sizes()[2] - 1) : adjoint.sizes()[2];
  check(!call.paired() || call.C % 2 == 0, "x: expected an even number of channels in bfloat16");
  check(!call.to_cells() || call.K % 4 == 0, "filters: expected cells of 2x2 pixels, got ", call.K, " channels");
  check_filters(filters, "filters", call.C, call.K, call, x);
  check_filters(adjoint, "adjoint", call.K, call.C, call, x);

  const Tensor from = torch::stable::contiguous(x, MemoryFormat::ChannelsLast);
  const int64_t cell = call.to_cells() ? 2 : 1,
                shape[] = {call.N, call.K / (cell * cell), cell * call.H, cell * call.W};
  Tensor y = torch::stable::empty(torch::headeronly::IntHeaderOnlyArrayRef(shape, 4), x.scalar_type(), std::nullopt,
                                  x.device(), std::nullopt, MemoryFormat::ChannelsLast);
  if (call.N == 0) return y;
  on_large_pages(y);
  call.x = from.const_data_ptr(), call.filters = filters.const_data_ptr(), call.y = y.mutable_data_ptr();

  // Measured: the second-level cache holds a chunk's tiles where filters are small; where they are not, each reading of
  // them has to serve many tiles. Products take six rows at a time.
  const int64_t threads = torch::stable::get_num_threads();
  call.chunk = std::min<int64_t>(call.tiles(), call.C <= 128 ? 30 : 66);
  call.part = std::min<int64_t>(call.outputs(), 8);
  while (call.part > 1 && call.units() < threads) call.part = (call.part + 1) / 2;
  if (call.chunks() >= threads) {  // as many for every thread
    const int64_t even = (call.chunks() + threads - 1) / threads * threads;
    call.chunk = (call.tiles() + even - 1) / even;
  }
  static constexpr FrozenConv2dKernel* kernels[] = {frozen_conv2d_base, frozen_conv2d_avx2, frozen_conv2d_avx512,
                                                    frozen_conv2d_avx512_bf16};
  // float64 ends at AVX2, and the last is for pairs alone
  const Isa last = call.paired() ? Isa::avx512_bf16 : call.scalar == Scalar::f64 ? Isa::avx2 : Isa::avx512;
  FrozenConv2dKernel* const kernel = best_of(kernels, last);
  torch::stable::parallel_for(
      0, call.units(), 1, [&](int64_t begin, int64_t end) { kernel(call, begin, end, scratch(call.scratch_bytes())); });
  return y;
}

}  // namespace
}  // namespace pydistill

STABLE_TORCH_LIBRARY_IMPL(pydistill, CPU, m) { m.impl("frozen_conv2d", TORCH_BOX(&pydistill::frozen_conv2d)); }
