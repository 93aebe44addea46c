// One call of the loss of logits against a target of which k classes per row are stored, as the CPU body receives it.
//
// Per row, with q = softmax(logits / T), p_j the stored probabilities (codes: exp(-code step)), and u that of each of
// the other C - k classes:
//   smooth  u = max(0, 1 - sum p) / (C - k)      zeros  u = 0      renorm  u = 0, and p / sum p in place of p
//   loss = -sum_j p_j log q_j - u sum of the other classes' log q
//   entropy: + sum_j p_j log p_j + (C - k) u log u, which makes it the KL divergence
//   gradient in logits / T: s q_c - u, and s q_j - p_j for a stored class, with s the sum of the target
// The forms:
//   forward   -> scale loss, and its gradient in logits if grad_logits is given
//   backward  -> grad times that gradient
//
// A class number out of range, or one that a row names twice, makes its row NaN: no sum over it would be right.
#pragma once

#include <cstdint>

#include "../common/scalar.h"

namespace pydistill {

struct SparseLabelLoss {
  enum class Tail : int { smooth, zeros, renorm };

  // Base pointer and strides in elements; a null `data` means "absent".
  struct Rows {
    void* data = nullptr;
    int64_t row = 0, column = 0;
  };

  Scalar scalar = Scalar::f32;  // of the [N, C] tensors; values, loss and grad are double for f64, else float
  Tail tail = Tail::smooth;
  bool codes = false;  // values are uint8
  bool entropy = true;
  double T = 1, step = 0, scale = 1;
  int64_t N = 0, C = 0, k = 0;

  Rows logits;   // [N, C]
  Rows indices;  // int64 [N, k]
  Rows values;   // [N, k]
  Rows grad;     // [N]; absent in forward

  void* loss = nullptr;         // [N], contiguous, like the next; absent in backward
  void* grad_logits = nullptr;  // [N, C]
};

}  // namespace pydistill
