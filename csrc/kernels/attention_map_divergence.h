// One call of the divergence between two softmax attention maps, as the CPU body receives it.
//
// Per query row, with s = scale_s <q_s, k_s> and t = scale_t <q_t, k_t> over the keys that take part,
// P = softmax(s), T = softmax(t) and Mix = beta T + (1 - beta) P:
//   fkl  loss = <T, log T - log P>                              d loss/d s = P - T
//   rkl  loss = <P, log P - log T>                              d loss/d s = P (log P - log T - loss)
//   jsd  loss = beta <T, log T - log Mix> + (1 - beta) <P, b>   d loss/d s = (1 - beta) P (b - <P, b>),
//        with b = log P - log Mix
//   ce   loss = -<T, log P>                                     d loss/d s = P - T
// d loss/d q_s = scale_s (d loss/d s) k_s and d loss/d k_s = scale_s (d loss/d s)^T q_s. The teacher has no gradient.
//
// A task is a chunk of the rows of one head. It processes the rows in blocks of a few dozen against all of the head's
// keys, so that anything as long as the keys is per block, stays in cache, and is never written out. Gradients come in
// the same sweep: those of the sum of the rows' losses, or of <grad, loss>. The division of rows into chunks depends on
// the shape alone; the keys' gradient is summed over a head's chunks in order. Hence equal bits across thread counts.
#pragma once

#include <cstdint>

#include "../common/scalar.h"

namespace pydistill {

struct AttentionMapDivergence {
  enum class Kind : int { fkl, rkl, jsd, ce };

  // A [A, H, rows, columns] tensor: base pointer and strides in elements; a null `data` means "absent".
  struct Heads {
    void* data = nullptr;
    int64_t a = 0, h = 0, row = 0, column = 0;
  };

  Scalar scalar = Scalar::f32;  // of queries, keys and their gradients; all else is double for f64, else float
  Kind kind = Kind::fkl;
  double scale_s = 1, scale_t = 1, beta = 0.5;
  int64_t A = 0, H = 0, N = 0, M = 0;
  int64_t width_s = 0, width_t = 0;  // of the student's and the teacher's heads

  Heads q_s, k_s, q_t, k_t;
  Heads mask;  // [A, H, N, M] of bool; false: the key takes no part
  Heads grad;  // [A, H, N], its column is unused; ones if absent

  void* loss = nullptr;    // [A, H, N], contiguous, like all outputs; each may be absent
  void* grad_q = nullptr;  // [A, H, N, width_s]
  void* grad_k = nullptr;  // [A, H, M, width_s]

  int64_t chunks = 1;      // of a head's rows
  void* parts = nullptr;   // [A, H, chunks, M, padded width_s]: shares of grad_k, if there are several chunks
  bool add_parts = false;  // the second pass: tasks are rows of grad_k

  int64_t tasks() const { return A * H * (add_parts ? M : chunks); }
};

// Rows of a block: two blocks of scores in half a megabyte.
inline int64_t attention_block_rows(int64_t M, int64_t bytes) {
  const int64_t rows = (int64_t{1} << 18) / (M * bytes) / 6 * 6;
  return rows < 6 ? 6 : rows > 48 ? 48 : rows;
}

// `size` in whole 64-byte vectors.
inline int64_t attention_padded(int64_t size, int64_t bytes) {
  const int64_t lanes = 64 / bytes;
  return (size + lanes - 1) / lanes * lanes;
}

// Stride of rows of scores: an odd number of vectors, since a power of two would put a column into one set of the
// cache.
inline int64_t attention_row_stride(int64_t M, int64_t bytes) {
  const int64_t padded = attention_padded(M, bytes), lanes = 64 / bytes;
  return padded / lanes % 2 ? padded : padded + lanes;
}

// Scratch memory of a thread.
inline int64_t attention_scratch_bytes(const AttentionMapDivergence& call) {
  const int64_t bytes = call.scalar == Scalar::f64 ? 8 : 4;
  const int64_t keys = attention_padded(call.M, bytes), rows = attention_block_rows(call.M, bytes);
  const int64_t width_s = attention_padded(call.width_s, bytes), width_t = attention_padded(call.width_t, bytes);
  const int64_t panels = keys * (3 * width_s + width_t);
  return bytes * (panels + rows * (2 * attention_row_stride(call.M, bytes) + 2 * width_s + width_t) + 2 * keys);
}

}  // namespace pydistill
