#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "../common/isa.h"
#include "../common/tensor.h"
#include "../kernels/row_products.h"

namespace pydistill {

using RowProductsKernel = void(const RowProducts& call, int64_t begin, int64_t end);
RowProductsKernel row_products_base, row_products_avx2, row_products_avx512;

namespace {

using Form = RowProducts::Form;

// A tensor whose vectors' elements are adjacent; copies if they are not.
Tensor dense(const Tensor& t) { return t.strides()[1] == 1 ? t : torch::stable::contiguous(t); }

// One call, and the tensors that must live as long as it runs.
class Run {
 public:
  Run(Form form, const Tensor& a, const Tensor& b, const std::vector<int64_t>& rows) : like_(a) {
    check(a.dim() == 2, "a: expected [K, P], got ", a.dim(), " dimensions");
    call_.form = form;
    call_.scalar = scalar_of(a, "a");
    call_.K = a.sizes()[0];
    call_.a = take(a, "a"), call_.b = take(b, "b");
    describe(rows);
  }

  RowProducts::Vectors take(const Tensor& t, const char* name) {
    check(t.dim() == 2 && t.sizes()[0] == like_.sizes()[0] && t.sizes()[1] == like_.sizes()[1], name,
          ": expected the shape of a");
    check(t.scalar_type() == like_.scalar_type() && t.device() == like_.device(), name,
          ": expected the dtype and device of a");
    kept_.push_back(dense(t));
    // const is cast away: kernels write to outputs only
    return {const_cast<void*>(kept_.back().const_data_ptr()), kept_.back().strides()[0]};
  }

  Tensor products() {
    const int64_t shape[] = {call_.K, call_.R, 4};
    Tensor out = torch::stable::empty(torch::headeronly::IntHeaderOnlyArrayRef(shape, 3), compute_type(call_.scalar),
                                      std::nullopt, like_.device());
    call_.products = out.mutable_data_ptr();
    run();
    return out;
  }

  Tensor products_along(const Tensor& a_t, const Tensor& b_t) {
    call_.a_t = take(a_t, "a_t"), call_.b_t = take(b_t, "b_t");
    return products();
  }

  std::tuple<Tensor, Tensor> gradients(const Tensor& grad) {
    check(grad.dim() == 3 && grad.sizes()[0] == call_.K && grad.sizes()[1] == call_.R && grad.sizes()[2] == 4,
          "grad: expected [", call_.K, ", ", call_.R, ", 4]");
    check(grad.scalar_type() == compute_type(call_.scalar) && grad.device() == like_.device(),
          "grad: expected float32 (float64 for float64) on the device of a");
    const Tensor dense_grad = torch::stable::contiguous(grad);
    call_.grad = dense_grad.const_data_ptr();
    const int64_t P = like_.sizes()[1];
    Tensor grad_a = empty_matrix(like_, like_.scalar_type(), call_.K, P);
    Tensor grad_b = empty_matrix(like_, like_.scalar_type(), call_.K, P);
    call_.grad_a = {grad_a.mutable_data_ptr(), P}, call_.grad_b = {grad_b.mutable_data_ptr(), P};
    run();
    return {grad_a, grad_b};
  }

 private:
  // The blocks; in backward also the gaps between them, whose elements belong to no row.
  void describe(const std::vector<int64_t>& rows) {
    check(rows.size() % 3 == 0, "rows: expected (start, count, length) triples, got ", rows.size(), " numbers");
    const int64_t P = like_.sizes()[1];
    int64_t end = 0;
    const auto skip_to = [&](int64_t start) {
      if (call_.form == Form::backward && start > end) blocks_.push_back({end, 1, start - end, -1});
    };
    for (std::size_t i = 0; i < rows.size(); i += 3) {
      const int64_t start = rows[i], count = rows[i + 1], length = rows[i + 2];
      check(start >= end && count >= 0 && length >= 0 && (length == 0 || count <= (P - start) / length) && start <= P,
            "rows: expected blocks one behind the other within ", P, " elements, got start ", start, ", count ", count,
            ", length ", length, " behind element ", end);
      skip_to(start);
      blocks_.push_back({start, count, length, call_.R});
      call_.R += count, end = start + count * length;
    }
    skip_to(P);
    for (const RowProducts::Block& block : blocks_) call_.units += block.count;
    call_.blocks = blocks_.data();
  }

  void run() {
    static constexpr RowProductsKernel* kernels[] = {row_products_base, row_products_avx2, row_products_avx512};
    RowProductsKernel* const kernel = best_of(kernels, call_.scalar);
    if (call_.units == 0) return;
    const int64_t length = std::max<int64_t>(1, like_.sizes()[1] / call_.units);
    const int64_t grain = std::max<int64_t>(1, 16384 / length);  // rows that are worth a thread's while
    torch::stable::parallel_for(0, call_.K * call_.units, grain,
                                [&](int64_t begin, int64_t end) { kernel(call_, begin, end); });
  }

  Tensor like_;
  std::vector<Tensor> kept_;
  std::vector<RowProducts::Block> blocks_;
  RowProducts call_;
};

Tensor row_products(const Tensor& a, const Tensor& b, std::vector<int64_t> rows) {
  return Run(Form::forward, a, b, rows).products();
}

std::tuple<Tensor, Tensor> row_products_backward(const Tensor& grad, const Tensor& a, const Tensor& b,
                                                 std::vector<int64_t> rows) {
  return Run(Form::backward, a, b, rows).gradients(grad);
}

Tensor row_products_jvp(const Tensor& a, const Tensor& b, const Tensor& a_t, const Tensor& b_t,
                        std::vector<int64_t> rows) {
  return Run(Form::jvp, a, b, rows).products_along(a_t, b_t);
}

}  // namespace
}  // namespace pydistill

STABLE_TORCH_LIBRARY_IMPL(pydistill, CPU, m) {
  m.impl("row_products", TORCH_BOX(&pydistill::row_products));
  m.impl("row_products_backward", TORCH_BOX(&pydistill::row_products_backward));
  m.impl("row_products_jvp", TORCH_BOX(&pydistill::row_products_jvp));
}
