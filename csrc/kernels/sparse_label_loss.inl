// CPU body: see sparse_label_loss.h for what is computed, and softmax_rows.h for how rows are traversed.
#include "sparse_label_loss.h"
#include "vocabulary/softmax_rows.h"

namespace pydistill {
namespace {

using Call = SparseLabelLoss;
using Tail = Call::Tail;

template <class T>
void run_row(const Call& call, int64_t n, T* scratch) {
  const int64_t C = call.C, k = call.k;
  T *const p = scratch + 2 * C, *const log_q = p + C;
  const auto index = [&](int64_t j) PYDISTILL_LAMBDA {
    return static_cast<const int64_t*>(call.indices.data)[n * call.indices.row + j * call.indices.column];
  };

  // As few passes over the row as possible: if it is stored in the compute type, neither it nor its gradient is
  // copied. q = exp(z) with z = (x - max x) / T.
  const bool same = call.scalar == (sizeof(T) == 8 ? Scalar::f64 : Scalar::f32);
  const T* x = scratch;
  if (same && call.logits.column == 1)
    x = static_cast<const T*>(call.logits.data) + n * call.logits.row;
  else
    load_row(call.scalar, call.logits, n, C, scratch);
  T* const q = same && call.grad_logits ? static_cast<T*>(call.grad_logits) + n * C : scratch + C;
  const T cold = T(1 / call.T), high = largest(C, x);
  const T total = exp_row<T>(C, cold, high, x, nullptr, q);
  const T log_sum = log_lane(total);

  const int64_t first = n * call.values.row, next = call.values.column;
  if (call.codes) {
    const T step = T(call.step);
    for (int64_t j = 0; j < k; ++j)
      p[j] = exp_lane(-step * T(static_cast<const uint8_t*>(call.values.data)[first + j * next]));
  } else {
    for (int64_t j = 0; j < k; ++j) p[j] = static_cast<const T*>(call.values.data)[first + j * next];
  }
  T s = sum<T>(k, [&](int64_t j) PYDISTILL_LAMBDA { return p[j]; });
  T u = 0;
  if (call.tail == Tail::renorm) {
    for (int64_t j = 0; j < k; ++j) p[j] /= s;
    s = 1;
  } else if (call.tail == Tail::smooth && k < C) {
    u = (s < 1 ? 1 - s : s - s) / T(C - k);  // not 0: NaN stays
    s += u * T(C - k);
  }

  // A zero probability adds nothing, whatever its logarithm. Sums over the k classes are in double, as k is small. A
  // class already seen is marked by a value that no log q has.
  for (int64_t c = 0; c < C; ++c) log_q[c] = (x[c] - high) * cold - log_sum;
  double loss = 0;
  bool valid = true;
  for (int64_t j = 0; j < k; ++j) {
    const int64_t c = index(j);
    valid = c >= 0 && c < C && !(log_q[c] > 0);
    if (!valid) break;
    if (p[j] != 0) loss += p[j] * ((call.entropy ? log_lane(p[j]) : T(0)) - log_q[c]);
    log_q[c] = 1;
  }
  if (valid && u != 0) {
    for (int64_t j = 0; j < k; ++j) log_q[index(j)] = 0;
    const double others = sum<T>(C, [&](int64_t c) PYDISTILL_LAMBDA { return log_q[c]; });
    loss += u * ((call.entropy ? static_cast<double>(C - k) * log_lane(u) : 0.0) - others);
  }
  const T nan = T(__builtin_nanf(""));
  const T scale = T(call.scale);
  T factor = scale * cold;
  if (call.grad.data) factor *= static_cast<const T*>(call.grad.data)[n * call.grad.row];

  if (call.loss) static_cast<T*>(call.loss)[n] = valid ? static_cast<T>(scale * loss) : nan;
  if (!call.grad_logits) return;
  const T share = s / total;
  if (valid) {
    for (int64_t j = 0; j < k; ++j) p[j] = factor * (share * q[index(j)] - p[j]);
    for (int64_t c = 0; c < C; ++c) q[c] = factor * (share * q[c] - u);
    for (int64_t j = 0; j < k; ++j) q[index(j)] = p[j];
  } else {
    for (int64_t c = 0; c < C; ++c) q[c] = nan;
  }
  if (!same) store_row(call.scalar, q, n, C, call.grad_logits);
}

}  // namespace

void PYDISTILL_KERNEL(const SparseLabelLoss& call, int64_t begin, int64_t end, void* scratch) {
  with_number(call.scalar, [&](auto t) PYDISTILL_LAMBDA {
    for (int64_t n = begin; n < end; ++n) run_row(call, n, static_cast<decltype(t)*>(scratch));
  });
}

}  // namespace pydistill
