// CPU body: see soft_cross_entropy.h for what is computed. A row's tensors are widened into scratch memory, where the
// loops run over neighbours. Every loop treats its elements alike and sums run in a fixed order of sixteen partial
// sums, so that instruction sets of any width give the same bits.
#include "cpu_vocabulary.h"
#include "soft_cross_entropy.h"

namespace pydistill {
namespace {

using Call = SoftCrossEntropy;
using Form = Call::Form;
using Kind = Call::Kind;

template <class S, class T>
PYDISTILL_INLINE void load_row_of(const Call::Rows& rows, int64_t n, int64_t K, T* to) {
  const S* const from = static_cast<const S*>(rows.data) + n * rows.row;
  for (int64_t k = 0; k < K; ++k) to[k] = widen(from[k * rows.column]);
}

template <class T>
void load_row(Scalar scalar, const Call::Rows& rows, int64_t n, int64_t K, T* to) {
  if constexpr (sizeof(T) == 8) {
    load_row_of<double>(rows, n, K, to);
  } else {
    if (scalar == Scalar::f32) load_row_of<float>(rows, n, K, to);
    if (scalar == Scalar::bf16) load_row_of<Bf16>(rows, n, K, to);
    if (scalar == Scalar::f16) load_row_of<F16>(rows, n, K, to);
  }
}

template <class S, class T>
PYDISTILL_INLINE void store_row_of(const T* from, int64_t n, int64_t K, void* rows) {
  S* const to = static_cast<S*>(rows) + n * K;
  for (int64_t k = 0; k < K; ++k) narrow(from[k], to[k]);
}

template <class T>
void store_row(Scalar scalar, const T* from, int64_t n, int64_t K, void* rows) {
  if constexpr (sizeof(T) == 8) {
    store_row_of<double>(from, n, K, rows);
  } else {
    if (scalar == Scalar::f32) store_row_of<float>(from, n, K, rows);
    if (scalar == Scalar::bf16) store_row_of<Bf16>(from, n, K, rows);
    if (scalar == Scalar::f16) store_row_of<F16>(from, n, K, rows);
  }
}

template <class T, class Combine, class Term>
PYDISTILL_INLINE T fold(int64_t K, T start, Combine combine, Term term) {
  T part[16];
  for (T& p : part) p = start;
  int64_t k = 0;
  for (; k + 16 <= K; k += 16)
    for (int i = 0; i < 16; ++i) part[i] = combine(part[i], term(k + i));
  for (int i = 0; k < K; ++k, ++i) part[i] = combine(part[i], term(k));
  for (int half = 8; half; half /= 2)
    for (int i = 0; i < half; ++i) part[i] = combine(part[i], part[i + half]);
  return part[0];
}

template <class T, class Term>
PYDISTILL_INLINE T sum(int64_t K, Term term) {
  return fold(K, T(0), [](T a, T b) PYDISTILL_LAMBDA { return a + b; }, term);
}

// p = softmax(x). x loses its maximum; what is returned is the logarithm of the sum of exp(x) after that.
template <class T>
T softmax(int64_t K, T* x, T* p) {
  // A NaN is passed over here and comes back with the sum.
  const T max = fold(
      K, -T(__builtin_inff()), [](T a, T b) PYDISTILL_LAMBDA { return b > a ? b : a; },
      [&](int64_t k) PYDISTILL_LAMBDA { return x[k]; });
  for (int64_t k = 0; k < K; ++k) {
    x[k] -= max;
    p[k] = exp_lane(x[k]);
  }
  const T total = sum<T>(K, [&](int64_t k) PYDISTILL_LAMBDA { return p[k]; });
  for (int64_t k = 0; k < K; ++k) p[k] /= total;
  return log_lane(total);
}

template <class T>
void run_row(const Call& call, int64_t n, T* scratch) {
  const int64_t K = call.K;
  const bool hard = call.kind == Kind::hard, probs = call.kind == Kind::probs;
  const bool tangents = call.form == Form::jvp || call.form == Form::backward_jvp;
  T *const u = scratch, *const p = u + K, *const t = p + K, *const l_t = t + K, *const t_t = l_t + K;

  load_row(call.scalar, call.logits, n, K, u);
  const T log_sum = softmax(K, u, p);
  for (int64_t k = 0; k < K; ++k) u[k] = log_sum - u[k];

  if (hard) {
    const int64_t label = static_cast<const int64_t*>(call.labels.data)[n * call.labels.row];
    const T off = label >= 0 && label < K ? T(0) : T(__builtin_nanf(""));
    for (int64_t k = 0; k < K; ++k) t[k] = k == label ? T(1) : off;
  } else if (probs) {
    load_row(call.scalar, call.labels, n, K, t);
  } else {
    load_row(call.scalar, call.labels, n, K, t_t);
    softmax(K, t_t, t);
  }
  const T s = probs ? sum<T>(K, [&](int64_t k) PYDISTILL_LAMBDA { return t[k]; }) : T(1);

  // A class that is not the hard label has no part in the loss, even where its u is infinite.
  const auto weighted = [&](T weight, T x) PYDISTILL_LAMBDA { return hard && weight == 0 ? T(0) : weight * x; };
  const T loss = sum<T>(K, [&](int64_t k) PYDISTILL_LAMBDA { return weighted(t[k], u[k]); });
  T* const loss_out = static_cast<T*>(call.loss) + n;
  if (call.form == Form::forward) *loss_out = loss;

  const auto along = [&](const Call::Rows& rows)
                         PYDISTILL_LAMBDA { return rows.data ? static_cast<const T*>(rows.data)[n * rows.row] : T(0); };
  if (call.form == Form::backward) {
    const T g = along(call.grad);
    for (int64_t k = 0; k < K; ++k) {
      p[k] = g * (s * p[k] - t[k]);
      t[k] = g * (probs ? u[k] : t[k] * (u[k] - loss));
    }
  }
  if (tangents) {
    load_row(call.scalar, call.logits_t, n, K, l_t);
    const T a = sum<T>(K, [&](int64_t k) PYDISTILL_LAMBDA { return p[k] * l_t[k]; });
    T s_t = 0;
    if (hard) {
      for (int64_t k = 0; k < K; ++k) t_t[k] = 0;
    } else {
      load_row(call.scalar, call.labels_t, n, K, t_t);
      if (probs) {
        s_t = sum<T>(K, [&](int64_t k) PYDISTILL_LAMBDA { return t_t[k]; });
      } else {
        const T b = sum<T>(K, [&](int64_t k) PYDISTILL_LAMBDA { return t[k] * t_t[k]; });
        for (int64_t k = 0; k < K; ++k) t_t[k] = t[k] * (t_t[k] - b);
      }
    }
    const T loss_t =
        sum<T>(K, [&](int64_t k) PYDISTILL_LAMBDA { return weighted(t_t[k], u[k]) + weighted(t[k], a - l_t[k]); });
    *loss_out = loss_t;

    if (call.form == Form::backward_jvp) {
      const T g = along(call.grad), g_t = along(call.grad_t);
      const bool moving = call.grad_t.data != nullptr;  // zero times an infinite u would be NaN
      for (int64_t k = 0; k < K; ++k) {
        const T u_t = a - l_t[k];
        T to_logits = g * (s_t * p[k] - s * (p[k] * u_t) - t_t[k]);
        T to_labels = g * (probs ? u_t : t_t[k] * (u[k] - loss) + t[k] * (u_t - loss_t));
        if (moving) {
          to_logits += g_t * (s * p[k] - t[k]);
          to_labels += g_t * (probs ? u[k] : t[k] * (u[k] - loss));
        }
        p[k] = to_logits;
        t[k] = to_labels;
      }
    }
  }
  if (call.form == Form::backward || call.form == Form::backward_jvp) {
    store_row(call.scalar, p, n, K, call.grad_logits);
    if (!hard) store_row(call.scalar, t, n, K, call.grad_labels);
  }
}

}  // namespace

void PYDISTILL_KERNEL(const SoftCrossEntropy& call, int64_t begin, int64_t end, void* scratch) {
  for (int64_t n = begin; n < end; ++n)
    call.scalar == Scalar::f64 ? run_row(call, n, static_cast<double*>(scratch))
                               : run_row(call, n, static_cast<float*>(scratch));
}

}  // namespace pydistill
