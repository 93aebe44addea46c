#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "../common/isa.h"
#include "../common/scratch.h"
#include "../common/tensor.h"
#include "../kernels/attention_map.h"

namespace pydistill {

using AttentionMapKernel = void(const AttentionMap& call, int64_t begin, int64_t end, void* scratch);
AttentionMapKernel attention_map_base, attention_map_avx2, attention_map_avx512;

namespace {

void run(const AttentionMap& call) {
  static constexpr AttentionMapKernel* kernels[] = {attention_map_base, attention_map_avx2, attention_map_avx512};
  AttentionMapKernel* const kernel = best_of(kernels, call.scalar);
  const int64_t size = std::max<int64_t>(1, call.outer * call.inner);
  torch::stable::parallel_for(0, call.N, std::max<int64_t>(1, 32768 / size), [&](int64_t begin, int64_t end) {
    kernel(call, begin, end, scratch((call.inner + 16) * sizeof(double)));
  });
}

// t in the layout of `like`: itself, or a copy.
Tensor dense(const Tensor& t, const Tensor& like) {
  if (is_channels_last(like) ? is_channels_last(t) : t.is_contiguous()) return t;
  const auto size = t.sizes();
  Tensor copy = empty_image(like, size[0], size[1], size[2], size[3]);
  torch::stable::copy_(copy, t);
  return copy;
}

// x is dense; factor is made dense.
AttentionMap describe(const Tensor& x, std::optional<Tensor>& factor, double power, int64_t order) {
  AttentionMap call;
  call.scalar = scalar_of(x, "x");
  const bool last = is_channels_last(x);
  const auto sizes = x.sizes();
  call.N = sizes[0];
  call.outer = last ? sizes[2] * sizes[3] : sizes[1];
  call.inner = last ? sizes[1] : sizes[2] * sizes[3];
  call.power = power, call.order = order;
  check(power > 0 && order >= 0, "power: expected a positive number, got ", power);
  call.x = x.const_data_ptr();
  if (factor) {
    check_image(*factor, "factor", {sizes[0], sizes[1], sizes[2], sizes[3]}, x);
    factor = dense(*factor, x);
    call.factor = factor->const_data_ptr();
  }
  return call;
}

std::tuple<Tensor, Tensor> attention_map(const Tensor& any, std::optional<Tensor> factor, double power, int64_t order,
                                         bool spatial, bool channel) {
  check(any.dim() == 4, "x: expected [N, C, H, W], got ", any.dim(), " dimensions");
  const Tensor x = dense(any, any);
  AttentionMap call = describe(x, factor, power, order);
  const ScalarType type = compute_type(call.scalar);
  const bool last = is_channels_last(x);
  // an empty tensor stands for "not wanted": an operator cannot return nothing
  Tensor by_position = empty_matrix(x, type, call.N, spatial ? x.sizes()[2] * x.sizes()[3] : 0);
  Tensor by_channel = empty_matrix(x, type, call.N, channel ? x.sizes()[1] : 0);
  void* const at_position = spatial ? by_position.mutable_data_ptr() : nullptr;
  void* const at_channel = channel ? by_channel.mutable_data_ptr() : nullptr;
  call.over_outer = last ? at_channel : at_position;
  call.over_inner = last ? at_position : at_channel;
  run(call);
  return {by_position, by_channel};
}

Tensor attention_map_adjoint(std::optional<Tensor> spatial, std::optional<Tensor> channel, const Tensor& any,
                             std::optional<Tensor> factor, double power, int64_t order) {
  check(any.dim() == 4, "x: expected [N, C, H, W], got ", any.dim(), " dimensions");
  const Tensor x = dense(any, any);
  AttentionMap call = describe(x, factor, power, order);
  const bool last = is_channels_last(x);
  const auto take = [&](std::optional<Tensor>& map, const char* name, int64_t width) -> void* {
    if (!map) return nullptr;
    check(map->dim() == 2 && map->sizes()[0] == call.N && map->sizes()[1] == width &&
              map->scalar_type() == compute_type(call.scalar),
          name, ": expected [", call.N, ", ", width, "] of the dtype of maps");
    map = torch::stable::contiguous(*map);
    return const_cast<void*>(map->const_data_ptr());  // only read
  };
  void* const at_position = take(spatial, "spatial", x.sizes()[2] * x.sizes()[3]);
  void* const at_channel = take(channel, "channel", x.sizes()[1]);
  call.over_outer = last ? at_channel : at_position;
  call.over_inner = last ? at_position : at_channel;
  Tensor out = empty_image(x, x.sizes()[0], x.sizes()[1], x.sizes()[2], x.sizes()[3]);
  call.out = out.mutable_data_ptr();
  call.adjoint = true;
  run(call);
  return out;
}

}  // namespace
}  // namespace pydistill

STABLE_TORCH_LIBRARY_IMPL(pydistill, CPU, m) {
  m.impl("attention_map", TORCH_BOX(&pydistill::attention_map));
  m.impl("attention_map_adjoint", TORCH_BOX(&pydistill::attention_map_adjoint));
}
