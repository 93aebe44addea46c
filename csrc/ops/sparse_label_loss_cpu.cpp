// Checks, allocation and form of the two operators on the CPU.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>

#include "../common/isa.h"
#include "../common/scratch.h"
#include "../common/tensor.h"
#include "../kernels/sparse_label_loss.h"

namespace pydistill {

using SparseLabelLossKernel = void(const SparseLabelLoss& call, int64_t begin, int64_t end, void* scratch);
SparseLabelLossKernel sparse_label_loss_base, sparse_label_loss_avx2, sparse_label_loss_avx512;

namespace {

using Call = SparseLabelLoss;

void run(const Call& call) {
  static constexpr SparseLabelLossKernel* kernels[] = {sparse_label_loss_base, sparse_label_loss_avx2,
                                                       sparse_label_loss_avx512};
  SparseLabelLossKernel* const kernel = best_of(kernels, call.scalar);
  const int64_t grain = std::max<int64_t>(1, 4096 / call.C);  // rows that are worth a thread's while
  torch::stable::parallel_for(0, call.N, grain, [&](int64_t begin, int64_t end) {
    kernel(call, begin, end, scratch(4 * call.C * (call.scalar == Scalar::f64 ? sizeof(double) : sizeof(float))));
  });
}

Call::Rows matrix(const Tensor& t, const char* name, int64_t rows, int64_t columns, const Tensor& logits) {
  check(t.dim() == 2 && t.sizes()[0] == rows && t.sizes()[1] == columns, name, ": expected [", rows, ", ", columns,
        "]");
  check(t.device() == logits.device(), name, ": expected the device of logits");
  // const is cast away: kernels write to outputs only
  return {const_cast<void*>(t.const_data_ptr()), t.strides()[0], t.strides()[1]};
}

Call describe(const Tensor& logits, const Tensor& indices, const Tensor& values, double T, int64_t tail, double step,
              bool entropy, double scale) {
  check(logits.dim() == 2, "logits: expected [N, C], got ", logits.dim(), " dimensions");
  check(tail >= 0 && tail <= 2, "tail: expected 0 (smooth), 1 (zeros) or 2 (renorm), got ", tail);
  check(T > 0, "T: expected a positive number, got ", T);
  check(indices.dim() == 2, "indices: expected [N, k], got ", indices.dim(), " dimensions");
  Call call;
  call.scalar = scalar_of(logits, "logits");
  call.tail = static_cast<Call::Tail>(tail);
  call.T = T, call.step = step, call.entropy = entropy, call.scale = scale;
  call.N = logits.sizes()[0], call.C = logits.sizes()[1], call.k = indices.sizes()[1];
  check(call.k > 0 && call.k <= call.C, "indices: expected 1 to ", call.C, " classes a row, got ", call.k);
  check(indices.scalar_type() == ScalarType::Long, "indices: expected int64");
  call.codes = values.scalar_type() == ScalarType::Byte;
  check(call.codes || values.scalar_type() == compute_type(call.scalar), "values: expected uint8 codes or ",
        call.scalar == Scalar::f64 ? "float64" : "float32");
  call.logits = matrix(logits, "logits", call.N, call.C, logits);
  call.indices = matrix(indices, "indices", call.N, call.k, logits);
  call.values = matrix(values, "values", call.N, call.k, logits);
  return call;
}

std::tuple<Tensor, Tensor> forward(const Tensor& logits, const Tensor& indices, const Tensor& values, double T,
                                   int64_t tail, double step, bool entropy, double scale, bool keep) {
  Call call = describe(logits, indices, values, T, tail, step, entropy, scale);
  Tensor loss = empty_vector(logits, compute_type(call.scalar), call.N);
  Tensor kept = empty_matrix(logits, logits.scalar_type(), call.N, keep ? call.C : 0);
  call.loss = loss.mutable_data_ptr();
  if (keep) call.grad_logits = kept.mutable_data_ptr();
  run(call);
  return {loss, kept};
}

Tensor backward(const Tensor& grad, const Tensor& logits, const Tensor& indices, const Tensor& values, double T,
                int64_t tail, double step, bool entropy, double scale) {
  Call call = describe(logits, indices, values, T, tail, step, entropy, scale);
  check(grad.dim() == 1 && grad.sizes()[0] == call.N, "grad: expected [", call.N, "]");
  check(grad.scalar_type() == compute_type(call.scalar), "grad: expected ",
        call.scalar == Scalar::f64 ? "float64" : "float32");
  check(grad.device() == logits.device(), "grad: expected the device of logits");
  call.grad = {const_cast<void*>(grad.const_data_ptr()), grad.strides()[0], 0};
  Tensor grad_logits = empty_matrix(logits, logits.scalar_type(), call.N, call.C);
  call.grad_logits = grad_logits.mutable_data_ptr();
  run(call);
  return grad_logits;
}

}  // namespace
}  // namespace pydistill

STABLE_TORCH_LIBRARY_IMPL(pydistill, CPU, m) {
  m.impl("sparse_label_loss", TORCH_BOX(&pydistill::forward));
  m.impl("sparse_label_loss_backward", TORCH_BOX(&pydistill::backward));
}
