// Products of bf16 factors with float sums on vectors: an instruction takes pairs adjacent in the sum's order, twice as
// many factors as floats. Register tiles are those of matrix_product.h, with a pair in place of a float.
#pragma once

#include "matrix_product.h"

#if defined(__AVX512BF16__)

namespace pydistill {
namespace {

template <class T, bool ROUNDED>
struct Native;

// Two rows of 16 bf16 as 16 pairs.
PYDISTILL_INLINE __m512i pair_rows(__m256i even, __m256i odd) {
  typedef uint16_t Halves __attribute__((vector_size(32)));
  typedef uint32_t Pairs __attribute__((vector_size(64)));
  return (__m512i)(__builtin_convertvector((Halves)even, Pairs) | __builtin_convertvector((Halves)odd, Pairs) << 16);
}

PYDISTILL_INLINE __m256i load_half(const Bf16* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }

// What the operand classes of bf16 have in common.
struct Bf16Operands {
  using Operand = Bf16;
  using Stored = Bf16;

  PYDISTILL_INLINE static Operand narrow_one(float v) {
    Bf16 half;
    narrow(v, half);
    return half;
  }
  PYDISTILL_INLINE static __m256i halves(Vec<float> v) {
    return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(reinterpret_cast<__m512>(v)));
  }
  PYDISTILL_INLINE static void put(Operand* to, Vec<float> v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), halves(v));
  }
  PYDISTILL_INLINE static void keep(Stored* to, Vec<float> v) { put(to, v); }
  PYDISTILL_INLINE static Vec<float> widened(const Operand* from) {
    return reinterpret_cast<Vec<float>>(pair_rows(__m256i{}, load_half(from)));
  }
};

PYDISTILL_INLINE __m512bh splat_pair(const Bf16* p) {
  int32_t bits;
  __builtin_memcpy(&bits, p, 4);
  return reinterpret_cast<__m512bh>(_mm512_set1_epi32(bits));
}

// A sum of `terms` products of `pairs` pairs each. Left factors have their rows `row` elements apart and a row's pairs
// `pair` elements apart; right factors are packed.
struct PairProduct {
  int64_t pairs, row, pair;
  int terms;
  Factors<Bf16> factors[kMostTerms];
};

// `tiles` tiles below each other; right factors are [pairs][C] vectors of pairs.
template <int R, int C>
__attribute__((noinline)) void pair_tiles(int64_t tiles, const PairProduct& of, int64_t first_row, int64_t right,
                                          Product<float> out) {
  for (; tiles > 0; --tiles, first_row += R, out.data += R * out.row) {
    __m512 sum[R][C];
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < C; ++c) __builtin_prefetch(out.data + r * out.row + c * out.vector, 1, 3);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) sum[r][c] = _mm512_setzero_ps();
    for (int term = 0; term < of.terms; ++term) {
      const Bf16 *a = of.factors[term].left + first_row * of.row, *b = of.factors[term].right + right;
      const int64_t row = of.row, pair = of.pair;
      for (int64_t d = of.pairs; d > 0; --d, a += pair, b += C * 32) {
        __m512bh column[C];
#pragma GCC unroll 8
        for (int c = 0; c < C; ++c) column[c] = reinterpret_cast<__m512bh>(_mm512_loadu_si512(b + c * 32));
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
          const __m512bh value = splat_pair(a + r * row);
#pragma GCC unroll 8
          for (int c = 0; c < C; ++c) sum[r][c] = _mm512_dpbf16_ps(sum[r][c], value, column[c]);
        }
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) {
        float* const to = out.data + r * out.row + c * out.vector;
        _mm512_storeu_ps(to, out.add ? _mm512_add_ps(_mm512_loadu_ps(to), sum[r][c]) : sum[r][c]);
      }
  }
}

