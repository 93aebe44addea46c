// Scalar products of the rows of two flat vectors, as the CPU body receives them.
//
// Per vector k and row r, a run of adjacent elements: <a, b>, <a, a>, <b, b>, |a - b|^2. The forms:
//   forward    a, b             -> products [K, R, 4]
//   jvp        a, b, a_t, b_t   -> products: their derivatives along (a_t, b_t),
//              <a_t, b> + <a, b_t>, 2 <a, a_t>, 2 <b, b_t>, 2 <a - b, a_t - b_t>
//   backward   grad c, a, b     -> grad_a = c0 b + 2 c1 a + 2 c3 (a - b),  grad_b = c0 a + 2 c2 b - 2 c3 (a - b),
//              zero for elements in no row
// backward is linear in c and, by a symmetric matrix, in (a, b); jvp is bilinear in (a, b) and (a_t, b_t). Hence their
// derivatives are sums of these three forms again, to any order.
#pragma once

#include <cstdint>

#include "../common/scalar.h"

namespace pydistill {

struct RowProducts {
  enum class Form : int { forward, backward, jvp };

  // [K, P]: base pointer and distance from one vector to the next, in elements; a vector's elements are adjacent
  struct Vectors {
    void* data = nullptr;
    int64_t next = 0;
  };
  // `count` rows of `length` elements, one after the other
  struct Block {
    int64_t start, count, length;
    int64_t first;  // number of the first row; negative: elements in no row
  };

  Form form = Form::forward;
  Scalar scalar = Scalar::f32;  // of vectors; products and their gradient are double for f64, else float
  int64_t K = 0, R = 0;
  const Block* blocks = nullptr;
  int64_t units = 0;  // of a vector: the rows of all blocks

  Vectors a, b, a_t, b_t;      // a_t and b_t in jvp
  Vectors grad_a, grad_b;      // written in backward
  const void* grad = nullptr;  // [K, R, 4], in backward
  void* products = nullptr;    // [K, R, 4]
};

}  // namespace pydistill
