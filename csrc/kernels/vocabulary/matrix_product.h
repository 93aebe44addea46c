// Dense products for kernels whose operands are in cache: register tiles over vectors of columns, and a packed form of
// the right factor.
#pragma once

#include "cpu_vocabulary.h"
#include "int16_pairs.h"

namespace pydistill {
namespace {

// A tile that fills the register file with sums: kRows x kColumns 64-byte vectors, plus room for one row of the right
// factor.
#if defined(__AVX512F__)
constexpr int kRows = 6, kColumns = 4;
#elif defined(__AVX2__)
constexpr int kRows = 6, kColumns = 1;
#else
constexpr int kRows = 2, kColumns = 1;
#endif

// How `vectors` columns are divided into blocks of a tile's width: kColumns, then halves of it.
PYDISTILL_INLINE int block_width(int64_t first, int64_t vectors) {
  int width = kColumns;
  while (first + width > vectors) width /= 2;
  return width;
}

// The right factor [depth][columns]: `row` elements from one depth to the next and `vector` from one vector of columns
// to the next; `packed` if every block of columns is contiguous (row and vector are then implied).
template <class T>
struct Right {
  const T* data;
  int64_t row = 0, vector = 0;
  bool packed = false;
};

// Where vector `v` of row `d` is in a packed factor.
template <class T>
PYDISTILL_INLINE int64_t packed_offset(int64_t d, int64_t v, int64_t depth, int64_t vectors) {
  constexpr int L = Lanes<T>::count;
  int64_t first = v / kColumns * kColumns;  // all blocks but those at the end have the full width
  while (first + block_width(first, vectors) <= v) first += block_width(first, vectors);
  return first * depth * L + d * block_width(first, vectors) * L + (v - first) * L;
}

// The left factor [rows][depth], and the product [rows][columns] with strides as in Right.
template <class T>
struct Left {
  const T* data;
  int64_t row, depth;
};
template <class T>
struct Product {
  T* data;
  int64_t row, vector;
  bool add;  // to the existing values, instead of overwriting them
};

// The factors of one term in a sum of products, which has at most kMostTerms terms.
constexpr int kMostTerms = 3;
template <class S>
struct Factors {
  const S *left, *right;
};

// `tiles` tiles below each other.
template <class T, int R, int C>
__attribute__((noinline)) void product_tiles(int64_t tiles, int64_t depth, Left<T> left, Right<T> right,
                                             Product<T> out) {
  using Reg = typename Registers<T>::Type;
  using Unaligned = typename Registers<T>::Unaligned;
  constexpr int lanes = Registers<T>::lanes, per = Registers<T>::per_vector;
  for (; tiles > 0; --tiles, left.data += R * left.row, out.data += R * out.row) {
    Reg sum[R][C * per];
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < C; ++c) __builtin_prefetch(out.data + r * out.row + c * out.vector, 1, 3);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int c = 0; c < C * per; ++c) sum[r][c] = Reg{};
    const T* b = right.data;
    const T* a = left.data;
    for (int64_t d = 0; d < depth; ++d, b += right.row, a += left.depth) {
      Reg column[C * per];
#pragma GCC unroll 8
      for (int c = 0; c < C * per; ++c)
        column[c] = *reinterpret_cast<const Unaligned*>(b + c / per * right.vector + c % per * lanes);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const Reg value = splat(a + r * left.row);
#pragma GCC unroll 8
        for (int c = 0; c < C * per; ++c) sum[r][c] = multiply_add(value, column[c], sum[r][c]);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int c = 0; c < C * per; ++c) {
        Unaligned& to = *reinterpret_cast<Unaligned*>(out.data + r * out.row + c / per * out.vector + c % per * lanes);
        to = out.add ? to + sum[r][c] : sum[r][c];
      }
  }
}

template <class T, int C>
PYDISTILL_INLINE void product_rows(int64_t rows, int64_t depth, Left<T> left, Right<T> right, Product<T> out) {
  const int64_t whole = rows / kRows;
  if (whole) product_tiles<T, kRows, C>(whole, depth, left, right, out);
  left.data += whole * kRows * left.row;
  out.data += whole * kRows * out.row;
  switch (rows % kRows) {
    case 1:
      product_tiles<T, 1, C>(1, depth, left, right, out);
      break;
#if defined(__AVX2__)
    case 2:
      product_tiles<T, 2, C>(1, depth, left, right, out);
      break;
    case 3:
      product_tiles<T, 3, C>(1, depth, left, right, out);
      break;
    case 4:
      product_tiles<T, 4, C>(1, depth, left, right, out);
      break;
    case 5:
      product_tiles<T, 5, C>(1, depth, left, right, out);
#endif
  }
}

// out (+)= left right, with `vectors` vectors of columns.
template <class T>
void multiply(int64_t rows, int64_t depth, int64_t vectors, Left<T> left, Right<T> right, Product<T> out) {
  constexpr int L = Lanes<T>::count;
  for (int64_t first = 0; first < vectors;) {
    const int width = block_width(first, vectors);
    Right<T> block = right;
    if (right.packed) {
      block.data = right.data + first * depth * L;
      block.row = width * L, block.vector = L;
    } else {
      block.data = right.data + first * right.vector;
    }
    Product<T> to = out;
    to.data += first * out.vector;
    if (width == 4)
      product_rows<T, kColumns>(rows, depth, left, block, to);
    else if (width == 2)
      product_rows<T, kColumns >= 2 ? 2 : 1>(rows, depth, left, block, to);
    else
      product_rows<T, 1>(rows, depth, left, block, to);
    first += width;
  }
}

}  // namespace
}  // namespace pydistill
