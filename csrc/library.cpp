// Every operator's schema, on one page. Kernels are registered in ops/; fake, autograd and vmap rules in
// pydistill/ops/.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(pydistill, m) {
  m.def(
      "instance_norm_relu_avg_pool(Tensor x, Tensor weight, Tensor bias, float eps, bool relu, bool pool)"
      " -> Tensor");
  m.def(
      "instance_norm_relu_avg_pool_backward(Tensor grad_y, Tensor x, Tensor weight, Tensor bias,"
      " float eps, bool relu, bool pool) -> (Tensor, Tensor, Tensor)");
  m.def(
      "instance_norm_relu_avg_pool_jvp(Tensor x, Tensor weight, Tensor bias,"
      " Tensor x_t, Tensor weight_t, Tensor bias_t, float eps, bool relu, bool pool) -> Tensor");
  m.def(
      "instance_norm_relu_avg_pool_backward_jvp(Tensor grad_y, Tensor? grad_y_t, Tensor x, Tensor weight, Tensor bias,"
      " Tensor x_t, Tensor weight_t, Tensor bias_t, float eps, bool relu, bool pool)"
      " -> (Tensor, Tensor, Tensor, Tensor)");

  m.def("soft_cross_entropy(Tensor logits, Tensor labels, int kind) -> Tensor");
  m.def("soft_cross_entropy_backward(Tensor grad, Tensor logits, Tensor labels, int kind) -> (Tensor, Tensor)");
  m.def(
      "soft_cross_entropy_jvp(Tensor logits, Tensor labels, Tensor logits_t, Tensor labels_t, int kind)"
      " -> Tensor");
  m.def(
      "soft_cross_entropy_backward_jvp(Tensor grad, Tensor? grad_t, Tensor logits, Tensor labels,"
      " Tensor logits_t, Tensor labels_t, int kind) -> (Tensor, Tensor, Tensor)");
}
