// One training step of E ConvNet students, first and second order, as the CPU body receives it.
//
// The network: `depth` blocks of 3x3 convolution, norm with affine parameters, activation and 2x2 pool (odd sizes
// floored), then a linear classifier. The loss is the mean cross entropy over N images. The forms:
//   logits    theta, images                              -> logits
//   gradient  theta, images, labels                      -> losses, grad = g
//   tangent   theta, direction, images, labels           -> slopes (of the losses along the direction, so that their
//             mean is <g, direction>), and, each times `scale`, grad = H direction, images_grad =
//             d<g, direction>/d images, labels_grad likewise
//   features  theta, images                              -> maps and embedding: see Features below
//   features_backward  theta, images, gradients of those -> images_grad
//
// Students and images are independent until weights' gradients are summed. So a thread takes a few images at a time
// through all layers and back, in working memory that stays in its cache, and activations of the whole batch are never
// written. Convolutions after the first run in Winograd's form (winograd.h), whose transformed tiles are shared by
// forward, backward and tangent products. A bias that the norm subtracts has no effect and gradient zero.
//
// Blocks of instance norm, ReLU and average pool need only one panel of an image, and run in one loop
// (instance_norm_relu_avg_pool_panel.h). All others run in stages (convnet_block.h, convnet_variants.h), between which
// the statistics of the norm are formed. Batch norm shares these over the batch: there every stage is a separate pass
// over all images, whose activations are then all kept.
#pragma once

#include <cstdint>

#include "../common/scalar.h"

namespace pydistill {

struct ConvNetStep {
  enum class Form : int { logits, gradient, tangent, features, features_backward };
  enum class Labels : int { hard, logits, probs };
  enum class Tape : int { none, write, read };
  enum class Norm : int { instance, batch, group, layer, none, running };  // running: batch norm's kept statistics
  enum class Activation : int { relu, leaky_relu, sigmoid, tanh, swish };
  enum class Pool : int { average, max, none };
  static constexpr int kMaxDepth = 8;

  struct Layer {
    int64_t in, out;  // channels
    int64_t H, W;     // of the convolution's output
    int64_t padding;  // 1, except in the first layer
    int64_t OH, OW;   // pooled
    // where the layer's parameters begin: weight [out, in, 3, 3]; bias [out] and the norm's weight, followed by its
    // bias
    // ([out], for layer norm [out, H, W]), -1 if there are none
    int64_t theta, bias, affine;
    int64_t statistics;  // where its channels begin in `statistics` and `running`
  };

  Form form = Form::gradient;
  Labels kind = Labels::hard;
  Scalar scalar = Scalar::f32;  // of every tensor: f32 or f64
  bool bf16 = false;            // round the convolutions' factors to bfloat16
  Norm norm = Norm::instance;
  Activation activation = Activation::relu;
  Pool pool = Pool::average;
  int64_t groups = 1;  // of a group norm
  double slope = 0;    // of a leaky ReLU below zero

  bool fused() const { return norm == Norm::instance && activation == Activation::relu && pool == Pool::average; }
  bool over_batch() const { return norm == Norm::batch; }
  bool subtracts_bias() const { return norm == Norm::instance || norm == Norm::batch; }

  int64_t E = 0, N = 0, classes = 0, depth = 0, image_h = 0, image_w = 0;
  // Sums over a block's activation a = relu(norm(conv)) [out, H, W] before it is pooled: of a^power over the channels
  // [H * W], the spatial attention, and over the positions [out], the channel attention; and the output of the last
  // block's pool, the embedding [out * OH * OW]. Blocks whose bit is set in `attended` have maps, which follow one
  // another in an image's row.
  struct Features {
    double power = 1;
    uint64_t attended = 0;
    int64_t spatial_row = 0, channel_row = 0, embedding_row = 0;  // elements of an image's rows
    void *spatial = nullptr, *channel = nullptr;                  // [E, N, row]; null: not wanted
    void* embedding = nullptr;
    const void *spatial_grad = nullptr, *channel_grad = nullptr;  // null: zero
    const void* embedding_grad = nullptr;
  };
  Features features;

  Layer layer[kMaxDepth];
  int64_t head = 0, P = 0;  // theta: [E, P]; the classifier's weight [classes, out * OH * OW] begins at `head`
  double eps = 0;

  int64_t slots = 1;  // parts of a student's batch, each summed separately, then all in order
  int64_t chunk = 1;  // images that a thread takes through the network at a time

  const void* theta = nullptr;
  const void* direction = nullptr;
  const void* scale = nullptr;                     // [E], in tangent
  const void* images = nullptr;                    // [N, C, H, W] per student
  const void* labels = nullptr;                    // [N] int64 or [N, classes]
  int64_t images_student = 0, labels_student = 0;  // elements from one student's to the next; 0 if shared

  void* logits = nullptr;       // [E, N, classes]
  void* losses = nullptr;       // [E, N]; in tangent their slopes
  void* grad = nullptr;         // [E, P]; null in tangent: not wanted
  void* images_grad = nullptr;  // [E, N, C, H, W]
  void* labels_grad = nullptr;  // [E, N, classes], or null

  int64_t channels = 0;           // of all blocks
  const void* running = nullptr;  // [2, channels] per student: means and variances
  int64_t running_student = 0;    // elements from one student's to the next; 0 if shared
  void* statistics = nullptr;     // [E, 2, channels]: batch norm's means and biased variances; null: not wanted

  // The primal quantities of every image ([E, N] tapes): gradient writes them so that tangent need not recompute them,
  // likewise features for features_backward. With bf16 they are kept in bf16, and used in `scalar`.
  Tape tape_use = Tape::none;
  void* tape = nullptr;

  void* filters = nullptr;   // [E][1 or 2] sets: of theta, and of the direction
  void* partials = nullptr;  // [E][slots]
  // over_batch(): the sums that slots exchange [E][slots], and the activations and their tangents [E, N]
  void *exchange = nullptr, *batch_tape = nullptr, *batch_tape_t = nullptr;
};

// Bytes of the working memory that a step needs.
struct ConvNetStepSizes {
  int64_t filters;   // per student and set
  int64_t partials;  // per slot
  int64_t scratch;   // per thread
  int64_t tape;      // per image
  int64_t exchange;  // per slot
  int64_t tape_t;    // per image
};

// The three phases, each over independent units; each begins when the one before is done. The same holds for the passes
// of `run`.
struct ConvNetStepKernel {
  ConvNetStepSizes (*sizes)(const ConvNetStep&);
  int64_t (*prepare_units)(const ConvNetStep&);
  void (*prepare)(const ConvNetStep&, int64_t begin, int64_t end);
  int64_t (*passes)(const ConvNetStep&);
  void (*run)(const ConvNetStep&, int64_t pass, int64_t begin, int64_t end, void* scratch);  // over E * slots
  int64_t (*reduce_units)(const ConvNetStep&);
  void (*reduce)(const ConvNetStep&, int64_t begin, int64_t end);
};

}  // namespace pydistill
