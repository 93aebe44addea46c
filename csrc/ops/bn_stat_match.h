// Checks, allocation and passes of the two operators; a Backend runs them on its device:
//   static int64_t tile(const BnStatMatch& call);                      positions per tile
//   static void run(const BnStatMatch& call, const Tensor& x);         the call's pass
//   static void allocated(Tensor& planes);                             gets an output before it is written
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/headeronly/util/shim_utils.h>

#include <array>
#include <optional>
#include <tuple>

#include "../common/tensor.h"
#include "../kernels/bn_stat_match.h"

namespace pydistill {

inline const void* per_channel(const BnStatMatch& call, const Tensor& t, int64_t dim, const char* name,
                               const Tensor& x) {
  check(t.dim() == dim + 1 && t.sizes()[dim] == call.C && t.is_contiguous(), name, ": expected ", call.C,
        " channels, contiguous");
  check(t.scalar_type() == compute_type(call.scalar), name, ": expected ",
        call.scalar == Scalar::f64 ? "float64" : "float32");
  check(t.device() == x.device(), name, ": expected the device of x");
  return t.const_data_ptr();
}

inline const void* of_statistics(const BnStatMatch& call, const Tensor& t, const Tensor& x) {
  check(t.dim() == 2 && t.sizes()[0] == 2 && t.is_contiguous(), "grad_statistics: expected [2, ", call.C,
        "], contiguous");
  return per_channel(call, t, 1, "grad_statistics", x);
}

template <class Backend>
struct BnStatMatchOps {
  using Call = BnStatMatch;
  using Pass = Call::Pass;

  static std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& x, const std::optional<Tensor>& residual,
                                                    const std::optional<Tensor>& scale,
                                                    const std::optional<Tensor>& shift, bool relu) {
    Call call = describe(x, residual, scale, shift, relu);
    const ScalarType compute = compute_type(call.scalar);
    Tensor y = scale ? empty_planes(x) : empty_vector(x, x.scalar_type(), 0);
    Tensor statistics = empty_matrix(x, compute, 2, call.C), kept_mean = empty_vector(x, compute, call.C);
    if (scale) call.y = planes_of(y);
    call.statistics = statistics.mutable_data_ptr();
    call.kept_mean = kept_mean.mutable_data_ptr();
    shape(call);
    Tensor partial = empty_matrix(x, compute, call.tiles() * 3, call.C);
    call.partial = partial.mutable_data_ptr();
    call.pass = Pass::tiles;
    Backend::run(call, x);
    call.pass = Pass::merge;
    Backend::run(call, x);
    return {y, statistics, kept_mean};
  }

  static std::tuple<Tensor, Tensor> backward(const std::optional<Tensor>& grad_y, const Tensor& grad_statistics,
                                             const Tensor& x, const std::optional<Tensor>& residual,
                                             const std::optional<Tensor>& scale, const std::optional<Tensor>& shift,
                                             const Tensor& mean, bool relu) {
    Call call = describe(x, residual, scale, shift, relu);
    call.pass = Pass::backward;
    check(!grad_y || scale, "grad_y: expected none without a scale");
    if (grad_y) call.grad_y = planes(call, *grad_y, "grad_y", x);
    call.grad_statistics = of_statistics(call, grad_statistics, x);
    call.mean = per_channel(call, mean, 0, "mean", x);
    Tensor grad_x = empty_planes(x);
    call.grad_x = planes_of(grad_x);
    Tensor grad_residual = residual && grad_y ? empty_planes(x) : empty_vector(x, x.scalar_type(), 0);
    if (residual && grad_y) call.grad_residual = planes_of(grad_residual);
    shape(call);
    Backend::run(call, x);
    return {grad_x, grad_residual};
  }

 private:
  static Call describe(const Tensor& x, const std::optional<Tensor>& residual, const std::optional<Tensor>& scale,
                       const std::optional<Tensor>& shift, bool relu) {
    check(x.dim() == 3, "x: expected [N, C, P], got ", x.dim(), " dimensions");
    Call call;
    call.scalar = scalar_of(x, "x");
    call.relu = relu;
    call.N = x.sizes()[0], call.C = x.sizes()[1], call.P = x.sizes()[2];
    check(call.N > 0 && call.C > 0 && call.P > 0, "x: expected at least one element");
    call.M = call.N * call.P;
    call.x = planes_of(x);
    check(scale.has_value() == shift.has_value(), "shift: expected together with scale");
    check(scale || !residual, "residual: expected none without a scale");
    if (residual) call.residual = planes(call, *residual, "residual", x);
    if (scale) {
      call.scale = per_channel(call, *scale, 0, "scale", x);
      call.shift = per_channel(call, *shift, 0, "shift", x);
    }
    return call;
  }

  static Call::Planes planes_of(const Tensor& t) {
    // const is cast away: kernels write to outputs only
    return {const_cast<void*>(t.const_data_ptr()), t.strides()[0], t.strides()[1], t.strides()[2]};
  }

  static Call::Planes planes(const Call& call, const Tensor& t, const char* name, const Tensor& x) {
    check(t.dim() == 3 && t.sizes()[0] == call.N && t.sizes()[1] == call.C && t.sizes()[2] == call.P, name,
          ": expected [", call.N, ", ", call.C, ", ", call.P, "] as x");
    check(t.scalar_type() == x.scalar_type(), name, ": expected the dtype of x");
    check(t.device() == x.device(), name, ": expected the device of x");
    return planes_of(t);
  }

  // Uninitialised, of x's shape: channels adjacent if they are in x, else positions.
  static Tensor empty_planes(const Tensor& x) {
    const int64_t N = x.sizes()[0], C = x.sizes()[1], P = x.sizes()[2];
    const bool rows = x.strides()[1] == 1 && C > 1 && P > 1;
    const int64_t shape[] = {N, C, P}, strides[] = {C * P, rows ? 1 : P, rows ? C : 1};
    // not an empty, transposed tensor: autograd would take that for a view
    int32_t type, device, index;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &type));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(x.get(), &device));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(x.get(), &index));
    AtenTensorHandle handle = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(3, shape, strides, type, device, index, &handle));
    Tensor t(handle);
    Backend::allocated(t);
    return t;
  }

  // One sample of all positions if samples follow one another in every tensor; then the tiles.
  static void shape(Call& call) {
    if (call.P == 1) {  // the stride of positions has no meaning: treat samples as positions
      for (Call::Planes* each : all(call)) each->p = each->n;
      call.P = call.N, call.N = 1;
    }
    bool flat = true;
    for (const Call::Planes* each : all(call)) flat &= !each->data || each->n == call.P * each->p;
    if (flat && call.N > 1) call.P *= call.N, call.N = 1;
    call.tile = Backend::tile(call);
  }

  static std::array<Call::Planes*, 6> all(Call& call) {
    return {&call.x, &call.residual, &call.y, &call.grad_y, &call.grad_x, &call.grad_residual};
  }
};

}  // namespace pydistill
