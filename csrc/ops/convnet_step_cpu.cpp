#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "../common/isa.h"
#include "../common/scratch.h"
#include "../common/tensor.h"
#include "../kernels/convnet_step.h"

namespace pydistill {

extern const ConvNetStepKernel convnet_step_base, convnet_step_avx2, convnet_step_avx512, convnet_step_avx512_bf16,
    convnet_step_amx, convnet_step_float64, convnet_step_rounded;

namespace {

using Form = ConvNetStep::Form;

const ConvNetStepKernel& kernel(const ConvNetStep& step) {
#if defined(__x86_64__)  // without AVX2, on processors older than 2013, steps are not worth their compilation
  constexpr const ConvNetStepKernel* base = nullptr;
  check(isa() != Isa::base, "convnet_step: needs AVX2");
#else
  constexpr const ConvNetStepKernel* base = &convnet_step_base;
#endif
  static constexpr const ConvNetStepKernel* kernels[] = {base, &convnet_step_avx2, &convnet_step_avx512,
                                                         &convnet_step_avx512_bf16, &convnet_step_amx};
  if (step.scalar == Scalar::f64) return convnet_step_float64;
  if (step.bf16 && isa() < Isa::avx512_bf16) return convnet_step_rounded;
  return *best_of(kernels, step.bf16 ? Isa::amx : Isa::avx512);  // the last two are compiled for bf16 alone
}

Tensor empty(const Tensor& like, ScalarType type, std::initializer_list<int64_t> shape) {
  return torch::stable::empty(torch::headeronly::IntHeaderOnlyArrayRef(shape.begin(), shape.size()), type, std::nullopt,
                              like.device());
}

void check_dense(const Tensor& t, const char* name, std::initializer_list<int64_t> shape, ScalarType type) {
  bool fits = t.dim() == static_cast<int64_t>(shape.size());
  for (int64_t i = 0; fits && i < t.dim(); ++i) fits = t.sizes()[i] == shape.begin()[i];
  check(fits && t.is_contiguous() && t.scalar_type() == type, name, ": wrong shape, dtype or strides");
}

// The network, and how the work is divided. More slots keep more threads busy and take more memory; their number
// depends on the sizes alone, so that results do not depend on the number of threads.
constexpr int64_t kMostSums = 16 << 20;  // elements, of all slots, beyond which a batch norm takes fewer of them
constexpr int64_t kBeforeWidths = 10;    // channels, height, width, first padding, classes, and the kind of a block

ConvNetStep describe(const Tensor& shape, Form form, int64_t E, int64_t N, bool float64, bool bf16) {
  check(shape.dim() == 1 && shape.scalar_type() == ScalarType::Long && shape.is_contiguous() &&
            shape.sizes()[0] > kBeforeWidths,
        "shape: expected int64 [", kBeforeWidths, " + depth]");
  const int64_t* s = static_cast<const int64_t*>(shape.const_data_ptr());
  ConvNetStep step;
  step.form = form;
  step.scalar = float64 ? Scalar::f64 : Scalar::f32;
  step.bf16 = bf16;
  step.E = E, step.N = N, step.classes = s[4], step.depth = shape.sizes()[0] - kBeforeWidths;
  const auto known = [](int64_t code, auto last) {
    check(code >= 0 && code <= static_cast<int64_t>(last), "shape: unknown kind of block ", code);
    return static_cast<decltype(last)>(code);
  };
  step.norm = known(s[5], ConvNetStep::Norm::running);
  step.groups = s[6];
  step.activation = known(s[7], ConvNetStep::Activation::swish);
  step.pool = known(s[8], ConvNetStep::Pool::none);
  const bool biased = s[9] != 0;
  step.image_h = s[1], step.image_w = s[2];
  check(step.depth <= ConvNetStep::kMaxDepth, "shape: at most ", ConvNetStep::kMaxDepth, " blocks");
  int64_t channels = s[0], H = s[1], W = s[2];
  for (int64_t l = 0; l < step.depth; ++l) {
    const int64_t padding = l == 0 ? s[3] : 1, grown = 2 * padding - 2;
    const int64_t out = s[kBeforeWidths + l], by = step.pool == ConvNetStep::Pool::none ? 1 : 2;
    ConvNetStep::Layer& layer = step.layer[l];
    layer = {channels,         out,    H + grown, W + grown, padding,      (H + grown) / by,
             (W + grown) / by, step.P, -1,        -1,        step.channels};
    check(layer.in > 0 && layer.out > 0 && layer.OH > 0 && layer.OW > 0, "shape: block ", l, " is empty");
    check(step.norm != ConvNetStep::Norm::group || (step.groups > 0 && out % step.groups == 0), "shape: block ", l,
          " has ", out, " channels, which do not make ", step.groups, " groups");
    step.P += out * layer.in * 9;
    if (biased) layer.bias = step.P, step.P += out;
    if (step.norm != ConvNetStep::Norm::none) {
      layer.affine = step.P;
      step.P += 2 * out * (step.norm == ConvNetStep::Norm::layer ? layer.H * layer.W : 1);
    }
    step.channels += out;
    channels = layer.out, H = layer.OH, W = layer.OW;
  }
  step.head = step.P;
  check(step.classes > 0, "shape: no classes");
  step.P += step.classes * (channels * H * W + 1);
  int64_t slots = 1;  // with one student: 2 for 4 images, 4 for 8, 8 for 16 to 127, 16 for 128, 32 for 512
  while (slots < 8 && 2 * slots <= N / 2) slots *= 2;
  for (int64_t size = 128; size <= N && slots < 32; size *= 4) slots *= 2;
  // Each slot has its own sums, 36 for 9 weights. If a batch norm takes a layer at a time, wide layers get few slots:
  // writing, reading and adding up their sums costs more than more threads save.
  int64_t weights = 0;
  for (int64_t l = 1; l < step.depth; ++l) weights += step.layer[l].in * step.layer[l].out;
  while (step.over_batch() && slots > 4 && slots * weights * 36 > kMostSums) slots /= 2;
  // with more students, about ten slots in total: an odd number of students is spread evenly, too
  while (E > 1 && slots > 1 && E * (slots / 2) >= 10) slots /= 2;
  step.slots = slots;
  // tiles of the second layer that fill the products' rows well while their 36 planes stay in the second-level cache
  const ConvNetStep::Layer& tiled = step.layer[std::min<int64_t>(1, step.depth - 1)];
  const int64_t tiles = ((tiled.H + 3) / 4) * ((tiled.W + 3) / 4);
  step.chunk = std::clamp<int64_t>(64 / tiles, 1, std::max<int64_t>(1, (N + step.slots - 1) / step.slots));
  return step;
}

int64_t filter_sets(const ConvNetStep& step) { return step.E * (step.form == Form::tangent ? 2 : 1); }

// Of the exchange, and of all images' activations.
int64_t batch_bytes(const ConvNetStep& step, const ConvNetStepSizes& sizes) {
  return step.E * step.slots * sizes.exchange +
         step.E * step.N * (sizes.tape + (step.form == Form::tangent ? sizes.tape_t : 0));
}

int64_t workspace_bytes(const ConvNetStep& step, const ConvNetStepSizes& sizes) {
  const bool sums = step.form == Form::gradient || step.form == Form::tangent;  // of the weights' gradients
  return filter_sets(step) * sizes.filters + (sums ? step.E * step.slots * sizes.partials : 0) +
         (step.over_batch() ? batch_bytes(step, sizes) : 0) + 64;
}

Tensor bytes(const Tensor& shape, int64_t form, int64_t E, int64_t N, bool float64, bool bf16) {
  const ConvNetStep step = describe(shape, static_cast<Form>(form), E, N, float64, bf16);
  const ConvNetStepSizes sizes = kernel(step).sizes(step);
  Tensor out = empty(shape, ScalarType::Long, {3});
  int64_t* const to = static_cast<int64_t*>(out.mutable_data_ptr());
  to[0] = workspace_bytes(step, sizes), to[1] = sizes.tape, to[2] = sizes.scratch;
  return out;
}

ConvNetStep begin(Form form, const Tensor& theta, const Tensor& images, const Tensor& shape, double eps, double slope,
                  bool bf16, const std::optional<Tensor>& running, const std::optional<Tensor>& statistics) {
  check(theta.dim() == 2 && theta.is_contiguous(), "theta: expected [E, P], contiguous");
  check(images.dim() == 4 || images.dim() == 5, "images: expected [N, C, H, W] or [E, N, C, H, W]");
  const bool own = images.dim() == 5;
  const Scalar scalar = scalar_of(theta, "theta");
  check(scalar == Scalar::f32 || scalar == Scalar::f64, "theta: expected float32 or float64");
  const int64_t E = theta.sizes()[0], N = images.sizes()[own];
  ConvNetStep step = describe(shape, form, E, N, scalar == Scalar::f64, bf16);
  check_dense(theta, "theta", {E, step.P}, theta.scalar_type());
  const int64_t C = step.layer[0].in, H = step.image_h, W = step.image_w;
  own ? check_dense(images, "images", {E, N, C, H, W}, theta.scalar_type())
      : check_dense(images, "images", {N, C, H, W}, theta.scalar_type());
  step.eps = eps;
  step.slope = slope;
  check(running.has_value() == (step.norm == ConvNetStep::Norm::running),
        "running: expected where the norm takes its statistics from there, and only there");
  if (running) {
    const bool each = running->dim() == 3;
    each ? check_dense(*running, "running", {E, 2, step.channels}, theta.scalar_type())
         : check_dense(*running, "running", {2, step.channels}, theta.scalar_type());
    step.running_student = each ? 2 * step.channels : 0;
    step.running = running->const_data_ptr();
  }
  if (statistics) {
    check(step.over_batch(), "statistics: only batch norm has any");
    check_dense(*statistics, "statistics", {E, 2, step.channels}, theta.scalar_type());
    step.statistics = const_cast<void*>(statistics->const_data_ptr());
  }
  step.theta = theta.const_data_ptr();
  step.images = images.const_data_ptr();
  step.images_student = own ? N * C * H * W : 0;
  return step;
}

void take_labels(ConvNetStep& step, const Tensor& labels, int64_t kind, const Tensor& theta) {
  check(kind >= 0 && kind < 3, "label_kind: expected 0, 1 or 2");
  step.kind = static_cast<ConvNetStep::Labels>(kind);
  const bool hard = step.kind == ConvNetStep::Labels::hard;
  const bool own = labels.dim() == (hard ? 2 : 3);
  const ScalarType type = hard ? ScalarType::Long : theta.scalar_type();
  const int64_t E = step.E, N = step.N, K = step.classes;
  if (hard)
    own ? check_dense(labels, "labels", {E, N}, type) : check_dense(labels, "labels", {N}, type);
  else
    own ? check_dense(labels, "labels", {E, N, K}, type) : check_dense(labels, "labels", {N, K}, type);
  step.labels = labels.const_data_ptr();
  if (hard)
    for (int64_t i = 0; i < labels.numel(); ++i) {
      const int64_t k = static_cast<const int64_t*>(step.labels)[i];
      check(k >= 0 && k < K, "labels: expected class numbers in 0..", K - 1, ", got ", k);
    }
  step.labels_student = own ? (hard ? N : N * K) : 0;
}

void take_tape(ConvNetStep& step, const std::optional<Tensor>& tape, ConvNetStep::Tape use) {
  if (!tape) return;
  step.tape_use = use;
  const int64_t size = kernel(step).sizes(step).tape * step.E * step.N;
  check(tape->scalar_type() == ScalarType::Byte && tape->is_contiguous() && tape->numel() >= size,
        "tape: expected uint8 [", size, "]");
  step.tape = const_cast<void*>(tape->const_data_ptr());
  check(reinterpret_cast<uintptr_t>(step.tape) % 64 == 0, "tape: expected 64-byte alignment");
}

void run(ConvNetStep& step, Tensor& workspace) {
  const ConvNetStepSizes sizes = kernel(step).sizes(step);
  check(workspace.scalar_type() == ScalarType::Byte && workspace.is_contiguous() &&
            workspace.numel() >= workspace_bytes(step, sizes),
        "workspace: expected uint8 [", workspace_bytes(step, sizes), "], got ", workspace.numel());
  const uintptr_t start = reinterpret_cast<uintptr_t>(workspace.mutable_data_ptr());
  char* const base = reinterpret_cast<char*>((start + 63) / 64 * 64);
  advise_large_pages(base, workspace_bytes(step, sizes) - 64);
  step.filters = base;
  step.partials = base + filter_sets(step) * sizes.filters;
  if (step.over_batch()) {
    char* const batch = base + workspace_bytes(step, sizes) - 64 - batch_bytes(step, sizes);
    step.batch_tape = batch;
    step.batch_tape_t = batch + step.E * step.N * sizes.tape;
    step.exchange = batch + batch_bytes(step, sizes) - step.E * step.slots * sizes.exchange;
  }
  using torch::stable::parallel_for;
  const int64_t filters = kernel(step).prepare_units(step), reductions = kernel(step).reduce_units(step);
  parallel_for(0, filters, 8, [&](int64_t begin, int64_t end) { kernel(step).prepare(step, begin, end); });
  for (int64_t pass = 0; pass < kernel(step).passes(step); ++pass)
    parallel_for(0, step.E * step.slots, 1,
                 [&](int64_t begin, int64_t end) { kernel(step).run(step, pass, begin, end, scratch(sizes.scratch)); });
  if (step.grad != nullptr)
    parallel_for(0, reductions, 8, [&](int64_t begin, int64_t end) { kernel(step).reduce(step, begin, end); });
}

// The mean over each student's images of [E, N] values.
Tensor means(const ConvNetStep& step, const Tensor& values) {
  Tensor out = empty(values, values.scalar_type(), {step.E});
  const auto fill = [&](auto zero) {
    using T = decltype(zero);
    const T* from = static_cast<const T*>(values.const_data_ptr());
    for (int64_t e = 0; e < step.E; ++e) {
      double sum = 0;
      for (int64_t n = 0; n < step.N; ++n) sum += from[e * step.N + n];
      static_cast<T*>(out.mutable_data_ptr())[e] = static_cast<T>(sum / static_cast<double>(step.N));
    }
  };
  step.scalar == Scalar::f64 ? fill(0.0) : fill(0.0f);
  return out;
}

Tensor logits(const Tensor& theta, const Tensor& images, const Tensor& shape, const std::optional<Tensor>& running,
              double eps, double slope, bool bf16, Tensor workspace) {
  ConvNetStep step = begin(Form::logits, theta, images, shape, eps, slope, bf16, running, std::nullopt);
  Tensor out = empty(theta, theta.scalar_type(), {step.E, step.N, step.classes});
  step.logits = out.mutable_data_ptr();
  run(step, workspace);
  return out;
}

std::tuple<Tensor, Tensor> gradient(const Tensor& theta, const Tensor& images, const Tensor& labels,
                                    const Tensor& shape, const std::optional<Tensor>& running,
                                    const std::optional<Tensor>& statistics, double eps, double slope,
                                    int64_t label_kind, bool bf16, Tensor workspace, std::optional<Tensor> tape) {
  ConvNetStep step = begin(Form::gradient, theta, images, shape, eps, slope, bf16, running, statistics);
  take_labels(step, labels, label_kind, theta);
  take_tape(step, tape, ConvNetStep::Tape::write);
  Tensor losses = empty(theta, theta.scalar_type(), {step.E, step.N});
  Tensor grad = empty(theta, theta.scalar_type(), {step.E, step.P});
  step.losses = losses.mutable_data_ptr(), step.grad = grad.mutable_data_ptr();
  run(step, workspace);
  return {means(step, losses), grad};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> tangent(const Tensor& theta, const Tensor& direction, const Tensor& images,
                                                   const Tensor& labels, const Tensor& shape,
                                                   const std::optional<Tensor>& running, double eps, double slope,
                                                   int64_t label_kind, bool bf16, bool curvature, const Tensor& scale,
                                                   Tensor workspace, std::optional<Tensor> tape) {
  ConvNetStep step = begin(Form::tangent, theta, images, shape, eps, slope, bf16, running, std::nullopt);
  check_dense(direction, "direction", {step.E, step.P}, theta.scalar_type());
  step.direction = direction.const_data_ptr();
  check_dense(scale, "scale", {step.E}, theta.scalar_type());
  step.scale = scale.const_data_ptr();
  take_labels(step, labels, label_kind, theta);
  take_tape(step, tape, ConvNetStep::Tape::read);
  const bool soft = step.kind != ConvNetStep::Labels::hard;
  const ScalarType type = theta.scalar_type();
  Tensor slopes = empty(theta, type, {step.E, step.N}), grad = empty(theta, type, {curvature ? step.E : 0, step.P});
  Tensor images_grad = empty(theta, type, {step.E, step.N, step.layer[0].in, step.image_h, step.image_w});
  Tensor labels_grad = empty(theta, type, {soft ? step.E : 0, step.N, step.classes});
  step.losses = slopes.mutable_data_ptr();
  if (curvature) step.grad = grad.mutable_data_ptr();
  step.images_grad = images_grad.mutable_data_ptr();
  if (soft) step.labels_grad = labels_grad.mutable_data_ptr();
  run(step, workspace);
  return {means(step, slopes), grad, images_grad, labels_grad};
}

// Which blocks have maps, and how long an image's rows are.
void describe_features(ConvNetStep& step, double power, int64_t attended) {
  check(power > 0, "power: expected a positive number, got ", power);
  check(attended >= 0 && attended >> step.depth == 0, "attended: expected a bit for each of ", step.depth, " blocks");
  ConvNetStep::Features& to = step.features;
  to.power = power;
  to.attended = static_cast<uint64_t>(attended);
  for (int64_t l = 0; l < step.depth; ++l)
    if (attended >> l & 1) {
      to.spatial_row += step.layer[l].H * step.layer[l].W;
      to.channel_row += step.layer[l].out;
    }
  const ConvNetStep::Layer& last = step.layer[step.depth - 1];
  to.embedding_row = last.out * last.OH * last.OW;
}

std::tuple<Tensor, Tensor, Tensor> features(const Tensor& theta, const Tensor& images, const Tensor& shape,
                                            const std::optional<Tensor>& running, double eps, double slope, bool bf16,
                                            double power, int64_t attended, bool spatial, bool channel,
                                            Tensor workspace, std::optional<Tensor> tape) {
  ConvNetStep step = begin(Form::features, theta, images, shape, eps, slope, bf16, running, std::nullopt);
  take_tape(step, tape, ConvNetStep::Tape::write);
  describe_features(step, power, attended);
  ConvNetStep::Features& to = step.features;
  const ScalarType type = theta.scalar_type();
  Tensor spatial_maps = empty(theta, type, {step.E, step.N, spatial ? to.spatial_row : 0});
  Tensor channel_maps = empty(theta, type, {step.E, step.N, channel ? to.channel_row : 0});
  Tensor embedding = empty(theta, type, {step.E, step.N, to.embedding_row});
  if (spatial) to.spatial = spatial_maps.mutable_data_ptr();
  if (channel) to.channel = channel_maps.mutable_data_ptr();
  to.embedding = embedding.mutable_data_ptr();
  run(step, workspace);
  return {spatial_maps, channel_maps, embedding};
}

Tensor features_backward(const std::optional<Tensor>& spatial_grad, const std::optional<Tensor>& channel_grad,
                         const std::optional<Tensor>& embedding_grad, const Tensor& theta, const Tensor& images,
                         const Tensor& shape, const std::optional<Tensor>& running, double eps, double slope, bool bf16,
                         double power, int64_t attended, Tensor workspace, std::optional<Tensor> tape) {
  ConvNetStep step = begin(Form::features_backward, theta, images, shape, eps, slope, bf16, running, std::nullopt);
  take_tape(step, tape, ConvNetStep::Tape::read);
  describe_features(step, power, attended);
  ConvNetStep::Features& from = step.features;
  const auto take = [&](const std::optional<Tensor>& grad, const char* name, int64_t row) -> const void* {
    if (!grad) return nullptr;
    check_dense(*grad, name, {step.E, step.N, row}, theta.scalar_type());
    return grad->const_data_ptr();
  };
  from.spatial_grad = take(spatial_grad, "spatial_grad", from.spatial_row);
  from.channel_grad = take(channel_grad, "channel_grad", from.channel_row);
  from.embedding_grad = take(embedding_grad, "embedding_grad", from.embedding_row);
  const ConvNetStep::Layer& top = step.layer[0];
  Tensor images_grad = empty(theta, theta.scalar_type(), {step.E, step.N, top.in, step.image_h, step.image_w});
  step.images_grad = images_grad.mutable_data_ptr();
  run(step, workspace);
  return images_grad;
}

}  // namespace
}  // namespace pydistill

STABLE_TORCH_LIBRARY_IMPL(pydistill, CPU, m) {
  m.impl("convnet_step_bytes", TORCH_BOX(&pydistill::bytes));
  m.impl("convnet_step_logits", TORCH_BOX(&pydistill::logits));
  m.impl("convnet_step_gradient", TORCH_BOX(&pydistill::gradient));
  m.impl("convnet_step_tangent", TORCH_BOX(&pydistill::tangent));
  m.impl("convnet_step_features", TORCH_BOX(&pydistill::features));
  m.impl("convnet_step_features_backward", TORCH_BOX(&pydistill::features_backward));
}
