// Checks, allocation and form of the four operators on the CPU.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "../common/isa.h"
#include "../common/scratch.h"
#include "../common/tensor.h"
#include "../kernels/kd_divergence.h"

namespace pydistill {

using KdDivergenceKernel = void(const KdDivergence& call, int64_t begin, int64_t end, void* scratch);
KdDivergenceKernel kd_divergence_base, kd_divergence_avx2, kd_divergence_avx512;

namespace {

using Call = KdDivergence;
using Form = Call::Form;
using Kind = Call::Kind;

void run(const Call& call) {
  static constexpr KdDivergenceKernel* kernels[] = {kd_divergence_base, kd_divergence_avx2, kd_divergence_avx512};
  KdDivergenceKernel* const kernel = best_of(kernels, call.scalar);
  const int64_t grain = std::max<int64_t>(1, 4096 / call.C);  // rows that are worth a thread's while
  torch::stable::parallel_for(0, call.N, grain, [&](int64_t begin, int64_t end) {
    kernel(call, begin, end, scratch(10 * call.C * (call.scalar == Scalar::f64 ? sizeof(double) : sizeof(float))));
  });
}

Call::Rows matrix(const Call& call, const Tensor& t, const char* name, const Tensor& student) {
  check(t.dim() == 2 && t.sizes()[0] == call.N && t.sizes()[1] == call.C, name, ": expected [", call.N, ", ", call.C,
        "]");
  check(t.device() == student.device(), name, ": expected the device of student");
  // const is cast away: kernels write to outputs only
  return {const_cast<void*>(t.const_data_ptr()), t.strides()[0], t.strides()[1]};
}

Call::Rows vector(const Call& call, const Tensor& t, const char* name, ScalarType type, const Tensor& student) {
  check(t.dim() == 1 && t.sizes()[0] == call.N, name, ": expected [", call.N, "]");
  check(t.scalar_type() == type, name, ": expected ",
        type == ScalarType::Long     ? "int64"
        : type == ScalarType::Double ? "float64"
                                     : "float32");
  check(t.device() == student.device(), name, ": expected the device of student");
  return {const_cast<void*>(t.const_data_ptr()), t.strides()[0], 0};
}

Call describe(Form form, const Tensor& student, const std::optional<Tensor>& target,
              const std::optional<Tensor>& labels, int64_t kind, bool probs, double T, double scale, double ce_weight,
              double beta, double gamma) {
  check(student.dim() == 2, "student: expected [N, C], got ", student.dim(), " dimensions");
  check(kind >= 0 && kind <= static_cast<int>(Kind::ofa), "kind: expected 0..6, got ", kind);
  check(T > 0, "T: expected a positive number, got ", T);
  Call call;
  call.form = form;
  call.kind = static_cast<Kind>(kind);
  call.scalar = scalar_of(student, "student");
  call.probs = probs;
  call.T = T, call.scale = scale, call.ce_weight = ce_weight, call.beta = beta, call.gamma = gamma;
  call.N = student.sizes()[0], call.C = student.sizes()[1];
  check(call.C > 0, "student: expected at least one class");
  call.student = matrix(call, student, "student", student);
  check(target.has_value() == (call.kind != Kind::ce), "target: expected none for ce, and one for every other kind");
  if (target) {
    call.target_scalar = scalar_of(*target, "target");
    check((call.target_scalar == Scalar::f64) == (call.scalar == Scalar::f64),
          "target: expected float64 where student is, and only there");
    call.target = matrix(call, *target, "target", student);
  }
  check(labels || (call.kind != Kind::ce && call.kind != Kind::ofa && ce_weight == 0),
        "labels: expected class numbers for ce, ofa and a ce_weight");
  if (labels) call.labels = vector(call, *labels, "labels", ScalarType::Long, student);
  return call;
}

void direct(Call& call, const Tensor& student, const Tensor& student_t) {
  check(student_t.scalar_type() == student.scalar_type(), "student_t: expected the dtype of student");
  call.student_t = matrix(call, student_t, "student_t", student);
}

std::tuple<Tensor, Tensor> forward(const Tensor& student, const std::optional<Tensor>& target,
                                   const std::optional<Tensor>& labels, int64_t kind, bool probs, double T,
                                   double scale, double ce_weight, double beta, double gamma, bool keep) {
  Call call = describe(Form::forward, student, target, labels, kind, probs, T, scale, ce_weight, beta, gamma);
  Tensor loss = empty_vector(student, compute_type(call.scalar), call.N);
  Tensor kept = empty_matrix(student, student.scalar_type(), call.N, keep ? call.C : 0);
  call.loss = loss.mutable_data_ptr();
  if (keep) call.grad_logits = kept.mutable_data_ptr();
  run(call);
  return {loss, kept};
}

Tensor backward(const Tensor& grad, const Tensor& student, const std::optional<Tensor>& target,
                const std::optional<Tensor>& labels, int64_t kind, bool probs, double T, double scale, double ce_weight,
                double beta, double gamma) {
  Call call = describe(Form::backward, student, target, labels, kind, probs, T, scale, ce_weight, beta, gamma);
  call.grad = vector(call, grad, "grad", compute_type(call.scalar), student);
  Tensor grad_logits = empty_matrix(student, student.scalar_type(), call.N, call.C);
  call.grad_logits = grad_logits.mutable_data_ptr();
  run(call);
  return grad_logits;
}

Tensor jvp(const Tensor& student, const std::optional<Tensor>& target, const std::optional<Tensor>& labels,
           const Tensor& student_t, int64_t kind, bool probs, double T, double scale, double ce_weight, double beta,
           double gamma) {
  Call call = describe(Form::jvp, student, target, labels, kind, probs, T, scale, ce_weight, beta, gamma);
  direct(call, student, student_t);
  Tensor loss_t = empty_vector(student, compute_type(call.scalar), call.N);
  call.loss = loss_t.mutable_data_ptr();
  run(call);
  return loss_t;
}

std::tuple<Tensor, Tensor> backward_jvp(const Tensor& grad, const std::optional<Tensor>& grad_t, const Tensor& student,
                                        const std::optional<Tensor>& target, const std::optional<Tensor>& labels,
                                        const Tensor& student_t, int64_t kind, bool probs, double T, double scale,
                                        double ce_weight, double beta, double gamma) {
  Call call = describe(Form::backward_jvp, student, target, labels, kind, probs, T, scale, ce_weight, beta, gamma);
  direct(call, student, student_t);
  call.grad = vector(call, grad, "grad", compute_type(call.scalar), student);
  if (grad_t) call.grad_t = vector(call, *grad_t, "grad_t", compute_type(call.scalar), student);
  Tensor loss_t = empty_vector(student, compute_type(call.scalar), call.N);
  Tensor grad_logits = empty_matrix(student, student.scalar_type(), call.N, call.C);
  call.loss = loss_t.mutable_data_ptr();
  call.grad_logits = grad_logits.mutable_data_ptr();
  run(call);
  return {loss_t, grad_logits};
}

}  // namespace
}  // namespace pydistill

STABLE_TORCH_LIBRARY_IMPL(pydistill, CPU, m) {
  m.impl("kd_divergence", TORCH_BOX(&pydistill::forward));
  m.impl("kd_divergence_backward", TORCH_BOX(&pydistill::backward));
  m.impl("kd_divergence_jvp", TORCH_BOX(&pydistill::jvp));
  m.impl("kd_divergence_backward_jvp", TORCH_BOX(&pydistill::backward_jvp));
}
