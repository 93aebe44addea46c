// One training step of E ConvNet students, first and second order, as the CPU body receives it.
//
// The network: `depth` blocks of 3x3 convolution, instance norm with affine parameters, ReLU and 2x2 average pool (odd
// sizes floored), then a linear classifier. The loss is the mean cross entropy over N images. The forms:
//   logits    theta, images                              -> logits
//   gradient  theta, images, labels                      -> losses, grad = g
//   tangent   theta, direction, images, labels           -> slopes (of the losses along the direction, so that their
//             mean is <g, direction>), and, each times `scale`, grad = H direction, images_grad =
//             d<g, direction>/d images, labels_grad likewise
//   features  theta, images                              -> maps and embedding: see Features below
//   features_backward  theta, images, gradients of those -> images_grad
//
// Students and images are independent until weights' gradients are summed. So a thread takes a few images at a time
// through all layers and back, in working memory that stays in its cache, and no activation of the whole batch is ever
// written. Convolutions beyond the first run in Winograd's form (winograd.h), whose transformed tiles forward, backward
// and tangent products share. Convolution biases have no effect: the norm subtracts them, so their gradients are zero.
#pragma once

#include <cstdint>

#include "../common/scalar.h"

namespace pydistill {

struct ConvNetStep {
  enum class Form : int { logits, gradient, tangent, features, features_backward };
  enum class Labels : int { hard, logits, probs };
  enum class Tape : int { none, write, read };
  static constexpr int kMaxDepth = 8;

  struct Layer {
    int64_t in, out;  // channels
    int64_t H, W;     // of the convolution's output
    int64_t padding;  // 1, but in the first layer
    int64_t OH, OW;   // pooled
    int64_t theta;    // where the layer's parameters begin: weight [out, in, 3, 3], bias, norm weight, norm bias [out]
  };

  Form form = Form::gradient;
  Labels kind = Labels::hard;
  Scalar scalar = Scalar::f32;  // of every tensor: f32 or f64
  bool bf16 = false;            // round the convolutions' factors to bfloat16
  int64_t E = 0, N = 0, classes = 0, depth = 0, image_h = 0, image_w = 0;
  // What a block's activation a = relu(norm(conv)) [out, H, W] is summed up to, before it is pooled: sums of a^power
  // over the channels [H * W], the spatial attention, and over the positions [out], that of the channels; and what the
  // last block's pool leaves, the embedding [out * OH * OW]. Blocks whose bit is set in `attended` have maps; they
  // stand one after the other in an image's row.
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

  int64_t slots = 1;  // parts that a student's batch is cut into, each summed on its own, then all in order
  int64_t chunk = 1;  // images that a thread takes through the network at a time

  const void* theta = nullptr;
  const void* direction = nullptr;
  const void* scale = nullptr;                     // [E], in tangent
  const void* images = nullptr;                    // [N, C, H, W] per student
  const void* labels = nullptr;                    // [N] int64 or [N, classes]
  int64_t images_student = 0, labels_student = 0;  // elements from one student's to the next; 0 where shared

  void* logits = nullptr;       // [E, N, classes]
  void* losses = nullptr;       // [E, N]; in tangent their slopes
  void* grad = nullptr;         // [E, P]; null in tangent: not wanted
  void* images_grad = nullptr;  // [E, N, C, H, W]
  void* labels_grad = nullptr;  // [E, N, classes], or null

  // The primal quantities of every image ([E, N] tapes): written by gradient, they save tangent their recomputation,
  // and written by features that of features_backward. With bf16 they are kept in it, and worked on in `scalar`.
  Tape tape_use = Tape::none;
  void* tape = nullptr;

  void* filters = nullptr;   // [E][1 or 2] sets: of theta, and of the direction
  void* partials = nullptr;  // [E][slots]
};

// Bytes of the working memory that a step needs.
struct ConvNetStepSizes {
  int64_t filters;   // per student and set
  int64_t partials;  // per slot
  int64_t scratch;   // per thread
  int64_t tape;      // per image
};

// The three phases, each over independent units; the next begins when the one before is done.
struct ConvNetStepKernel {
  ConvNetStepSizes (*sizes)(const ConvNetStep&);
  int64_t (*prepare_units)(const ConvNetStep&);
  void (*prepare)(const ConvNetStep&, int64_t begin, int64_t end);
  void (*run)(const ConvNetStep&, int64_t begin, int64_t end, void* scratch);  // over E * slots
  int64_t (*reduce_units)(const ConvNetStep&);
  void (*reduce)(const ConvNetStep&, int64_t begin, int64_t end);
};

}  // namespace pydistill
