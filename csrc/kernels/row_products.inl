// CPU body: see row_products.h for what is computed. A row is summed in runs of 1024 elements, each in the lanes of a
// vector and then over these, the runs in double: the rounding error does not grow with the row, and instruction sets
// of any width give the same bits.
#include "row_products.h"
#include "vocabulary/cpu_vocabulary.h"

namespace pydistill {
namespace {

using Call = RowProducts;
using Form = Call::Form;
constexpr int64_t kStretch = 1024;

template <class S>
PYDISTILL_INLINE S* at(const Call::Vectors& vectors, int64_t k, int64_t element) {
  return static_cast<S*>(vectors.data) + k * vectors.next + element;
}

// The last elements of a row, padded with zeros, which add nothing to any product.
template <class T, class S>
PYDISTILL_INLINE Vec<T> load_part(const S* from, int64_t count) {
  Vec<T> v{};
  for (int64_t i = 0; i < count; ++i) v[i] = widen(from[i]);
  return v;
}

template <class T>
PYDISTILL_INLINE T sum_lanes(Vec<T> v) {
  for (int half = Lanes<T>::count / 2; half; half /= 2)
    for (int i = 0; i < half; ++i) v[i] += v[i + half];
  return v[0];
}

// `term(offset, count, sums)` adds the products of `count` elements, at most as many as there are lanes.
template <class T, class Term>
PYDISTILL_INLINE void sum_row(int64_t length, T* out, Term term) {
  constexpr int64_t L = Lanes<T>::count;
  double total[4] = {};
  for (int64_t start = 0; start < length; start += kStretch) {
    const int64_t end = start + kStretch < length ? start + kStretch : length;
    Vec<T> sums[4] = {};
    int64_t i = start;
    for (; i + L <= end; i += L) term(i, L, sums);
    if (i < end) term(i, end - i, sums);
    for (int j = 0; j < 4; ++j) total[j] += sum_lanes<T>(sums[j]);
  }
  for (int j = 0; j < 4; ++j) out[j] = static_cast<T>(total[j]);
}

template <class T, class S>
PYDISTILL_INLINE Vec<T> load_row(const S* from, int64_t count) {
  return count == Lanes<T>::count ? load_widened<T>(from) : load_part<T>(from, count);
}

template <class T, class S>
__attribute__((noinline)) void forward(const S* a, const S* b, int64_t length, T* out) {
  sum_row(length, out, [&](int64_t i, int64_t count, Vec<T>(&sums)[4]) PYDISTILL_LAMBDA {
    const Vec<T> x = load_row<T>(a + i, count), y = load_row<T>(b + i, count), d = x - y;
    sums[0] += x * y, sums[1] += x * x, sums[2] += y * y, sums[3] += d * d;
  });
}

template <class T, class S>
__attribute__((noinline)) void jvp(const S* a, const S* b, const S* a_t, const S* b_t, int64_t length, T* out) {
  sum_row(length, out, [&](int64_t i, int64_t count, Vec<T>(&sums)[4]) PYDISTILL_LAMBDA {
    const Vec<T> x = load_row<T>(a + i, count), y = load_row<T>(b + i, count);
    const Vec<T> x_t = load_row<T>(a_t + i, count), y_t = load_row<T>(b_t + i, count);
    sums[0] += x_t * y + x * y_t, sums[1] += x * x_t, sums[2] += y * y_t, sums[3] += (x - y) * (x_t - y_t);
  });
  for (int j = 1; j < 4; ++j) out[j] *= T(2);
}

template <class T, class S>
__attribute__((noinline)) void backward(const S* a, const S* b, int64_t length, const T* c, S* grad_a, S* grad_b) {
  const T both = c[0], of_a = 2 * c[1], of_b = 2 * c[2], apart = 2 * c[3];
  for (int64_t i = 0; i < length; ++i) {
    const T x = widen(a[i]), y = widen(b[i]), d = apart * (x - y);
    narrow(both * y + of_a * x + d, grad_a[i]);
    narrow(both * x + of_b * y - d, grad_b[i]);
  }
}

template <class T, class S>
void run_row(const Call& call, int64_t k, int64_t start, int64_t length, int64_t row) {
  const S *const a = at<const S>(call.a, k, start), *const b = at<const S>(call.b, k, start);
  const int64_t place = (k * call.R + row) * 4;
  if (call.form == Form::backward) {
    S *const grad_a = at<S>(call.grad_a, k, start), *const grad_b = at<S>(call.grad_b, k, start);
    if (row >= 0) {
      backward<T, S>(a, b, length, static_cast<const T*>(call.grad) + place, grad_a, grad_b);
    } else {
      for (int64_t i = 0; i < length; ++i) grad_a[i] = grad_b[i] = S{};
    }
    return;
  }
  T* const out = static_cast<T*>(call.products) + place;
  if (call.form == Form::forward)
    forward<T, S>(a, b, length, out);
  else
    jvp<T, S>(a, b, at<const S>(call.a_t, k, start), at<const S>(call.b_t, k, start), length, out);
}

template <class T, class S>
void run(const Call& call, int64_t begin, int64_t end) {
  for (int64_t unit = begin; unit < end; ++unit) {
    int64_t i = unit % call.units;
    const Call::Block* block = call.blocks;
    for (; i >= block->count; ++block) i -= block->count;
    const int64_t row = block->first < 0 ? -1 : block->first + i;
    run_row<T, S>(call, unit / call.units, block->start + i * block->length, block->length, row);
  }
}

}  // namespace

void PYDISTILL_KERNEL(const RowProducts& call, int64_t begin, int64_t end) {
  with_types(call.scalar, [&](auto t, auto s) PYDISTILL_LAMBDA { run<decltype(t), decltype(s)>(call, begin, end); });
}

}  // namespace pydistill
