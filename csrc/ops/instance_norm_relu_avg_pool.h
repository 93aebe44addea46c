// Checks, allocation and form of the four operators; a Backend runs the call on its device:
//   static void run(const InstanceNormReluAvgPool& call, const Tensor& x);
//   static void sum_over_batch(const void* shares, void* sum, const InstanceNormReluAvgPool& call, const Tensor& x);
// with shares [N, C] and sum [C] in the compute type.
#pragma once

#include <optional>
#include <tuple>

#include "../common/tensor.h"
#include "../kernels/instance_norm_relu_avg_pool.h"

namespace pydistill {

template <class Backend>
struct InstanceNormReluAvgPoolOps {
  using Call = InstanceNormReluAvgPool;
  using Form = Call::Form;

  static Tensor forward(const Tensor& x, const Tensor& weight, const Tensor& bias, double eps, bool relu, bool pool) {
    Call call = describe(Form::forward, x, weight, bias, eps, relu, pool);
    Tensor y = output(call, x);
    call.y = map_of(y);
    Backend::run(call, x);
    return y;
  }

  static std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_y, const Tensor& x, const Tensor& weight,
                                                     const Tensor& bias, double eps, bool relu, bool pool) {
    Call call = describe(Form::backward, x, weight, bias, eps, relu, pool);
    call.grad_y = incoming(call, grad_y, "grad_y", x);
    return run_backward(call, x);
  }

  static Tensor jvp(const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& x_t,
                    const Tensor& weight_t, const Tensor& bias_t, double eps, bool relu, bool pool) {
    Call call = describe(Form::jvp, x, weight, bias, eps, relu, pool);
    describe_direction(call, x, x_t, weight_t, bias_t);
    Tensor y_t = output(call, x);
    call.y = map_of(y_t);
    Backend::run(call, x);
    return y_t;
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor> backward_jvp(const Tensor& grad_y,
                                                                 const std::optional<Tensor>& grad_y_t, const Tensor& x,
                                                                 const Tensor& weight, const Tensor& bias,
                                                                 const Tensor& x_t, const Tensor& weight_t,
                                                                 const Tensor& bias_t, double eps, bool relu,
                                                                 bool pool) {
    Call call = describe(Form::backward_jvp, x, weight, bias, eps, relu, pool);
    describe_direction(call, x, x_t, weight_t, bias_t);
    call.grad_y = incoming(call, grad_y, "grad_y", x);
    if (grad_y_t) call.grad_y_t = incoming(call, *grad_y_t, "grad_y_t", x);
    Tensor y_t = output(call, x);
    call.y = map_of(y_t);
    auto [grad_x, grad_weight, grad_bias] = run_backward(call, x);
    return {y_t, grad_x, grad_weight, grad_bias};
  }

 private:
  static Call describe(Form form, const Tensor& x, const Tensor& weight, const Tensor& bias, double eps, bool relu,
                       bool pool) {
    check(x.dim() == 4, "x: expected [N, C, H, W], got ", x.dim(), " dimensions");
    Call call;
    call.form = form;
    call.scalar = scalar_of(x, "x");
    call.N = x.sizes()[0], call.C = x.sizes()[1], call.H = x.sizes()[2], call.W = x.sizes()[3];
    call.eps = eps, call.relu = relu, call.pool = pool;
    check(call.H >= (pool ? 2 : 1) && call.W >= (pool ? 2 : 1), "x: a ", call.H, "x", call.W, " plane is too small");
    call.x = map_of(x);
    call.weight = channels(call, weight, "weight", x);
    call.bias = channels(call, bias, "bias", x);
    return call;
  }

  static void describe_direction(Call& call, const Tensor& x, const Tensor& x_t, const Tensor& weight_t,
                                 const Tensor& bias_t) {
    check_image(x_t, "x_t", {call.N, call.C, call.H, call.W}, x);
    call.x_t = map_of(x_t);
    call.weight_t = channels(call, weight_t, "weight_t", x);
    call.bias_t = channels(call, bias_t, "bias_t", x);
  }

  static const void* channels(const Call& call, const Tensor& t, const char* name, const Tensor& x) {
    check(t.dim() == 1 && t.sizes()[0] == call.C && t.is_contiguous(), name, ": expected [", call.C, "], contiguous");
    check(t.scalar_type() == compute_type(call.scalar), name, ": expected ",
          call.scalar == Scalar::f64 ? "float64" : "float32");
    check(t.device() == x.device(), name, ": expected the device of x");
    return t.const_data_ptr();
  }

  static Tensor output(const Call& call, const Tensor& x) {
    return empty_image(x, call.N, call.C, call.pool ? call.H / 2 : call.H, call.pool ? call.W / 2 : call.W);
  }

  static Map incoming(const Call& call, const Tensor& t, const char* name, const Tensor& x) {
    check_image(t, name, {call.N, call.C, call.pool ? call.H / 2 : call.H, call.pool ? call.W / 2 : call.W}, x);
    return map_of(t);
  }

  static std::tuple<Tensor, Tensor, Tensor> run_backward(Call& call, const Tensor& x) {
    const ScalarType type = compute_type(call.scalar);
    Tensor grad_x = empty_image(x, call.N, call.C, call.H, call.W);
    Tensor weight_shares = empty_matrix(x, type, call.N, call.C), bias_shares = empty_matrix(x, type, call.N, call.C);
    call.grad_x = map_of(grad_x);
    call.grad_weight = weight_shares.mutable_data_ptr();
    call.grad_bias = bias_shares.mutable_data_ptr();
    Backend::run(call, x);
    Tensor grad_weight = empty_vector(x, type, call.C), grad_bias = empty_vector(x, type, call.C);
    Backend::sum_over_batch(call.grad_weight, grad_weight.mutable_data_ptr(), call, x);
    Backend::sum_over_batch(call.grad_bias, grad_bias.mutable_data_ptr(), call, x);
    return {grad_x, grad_weight, grad_bias};
  }
};

}  // namespace pydistill
