// A greedy graph cut, as the CPU body receives it.
//
// Sample j stands for the vector g_j = a_j (x) [e_j, 1] of length 1: e_j is its embedding, a_j its factors times the
// sample's scale; without factors it is e_j alone, times the scale. With M the sum of the picks' vectors, the gain
// of j is, up to a constant common to all samples,
//
//   gain_j = lam / 2 sum over i of g_i . g_j - g_j . M
//
// so one gain costs O(C d), and bounds tell which samples can be the best. Since the last pass over all samples M has
// moved by w; its effect on j is known except for w's part outside a few orthonormal directions, with coordinates p:
//
//   |g_j . w - p_j . p_w| <= sqrt(1 - |p_j|^2) sqrt(|w|^2 - |p_w|^2)
//
// The directions are the rows of sum g_i, a group of adjacent rows each: all picks are mostly in their span.
//
// The forms, in this order: `scale` computes the scales, `total` sums all vectors into `moved`, `pass` subtracts what
// has `moved` from all gains, `pick` picks until the next pass is needed. Sums are in float64.
#pragma once

#include <cstdint>

#include "../common/scalar.h"

namespace pydistill {

struct GraphCutGreedy {
  enum class Form : int { scale, total, pass, pick };

  // Gains that differ by less are ties: float64's rounding is far below, a float32 embedding's far above.
  static constexpr double kTie = 1e-9;
  static constexpr int64_t kPanel = 64;  // columns in a unit of work of `total`
  static constexpr int64_t kMaxDirections = 16;

  Form form = Form::scale;
  Scalar scalar = Scalar::f32;  // of embeddings and factors: f32 or f64
  int64_t N = 0, d = 0, C = 1, budget = 0;
  double lam = 1;
  const void* embeddings = nullptr;  // [N][d]
  const void* factors = nullptr;     // [N][C] or absent

  double* scale = nullptr;     // [N]
  double* moved = nullptr;     // [C][d + 1], the last column for the 1
  double* gain = nullptr;      // [N], exact at the last pass; minus infinity for picks
  double* estimate = nullptr;  // [N], with what is known of the move since then
  double* outside = nullptr;   // [N], sqrt(1 - |p_j|^2)
  double* along = nullptr;     // [directions][N], p_j
  double* exact = nullptr;     // [N], of the candidates
  int64_t* near = nullptr;     // [N], the candidates
  int64_t* picks = nullptr;    // [budget]
  int64_t picked = 0;          // of them

  int64_t rows_of_direction() const { return (C + kMaxDirections - 1) / kMaxDirections; }
  int64_t directions() const { return (C + rows_of_direction() - 1) / rows_of_direction(); }
  int64_t panels() const { return (d + 1 + kPanel - 1) / kPanel; }
};

}  // namespace pydistill
