// Sums in a fixed order of sixteen partial sums, so that instruction sets of any width give the same bits.
#pragma once

#include "cpu_vocabulary.h"

namespace pydistill {
namespace {

template <class T>
PYDISTILL_INLINE T sum_in_pairs(T (&part)[16]) {
  for (int half = 8; half; half /= 2)
    for (int i = 0; i < half; ++i) part[i] += part[i + half];
  return part[0];
}

// In sixteen partial sums, which are then added in pairs.
template <class T, class Term>
PYDISTILL_INLINE T sum(int64_t K, Term term) {
  T part[16] = {};
  int64_t k = 0;
  for (; k + 16 <= K; k += 16)
    for (int i = 0; i < 16; ++i) part[i] += term(k + i);
  for (int i = 0; k < K; ++k, ++i) part[i] += term(k);
  return sum_in_pairs(part);
}

}  // namespace
}  // namespace pydistill
