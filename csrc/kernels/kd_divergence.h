// One call of the divergence between student logits and a target, as the CPU body receives it.
//
// Per row, with z = student / T, q = softmax(z), and the target's distribution p = softmax(target / T) or the target
// itself (probs):
//   fkl      D = sum p (log p - log q)
//   rkl      D = sum q (log q - log p)
//   jsd      D = beta sum p (log p - log m) + (1 - beta) sum q (log q - log m),    m = beta p + (1 - beta) q
//   soft_ce  D = -sum p log q
//   ce       D = -log q at the row's label
//   mse      D = sum (z - target / T)^2
//   ofa      D = -sum t log q,    t = (p + 1)^gamma - 1 at the row's label, p^gamma elsewhere
//   loss = scale D - ce_weight log softmax(student) at the row's label
// A zero probability adds nothing, whatever its logarithm.
//
// The gradient of D in z and its derivative along u = student_t / T, where t is the weight of -log q, s its sum, and
// q_t = q (u - <q, u>):
//   fkl, soft_ce, ce, ofa   g = s q - t        g_t = s q_t
//   rkl, jsd                g = q (a - <q, a>) g_t = q_t (a - <q, a>) + q (a_t - <q_t, a> - <q, a_t>)
//     rkl   a = log q - log p                  a_t = u - <q, u>
//     jsd   a = (1 - beta) (log q - log m)     a_t = (1 - beta) (u - <q, u>) (1 - (1 - beta) q / m)
//   mse                     g = 2 (z - target / T)                g_t = 2 u
// The forms, with G the gradient of loss in student and G_t its derivative along student_t:
//   forward       -> loss, and G if grad_logits is given
//   backward      -> grad G
//   jvp           -> <G, student_t> as loss
//   backward_jvp  -> <G, student_t> as loss, and grad G_t + grad_t G
//
// A class number out of range makes its row NaN, so that a direct, unchecked call never reads out of bounds.
#pragma once

#include <cstdint>

#include "../common/scalar.h"

namespace pydistill {

struct KdDivergence {
  enum class Form : int { forward, backward, jvp, backward_jvp };
  enum class Kind : int { fkl, rkl, jsd, soft_ce, ce, mse, ofa };

  // Base pointer and strides in elements; a null `data` means "absent".
  struct Rows {
    void* data = nullptr;
    int64_t row = 0, column = 0;
  };

  Form form = Form::forward;
  Kind kind = Kind::fkl;
  Scalar scalar = Scalar::f32;         // of student, student_t and grad_logits
  Scalar target_scalar = Scalar::f32;  // f64 if and only if `scalar` is; loss and grad are double then, else float
  bool probs = false;
  double T = 1, scale = 1, ce_weight = 0, beta = 0.5, gamma = 1;
  int64_t N = 0, C = 0;

  Rows student, student_t;  // [N, C]
  Rows target;              // [N, C], absent for ce
  Rows labels;              // int64 [N], absent if not needed
  Rows grad, grad_t;        // [N]; grad_t may be absent

  void* loss = nullptr;         // [N], contiguous, like the next
  void* grad_logits = nullptr;  // [N, C]
};

}  // namespace pydistill