template <int C>
PYDISTILL_INLINE void pair_rows_product(int64_t rows, const PairProduct& of, int64_t right, Product<float> out) {
  const int64_t whole = rows / kRows * kRows;
  if (whole) pair_tiles<kRows, C>(whole / kRows, of, 0, right, out);
  out.data += whole * out.row;
  switch (rows - whole) {
    case 1:
      return pair_tiles<1, C>(1, of, whole, right, out);
    case 2:
      return pair_tiles<2, C>(1, of, whole, right, out);
    case 3:
      return pair_tiles<3, C>(1, of, whole, right, out);
    case 4:
      return pair_tiles<4, C>(1, of, whole, right, out);
    case 5:
      return pair_tiles<5, C>(1, of, whole, right, out);
  }
}

// Of `vectors` vectors of columns, in blocks of block_width.
inline void multiply_pairs(int64_t rows, int64_t vectors, const PairProduct& of, Product<float> out) {
  for (int64_t first = 0; first < vectors;) {
    const int width = block_width(first, vectors);
    const int64_t right = first * of.pairs * 32;
    if (width == 4)
      pair_rows_product<4>(rows, of, right, out);
    else if (width == 2)
      pair_rows_product<2>(rows, of, right, out);
    else
      pair_rows_product<1>(rows, of, right, out);
    first += width, out.data += width * out.vector;
  }
}

struct Bf16Pairs : Bf16Operands {
  using Primal = Native<float, false>;  // a separate operand costs less than sums of two, and is more accurate
  static constexpr int64_t kChannels = 16, kTiles = 2;
  static constexpr bool kSplit = false;

  // Rows d and d + 1 of vector v of a right factor [depth][vectors]: every block of columns is contiguous.
  PYDISTILL_INLINE static void pack(Operand* to, int64_t d, int64_t v, int64_t depth, int64_t vectors, Vec<float> even,
                                    Vec<float> odd) {
    _mm512_storeu_si512(to + 2 * packed_offset<float>(d / 2, v, depth / 2, vectors),
                        pair_rows(halves(even), halves(odd)));
  }

  static void product(int64_t rows, int64_t depth, int64_t vectors, const Factors<Bf16>* factors, int terms,
                      int64_t left_row, Product<float> out) {
    PairProduct of{depth / 2, left_row, 2, terms, {}};
    for (int i = 0; i < terms; ++i) of.factors[i] = factors[i];
    multiply_pairs(rows, vectors, of, out);
  }

  // The sum runs along rows of the operands, where pairs have to be adjacent: both are repacked, part of the depth of
  // all terms and of the rows and columns at a time.
  static void outer(int64_t rows, int64_t depth, int64_t vectors, const Factors<Bf16>* factors, int terms,
                    int64_t left_row, int64_t right_row, Product<float> out) {
    constexpr int64_t kDepth = 64, kLefts = 128;
    alignas(64) Bf16 lefts[kLefts * kDepth], rights[kColumns * 16 * kDepth];
    for (int64_t d = 0; d < terms * depth; d += kDepth) {
      const int64_t pairs = (terms * depth - d < kDepth ? terms * depth - d : kDepth) / 2;
      for (int64_t r = 0; r < rows; r += kLefts) {
        const int64_t high = rows - r < kLefts ? rows - r : kLefts, stride = (high + 15) / 16 * 16;
        for (int64_t t = 0; t < pairs; ++t) {
          const int64_t at = d + 2 * t;
          const Bf16* const from = factors[at / depth].left + at % depth * left_row + r;
          for (int64_t i = 0; i < high; i += 16)
            _mm512_store_si512(lefts + (t * stride + i) * 2,
                               pair_rows(load_half(from + i), load_half(from + left_row + i)));
        }
        for (int64_t v = 0; v < vectors;) {
          const int width = block_width(v, vectors);
          for (int64_t t = 0; t < pairs; ++t) {
            const int64_t at = d + 2 * t;
            const Bf16* const from = factors[at / depth].right + at % depth * right_row + v * 16;
            for (int i = 0; i < width; ++i)
              _mm512_store_si512(rights + (t * width + i) * 32,
                                 pair_rows(load_half(from + i * 16), load_half(from + right_row + i * 16)));
          }
          multiply_pairs(high, width, {pairs, 2, stride * 2, 1, {{lefts, rights}}},
                         {out.data + r * out.row + v * out.vector, out.row, out.vector, out.add || d > 0});
          v += width;
        }
      }
    }
  }
};

}  // namespace
}  // namespace pydistill

#endif
