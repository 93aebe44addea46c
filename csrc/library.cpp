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

  m.def(
      "augment(Tensor images, Tensor record, bool flip_batch, bool align_corners, bool linear)"
      " -> Tensor");
  m.def("augment_backward(Tensor grad, Tensor record, bool flip_batch, bool align_corners) -> Tensor");

  m.def(
      "multi_crop(Tensor images, Tensor? base, Tensor record, Tensor? norm, int height, int width, bool linear)"
      " -> Tensor");
  // `images`, `height` and `width` are those of the crops' sources; a gradient that is not asked for is empty
  m.def(
      "multi_crop_backward(Tensor grad, Tensor record, Tensor? norm, int images, int height, int width,"
      " bool with_images, bool with_base) -> (Tensor, Tensor)");

  // `rows` are (start, count, length) triples: count rows of length elements, one after the other from start on.
  m.def("row_products(Tensor a, Tensor b, int[] rows) -> Tensor");
  m.def("row_products_backward(Tensor grad, Tensor a, Tensor b, int[] rows) -> (Tensor, Tensor)");
  m.def("row_products_jvp(Tensor a, Tensor b, Tensor a_t, Tensor b_t, int[] rows) -> Tensor");
  // the keys' and queries' gradients are those of the sum of the losses, and are computed if `summed`
  m.def(
      "attention_map_divergence(Tensor q_s, Tensor k_s, Tensor q_t, Tensor k_t, Tensor? mask, float scale_s,"
      " float scale_t, int kind, float beta, bool summed, bool with_q, bool with_k) -> (Tensor, Tensor, Tensor)");
  m.def(
      "attention_map_divergence_backward(Tensor grad, Tensor q_s, Tensor k_s, Tensor q_t, Tensor k_t, Tensor? mask,"
      " float scale_s, float scale_t, int kind, float beta, bool with_q, bool with_k) -> (Tensor, Tensor)");
  m.def(
      "attention_map_divergence_scale(Tensor grad, Tensor grad_q, Tensor grad_k, Tensor q_s, Tensor k_s)"
      " -> (Tensor, Tensor)");

  // `shape` is int64: channels, height and width of the images, padding of the first convolution, classes; norm,
  // groups, activation, pool and whether convolutions have biases; and every block's width. `running` [2, channels of
  // all blocks] are the means and variances of a norm that keeps them, `statistics` [E, 2, channels] receives those of
  // a batch norm. `workspace` is uint8, of the size given by the first number of convnet_step_bytes; the others are the
  // sizes of a tape per image and of each thread's own memory.
  m.def(
      "convnet_step_bytes(Tensor shape, int form, int students, int images, bool float64, bool bf16)"
      " -> Tensor");
  m.def(
      "convnet_step_logits(Tensor theta, Tensor images, Tensor shape, Tensor? running,"
      " float eps, float slope, bool bf16, Tensor(a!) workspace) -> Tensor");
  m.def(
      "convnet_step_gradient(Tensor theta, Tensor images, Tensor labels, Tensor shape, Tensor? running,"
      " Tensor(s!)? statistics, float eps, float slope, int label_kind, bool bf16, Tensor(a!) workspace, Tensor(b!)? "
      "tape) -> (Tensor, Tensor)");
  m.def(
      "convnet_step_tangent(Tensor theta, Tensor direction, Tensor images, Tensor labels, Tensor shape,"
      " Tensor? running, float eps, float slope, int label_kind, bool bf16, bool curvature, Tensor scale,"
      " Tensor(a!) workspace, Tensor(b!)? tape) -> (Tensor, Tensor, Tensor, Tensor)");
  // `attended` has a bit for each block whose attention maps are wanted.
  m.def(
      "convnet_step_features(Tensor theta, Tensor images, Tensor shape, Tensor? running,"
      " float eps, float slope, bool bf16, float power, int attended, bool spatial, bool channel, Tensor(a!) "
      "workspace, Tensor(b!)? tape) -> (Tensor, Tensor, Tensor)");
  m.def(
      "convnet_step_features_backward(Tensor? spatial_grad, Tensor? channel_grad, Tensor? embedding_grad,"
      " Tensor theta, Tensor images, Tensor shape, Tensor? running, float eps, float slope, bool bf16, float power,"
      " int attended, Tensor(a!) workspace, Tensor(b!)? tape) -> Tensor");

  // Sums of the `order`-th derivative of |x|^power, times `factor`, over the channels [N, H * W] and over the positions
  // [N, C]; and the adjoint: (spatial at the position + channel) times that, for every element.
  m.def(
      "attention_map(Tensor x, Tensor? factor, float power, int order, bool spatial, bool channel)"
      " -> (Tensor, Tensor)");
  m.def(
      "attention_map_adjoint(Tensor? spatial, Tensor? channel, Tensor x, Tensor? factor, float power, int order)"
      " -> Tensor");

  // x is [N, C, P]. Without a scale y has no elements; `statistics` are mean and variance [2, C], and the last output
  // is the mean again, for the backward.
  m.def(
      "bn_stat_match(Tensor x, Tensor? residual, Tensor? scale, Tensor? shift, bool relu)"
      " -> (Tensor, Tensor, Tensor)");
  m.def(
      "bn_stat_match_backward(Tensor? grad_y, Tensor grad_statistics, Tensor x, Tensor? residual, Tensor? scale,"
      " Tensor? shift, Tensor mean, bool relu) -> (Tensor, Tensor)");

  // The same followed by a max pooling, for images in channels-last memory: pooled images, statistics, the winners'
  // numbers in their windows, uint8, and the mean.
  m.def(
      "bn_match_pool(Tensor x, Tensor scale, Tensor shift, bool relu, int kernel, int stride, int padding)"
      " -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "bn_match_pool_backward(Tensor grad_y, Tensor grad_statistics, Tensor x, Tensor which, Tensor scale,"
      " Tensor shift, Tensor mean, bool relu, int kernel, int stride, int padding) -> Tensor");

  // Losses of rows of student logits; the second output of forward is their gradient, [N, 0] unless `keep`.
  m.def(
      "kd_divergence(Tensor student, Tensor? target, Tensor? labels, int kind, bool probs, float T, float scale,"
      " float ce_weight, float beta, float gamma, bool keep) -> (Tensor, Tensor)");
  m.def(
      "kd_divergence_backward(Tensor grad, Tensor student, Tensor? target, Tensor? labels, int kind, bool probs,"
      " float T, float scale, float ce_weight, float beta, float gamma) -> Tensor");
  m.def(
      "kd_divergence_jvp(Tensor student, Tensor? target, Tensor? labels, Tensor student_t, int kind, bool probs,"
      " float T, float scale, float ce_weight, float beta, float gamma) -> Tensor");
  m.def(
      "kd_divergence_backward_jvp(Tensor grad, Tensor? grad_t, Tensor student, Tensor? target, Tensor? labels,"
      " Tensor student_t, int kind, bool probs, float T, float scale, float ce_weight, float beta, float gamma)"
      " -> (Tensor, Tensor)");
  m.def(
      "sparse_label_loss(Tensor logits, Tensor indices, Tensor values, float T, int tail, float step, bool entropy,"
      " float scale, bool keep) -> (Tensor, Tensor)");
  m.def(
      "sparse_label_loss_backward(Tensor grad, Tensor logits, Tensor indices, Tensor values, float T, int tail,"
      " float step, bool entropy, float scale) -> Tensor");

  // A convolution with 3 taps per side or, on cells of 2x2 pixels, 4, `before` of them above and left of the position:
  // two if x has the cells, one if the output has. `filters` and `adjoint` are transformed filters [36, vectors,
  // channels, lanes] of it and of its adjoint, which is of the same kind.
  m.def("frozen_conv2d(Tensor x, Tensor filters, Tensor adjoint, int taps, int before) -> Tensor");
  // Filters of frozen_conv2d, or of its adjoint if `turned`, from a weight [K, C, taps, taps].
  m.def("conv2d_filters(Tensor weight, bool turned) -> Tensor");
  // The gradient in the filters [K, C, taps, taps] of a convolution whose output is as large as its input; with x_2 and
  // grad_2, the sum for two of them.
  m.def("conv2d_weight_grad(Tensor x, Tensor grad, Tensor? x_2, Tensor? grad_2, int taps) -> Tensor");

  // The largest of every window and its number in the window, uint8; gather picks the numbered elements from x, and
  // backward is its adjoint.
  m.def("max_pool2d(Tensor x, int kernel, int stride, int padding) -> (Tensor, Tensor)");
  m.def("max_pool2d_gather(Tensor x, Tensor which, int kernel, int stride, int padding) -> Tensor");
  m.def(
      "max_pool2d_backward(Tensor grad, Tensor which, int height, int width, int kernel, int stride, int padding)"
      " -> Tensor");

  // The picks [budget] of a greedy graph cut of samples with embeddings [N, d] and factors [N, C].
  m.def("graph_cut_greedy(Tensor embeddings, Tensor? factors, float lam, int budget) -> Tensor");
}
