// Checks, allocation and form of the four operators; a Backend runs the call on its device:
//   static void run(const SoftCrossEntropy& call, const Tensor& logits);
#pragma once

#include <optional>
#include <tuple>

#include "../common/tensor.h"
#include "../kernels/soft_cross_entropy.h"

namespace pydistill {

template <class Backend>
struct SoftCrossEntropyOps {
  using Call = SoftCrossEntropy;
  using Form = Call::Form;
  using Kind = Call::Kind;

  static Tensor forward(const Tensor& logits, const Tensor& labels, int64_t kind) {
    Call call = describe(Form::forward, logits, labels, kind);
    Tensor loss = empty_vector(logits, compute_type(call.scalar), call.N);
    call.loss = loss.mutable_data_ptr();
    Backend::run(call, logits);
    return loss;
  }

  static std::tuple<Tensor, Tensor> backward(const Tensor& grad, const Tensor& logits, const Tensor& labels,
                                             int64_t kind) {
    Call call = describe(Form::backward, logits, labels, kind);
    call.grad = incoming(call, grad, "grad", logits);
    return run_backward(call, logits);
  }

  static Tensor jvp(const Tensor& logits, const Tensor& labels, const Tensor& logits_t, const Tensor& labels_t,
                    int64_t kind) {
    Call call = describe(Form::jvp, logits, labels, kind);
    describe_direction(call, logits, logits_t, labels_t);
    Tensor loss_t = empty_vector(logits, compute_type(call.scalar), call.N);
    call.loss = loss_t.mutable_data_ptr();
    Backend::run(call, logits);
    return loss_t;
  }

  static std::tuple<Tensor, Tensor, Tensor> backward_jvp(const Tensor& grad, const std::optional<Tensor>& grad_t,
                                                         const Tensor& logits, const Tensor& labels,
                                                         const Tensor& logits_t, const Tensor& labels_t, int64_t kind) {
    Call call = describe(Form::backward_jvp, logits, labels, kind);
    describe_direction(call, logits, logits_t, labels_t);
    call.grad = incoming(call, grad, "grad", logits);
    if (grad_t) call.grad_t = incoming(call, *grad_t, "grad_t", logits);
    Tensor loss_t = empty_vector(logits, compute_type(call.scalar), call.N);
    call.loss = loss_t.mutable_data_ptr();
    auto [grad_logits, grad_labels] = run_backward(call, logits);
    return {loss_t, grad_logits, grad_labels};
  }

 private:
  static Call describe(Form form, const Tensor& logits, const Tensor& labels, int64_t kind) {
    check(logits.dim() == 2, "logits: expected [N, K], got ", logits.dim(), " dimensions");
    check(kind >= 0 && kind <= 2, "kind: expected 0 (hard), 1 (logits) or 2 (probs), got ", kind);
    Call call;
    call.form = form;
    call.scalar = scalar_of(logits, "logits");
    call.kind = static_cast<Kind>(kind);
    call.N = logits.sizes()[0], call.K = logits.sizes()[1];
    check(call.K > 0, "logits: expected at least one class");
    call.logits = rows(call, logits, "logits", logits);
    if (call.kind == Kind::hard) {
      check(labels.dim() == 1 && labels.sizes()[0] == call.N, "labels: expected [", call.N, "]");
      check(labels.scalar_type() == ScalarType::Long, "labels: expected int64");
      check(labels.device() == logits.device(), "labels: expected the device of logits");
      call.labels = {const_cast<void*>(labels.const_data_ptr()), labels.strides()[0], 0};
    } else {
      call.labels = rows(call, labels, "labels", logits);
    }
    return call;
  }

  static void describe_direction(Call& call, const Tensor& logits, const Tensor& logits_t, const Tensor& labels_t) {
    call.logits_t = rows(call, logits_t, "logits_t", logits);
    if (call.kind != Kind::hard) call.labels_t = rows(call, labels_t, "labels_t", logits);
  }

  static Call::Rows rows(const Call& call, const Tensor& t, const char* name, const Tensor& logits) {
    check(t.dim() == 2 && t.sizes()[0] == call.N && t.sizes()[1] == call.K, name, ": expected [", call.N, ", ", call.K,
          "]");
    check(t.scalar_type() == logits.scalar_type(), name, ": expected the dtype of logits");
    check(t.device() == logits.device(), name, ": expected the device of logits");
    // const is cast away: kernels write to outputs only
    return {const_cast<void*>(t.const_data_ptr()), t.strides()[0], t.strides()[1]};
  }

  static Call::Rows incoming(const Call& call, const Tensor& t, const char* name, const Tensor& logits) {
    check(t.dim() == 1 && t.sizes()[0] == call.N, name, ": expected [", call.N, "]");
    check(t.scalar_type() == compute_type(call.scalar), name, ": expected ",
          call.scalar == Scalar::f64 ? "float64" : "float32");
    check(t.device() == logits.device(), name, ": expected the device of logits");
    return {const_cast<void*>(t.const_data_ptr()), t.strides()[0], 0};
  }

  static std::tuple<Tensor, Tensor> run_backward(Call& call, const Tensor& logits) {
    Tensor grad_logits = empty_matrix(logits, logits.scalar_type(), call.N, call.K);
    // an empty tensor stands for "no gradient": an operator cannot return nothing
    Tensor grad_labels = empty_matrix(logits, logits.scalar_type(), call.N, call.kind == Kind::hard ? 0 : call.K);
    call.grad_logits = grad_logits.mutable_data_ptr();
    call.grad_labels = grad_labels.mutable_data_ptr();
    Backend::run(call, logits);
    return {grad_logits, grad_labels};
  }
};

}  // namespace pydistill
