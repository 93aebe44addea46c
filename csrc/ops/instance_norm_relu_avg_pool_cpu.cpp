#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "../common/isa.h"
#include "../common/scratch.h"
#include "instance_norm_relu_avg_pool.h"

namespace pydistill {

using Kernel = void(const InstanceNormReluAvgPool& call, int64_t begin, int64_t end, void* scratch);
Kernel instance_norm_relu_avg_pool_base, instance_norm_relu_avg_pool_avx2, instance_norm_relu_avg_pool_avx512;

namespace {

struct Cpu {
  static void run(const InstanceNormReluAvgPool& call, const Tensor&) {
    static constexpr Kernel* kernels[] = {instance_norm_relu_avg_pool_base, instance_norm_relu_avg_pool_avx2,
                                          instance_norm_relu_avg_pool_avx512};
    Kernel* const kernel = best_of(kernels, call.scalar);
    const int64_t lanes = call.scalar == Scalar::f64 ? 8 : 16;
    const int64_t units = call.N * ((call.C + lanes - 1) / lanes);  // of one sample and `lanes` channels each
    const int64_t plane = call.H * call.W;
    const int64_t grain = std::max<int64_t>(1, 2048 / plane);  // units that are worth a thread's while
    torch::stable::parallel_for(0, units, grain, [&](int64_t begin, int64_t end) {
      kernel(call, begin, end, scratch(5 * plane * 64));  // at most five panels of 64-byte vectors
    });
  }

  static void sum_over_batch(const void* shares, void* sum, const InstanceNormReluAvgPool& call, const Tensor&) {
    call.scalar == Scalar::f64 ? sum_rows<double>(shares, sum, call.N, call.C)
                               : sum_rows<float>(shares, sum, call.N, call.C);
  }

 private:
  template <class T>
  static void sum_rows(const void* rows, void* sum, int64_t N, int64_t C) {
    double* const total = static_cast<double*>(scratch(C * sizeof(double)));
    std::fill(total, total + C, 0.0);
    for (int64_t n = 0; n < N; ++n)
      for (int64_t c = 0; c < C; ++c) total[c] += static_cast<const T*>(rows)[n * C + c];
    for (int64_t c = 0; c < C; ++c) static_cast<T*>(sum)[c] = static_cast<T>(total[c]);
  }
};

using Ops = InstanceNormReluAvgPoolOps<Cpu>;

}  // namespace
}  // namespace pydistill

STABLE_TORCH_LIBRARY_IMPL(pydistill, CPU, m) {
  m.impl("instance_norm_relu_avg_pool", TORCH_BOX(&pydistill::Ops::forward));
  m.impl("instance_norm_relu_avg_pool_backward", TORCH_BOX(&pydistill::Ops::backward));
  m.impl("instance_norm_relu_avg_pool_jvp", TORCH_BOX(&pydistill::Ops::jvp));
  m.impl("instance_norm_relu_avg_pool_backward_jvp", TORCH_BOX(&pydistill::Ops::backward_jvp));
}
