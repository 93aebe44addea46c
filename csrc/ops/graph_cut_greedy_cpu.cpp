#include <torch/csrc/stable/library.h>

#include "../common/isa.h"
#include "../common/tensor.h"
#include "../kernels/graph_cut_greedy.h"

namespace pydistill {

using GraphCutGreedyKernel = void(GraphCutGreedy& call, int64_t begin, int64_t end);
GraphCutGreedyKernel graph_cut_greedy_base, graph_cut_greedy_avx2, graph_cut_greedy_avx512;

namespace {

Tensor graph_cut_greedy(const Tensor& embeddings, const std::optional<Tensor>& factors, double lam, int64_t budget) {
  check(embeddings.dim() == 2, "embeddings: expected [N, d], got ", embeddings.dim(), " dimensions");
  GraphCutGreedy call;
  call.scalar = scalar_of(embeddings, "embeddings");
  check(call.scalar == Scalar::f32 || call.scalar == Scalar::f64, "embeddings: expected float32 or float64");
  call.N = embeddings.sizes()[0], call.d = embeddings.sizes()[1], call.lam = lam, call.budget = budget;
  check(budget >= 0 && budget <= call.N, "budget: expected 0..", call.N, ", got ", budget);
  const Tensor rows = torch::stable::contiguous(embeddings);
  call.embeddings = rows.const_data_ptr();
  std::optional<Tensor> factor_rows;
  if (factors) {
    check(factors->dim() == 2 && factors->sizes()[0] == call.N && factors->sizes()[1] > 0, "factors: expected [",
          call.N, ", C]");
    check(factors->scalar_type() == embeddings.scalar_type() && factors->device() == embeddings.device(),
          "factors: expected the dtype and device of embeddings");
    factor_rows = torch::stable::contiguous(*factors);
    call.C = factors->sizes()[1];
    call.factors = factor_rows->const_data_ptr();
  }

  Tensor picks = empty_vector(embeddings, ScalarType::Long, budget);
  call.picks = picks.mutable_data_ptr<int64_t>();
  if (budget == 0) return picks;
  Tensor near = empty_vector(embeddings, ScalarType::Long, call.N);
  call.near = near.mutable_data_ptr<int64_t>();
  const auto doubles = [&](int64_t count) { return empty_vector(embeddings, ScalarType::Double, count); };
  Tensor moved = doubles(call.C * (call.d + 1)), along = doubles(call.directions() * call.N),
         of_samples = doubles(5 * call.N);
  call.moved = moved.mutable_data_ptr<double>();
  call.along = along.mutable_data_ptr<double>(), call.gain = of_samples.mutable_data_ptr<double>();
  call.estimate = call.gain + call.N, call.outside = call.estimate + call.N, call.exact = call.outside + call.N;
  call.scale = call.exact + call.N;

  static constexpr GraphCutGreedyKernel* kernels[] = {graph_cut_greedy_base, graph_cut_greedy_avx2,
                                                      graph_cut_greedy_avx512};
  GraphCutGreedyKernel* const kernel = best_of(kernels);
  const auto over = [&](GraphCutGreedy::Form form, int64_t count, int64_t grain) {
    call.form = form;
    torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) { kernel(call, begin, end); });
  };
  const int64_t grain = 1 + (int64_t{1} << 16) / (call.C * (call.d + 1));
  over(GraphCutGreedy::Form::scale, call.N, grain);
  over(GraphCutGreedy::Form::total, call.panels(), 1);
  while (call.picked < budget) {
    over(GraphCutGreedy::Form::pass, call.N, grain);
    call.form = GraphCutGreedy::Form::pick;
    kernel(call, 0, 1);
  }
  return picks;
}

}  // namespace
}  // namespace pydistill

STABLE_TORCH_LIBRARY_IMPL(pydistill, CPU, m) { m.impl("graph_cut_greedy", TORCH_BOX(&pydistill::graph_cut_greedy)); }
