// One call of the soft-label cross entropy, as the CPU and the CUDA body receive it.
//
// Per row, with P = softmax(logits), u = -log P, target t and s = sum t:
//   hard    t = 1 at the row's label, 0 elsewhere
//   logits  t = softmax(labels)
//   probs   t = labels, whatever they sum to
//   loss = <t, u>     d loss/d logits = s P - t     d loss/d labels = u (probs), t (u - loss) (logits)
// Where t = 0 and P = 0 because of a logit of minus infinity, u and t count as constants: the class takes no part.
// The forms, with _t for the derivative along a direction (logits_t, labels_t, grad_t):
//   forward       logits, labels                               -> loss
//   backward      logits, labels, grad                         -> grad_logits, grad_labels
//   jvp           logits, labels, logits_t, labels_t           -> loss                           (holding loss_t)
//   backward_jvp  logits, labels, logits_t, labels_t, grad, grad_t
//                                                 -> loss, grad_logits, grad_labels (all holding tangents)
// Along a direction, with a = <P, logits_t> and b = <t, labels_t>:
//   u_t = a - logits_t     P_t = P (logits_t - a)     t_t = labels_t (probs), t (labels_t - b) (logits), 0 (hard)
//   loss_t = <t_t, u> + <t, u_t>
// and the product rule on the backward's lines. As the Hessian of grad * loss is symmetric, backward_jvp with grad_t
// absent is also the vector-Jacobian product of the backward.
//
// A class number out of range makes its row NaN: a device cannot raise, and must not read out of bounds.
#pragma once

#include <cstdint>

#include "../common/scalar.h"

namespace pydistill {

struct SoftCrossEntropy {
  enum class Form : int { forward, backward, jvp, backward_jvp };
  enum class Kind : int { hard, logits, probs };

  // Base pointer and strides in elements; a null `data` means "absent".
  struct Rows {
    void* data = nullptr;
    int64_t row = 0, column = 0;
  };

  Form form = Form::forward;
  Scalar scalar = Scalar::f32;  // of the [N, K] tensors; loss and grad are double for f64, else float
  Kind kind = Kind::hard;
  int64_t N = 0, K = 0;

  Rows logits, logits_t;  // [N, K]
  Rows labels, labels_t;  // [N, K]; for hard labels int64 [N], and labels_t is not used
  Rows grad, grad_t;      // [N]; grad_t may be absent

  void* loss = nullptr;         // [N], contiguous, like the next two
  void* grad_logits = nullptr;  // [N, K]
  void* grad_labels = nullptr;  // [N, K], absent for hard labels
};

}  // namespace pydistill
