#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <tuple>

#include "../common/isa.h"
#include "../common/scratch.h"
#include "../common/tensor.h"
#include "../kernels/attention_map_divergence.h"

namespace pydistill {

using AttentionMapDivergenceKernel = void(const AttentionMapDivergence& call, int64_t begin, int64_t end,
                                          void* scratch);
AttentionMapDivergenceKernel attention_map_divergence_base, attention_map_divergence_avx2,
    attention_map_divergence_avx512;

namespace {

using Call = AttentionMapDivergence;

template <int D>
Tensor empty_of(const Tensor& like, ScalarType type, const int64_t (&shape)[D]) {
  return torch::stable::empty(torch::headeronly::IntHeaderOnlyArrayRef(shape, D), type, std::nullopt, like.device());
}

Call::Heads heads(const Tensor& t, const char* name, const Tensor& like, int64_t A, int64_t H, int64_t rows,
                  int64_t width) {
  check(t.dim() == 4 && t.sizes()[0] == A && t.sizes()[1] == H && t.sizes()[2] == rows && t.sizes()[3] == width, name,
        ": expected [", A, ", ", H, ", ", rows, ", ", width, "]");
  check(t.scalar_type() == like.scalar_type(), name, ": expected the dtype of q_s");
  check(t.device() == like.device(), name, ": expected the device of q_s");
  const auto stride = t.strides();
  // const is cast away: kernels write to outputs only
  return {const_cast<void*>(t.const_data_ptr()), stride[0], stride[1], stride[2], stride[3]};
}

Call describe(const Tensor& q_s, const Tensor& k_s, const Tensor& q_t, const Tensor& k_t,
              const std::optional<Tensor>& mask, double scale_s, double scale_t, int64_t kind, double beta) {
  for (const Tensor* t : {&q_s, &k_s, &q_t, &k_t}) check(t->dim() == 4, "queries and keys: expected four dimensions");
  check(kind >= 0 && kind <= 3, "kind: expected 0 (fkl), 1 (rkl), 2 (jsd) or 3 (ce), got ", kind);
  Call call;
  call.scalar = scalar_of(q_s, "q_s");
  call.kind = static_cast<Call::Kind>(kind);
  call.scale_s = scale_s, call.scale_t = scale_t, call.beta = beta;
  call.A = q_s.sizes()[0], call.H = q_s.sizes()[1], call.N = q_s.sizes()[2], call.M = k_s.sizes()[2];
  call.width_s = q_s.sizes()[3], call.width_t = q_t.sizes()[3];
  check(call.M > 0 && call.width_s > 0 && call.width_t > 0, "k_s: expected a key and a feature at least");
  call.q_s = heads(q_s, "q_s", q_s, call.A, call.H, call.N, call.width_s);
  call.k_s = heads(k_s, "k_s", q_s, call.A, call.H, call.M, call.width_s);
  call.q_t = heads(q_t, "q_t", q_s, call.A, call.H, call.N, call.width_t);
  call.k_t = heads(k_t, "k_t", q_s, call.A, call.H, call.M, call.width_t);
  if (mask) {
    const Tensor& m = *mask;
    check(m.scalar_type() == ScalarType::Bool, "mask: expected bool");
    check(m.dim() == 4 && m.sizes()[0] == call.A && m.sizes()[1] == call.H && m.sizes()[2] == call.N &&
              m.sizes()[3] == call.M,
          "mask: expected [", call.A, ", ", call.H, ", ", call.N, ", ", call.M, "]");
    check(m.device() == q_s.device(), "mask: expected the device of q_s");
    const auto stride = m.strides();
    call.mask = {const_cast<void*>(m.const_data_ptr()), stride[0], stride[1], stride[2], stride[3]};
  }
  return call;
}

void run_pass(const Call& call, int64_t grain) {
  static constexpr AttentionMapDivergenceKernel* kernels[] = {
      attention_map_divergence_base, attention_map_divergence_avx2, attention_map_divergence_avx512};
  AttentionMapDivergenceKernel* const kernel = best_of(kernels, call.scalar);
  torch::stable::parallel_for(0, call.tasks(), grain, [&](int64_t begin, int64_t end) {
    kernel(call, begin, end, scratch(attention_scratch_bytes(call)));
  });
}

void run(Call& call, const Tensor& like) {
  if (call.A * call.H * call.N == 0) {
    if (call.grad_k) {
      const int64_t bytes = call.scalar == Scalar::f64 ? 8 : call.scalar == Scalar::f32 ? 4 : 2;
      std::memset(call.grad_k, 0, static_cast<size_t>(call.A * call.H * call.M * call.width_s * bytes));
    }
    return;
  }
  // Few heads: their rows are divided to have work for sixteen threads. Each chunk packs the keys again, and if their
  // gradient is wanted it takes as much memory again: then no chunk has fewer rows than there are keys.
  const int64_t least = call.grad_k ? std::max<int64_t>(64, call.M) : std::max<int64_t>(64, call.M / 8);
  const int64_t wanted = (15 + call.A * call.H) / (call.A * call.H);
  call.chunks = std::clamp<int64_t>(call.N / least, 1, wanted);
  std::optional<Tensor> parts;
  if (call.grad_k && call.chunks > 1) {
    const ScalarType type = compute_type(call.scalar);
    const int64_t width = attention_padded(call.width_s, call.scalar == Scalar::f64 ? 8 : 4);
    parts = empty_of(like, type, {call.A * call.H, call.chunks, call.M, width});
    call.parts = parts->mutable_data_ptr();
  }
  run_pass(call, 1);
  if (parts) {
    call.add_parts = true;
    run_pass(call, std::max<int64_t>(1, 16384 / (call.chunks * call.width_s)));
  }
}

// An empty tensor stands for "no gradient": an operator cannot return nothing.
std::tuple<Tensor, Tensor> describe_gradients(Call& call, const Tensor& q_s, bool with_q, bool with_k) {
  const auto output = [&](bool wanted, int64_t rows, void*& data) {
    Tensor made = wanted ? empty_of(q_s, q_s.scalar_type(), {call.A, call.H, rows, call.width_s})
                         : empty_of(q_s, q_s.scalar_type(), {0});
    if (wanted) data = made.mutable_data_ptr();
    return made;
  };
  Tensor grad_q = output(with_q, call.N, call.grad_q), grad_k = output(with_k, call.M, call.grad_k);
  return {grad_q, grad_k};
}

template <class T>
void add_losses(const Tensor& rows, int64_t size, Tensor& to) {
  const T* const from = static_cast<const T*>(rows.const_data_ptr());
  double sum = 0;
  for (int64_t n = 0; n < size; ++n) sum += static_cast<double>(from[n]);
  *static_cast<T*>(to.mutable_data_ptr()) = static_cast<T>(sum);
}

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& q_s, const Tensor& k_s, const Tensor& q_t, const Tensor& k_t,
                                           const std::optional<Tensor>& mask, double scale_s, double scale_t,
                                           int64_t kind, double beta, bool summed, bool with_q, bool with_k) {
  Call call = describe(q_s, k_s, q_t, k_t, mask, scale_s, scale_t, kind, beta);
  check(summed || !(with_q || with_k), "summed: expected true where a gradient is asked for");
  const ScalarType type = compute_type(call.scalar);
  Tensor loss = empty_of(q_s, type, {call.A, call.H, call.N});
  call.loss = loss.mutable_data_ptr();
  auto [grad_q, grad_k] = describe_gradients(call, q_s, with_q, with_k);
  run(call, q_s);
  if (!summed) return {loss, grad_q, grad_k};
  Tensor total = torch::stable::empty({}, type, std::nullopt, q_s.device());
  const int64_t size = call.A * call.H * call.N;
  call.scalar == Scalar::f64 ? add_losses<double>(loss, size, total) : add_losses<float>(loss, size, total);
  return {total, grad_q, grad_k};
}

std::tuple<Tensor, Tensor> backward(const Tensor& grad, const Tensor& q_s, const Tensor& k_s, const Tensor& q_t,
                                    const Tensor& k_t, const std::optional<Tensor>& mask, double scale_s,
                                    double scale_t, int64_t kind, double beta, bool with_q, bool with_k) {
  Call call = describe(q_s, k_s, q_t, k_t, mask, scale_s, scale_t, kind, beta);
  check(grad.dim() == 3 && grad.sizes()[0] == call.A && grad.sizes()[1] == call.H && grad.sizes()[2] == call.N,
        "grad: expected [", call.A, ", ", call.H, ", ", call.N, "]");
  check(grad.scalar_type() == compute_type(call.scalar), "grad: expected ",
        call.scalar == Scalar::f64 ? "float64" : "float32");
  check(grad.device() == q_s.device(), "grad: expected the device of q_s");
  const auto stride = grad.strides();
  call.grad = {const_cast<void*>(grad.const_data_ptr()), stride[0], stride[1], stride[2], 0};
  auto gradients = describe_gradients(call, q_s, with_q, with_k);
  if (with_q || with_k) run(call, q_s);
  return gradients;
}

}  // namespace
}  // namespace pydistill

STABLE_TORCH_LIBRARY_IMPL(pydistill, CPU, m) {
  m.impl("attention_map_divergence", TORCH_BOX(&pydistill::forward));
  m.impl("attention_map_divergence_backward", TORCH_BOX(&pydistill::backward));
}
