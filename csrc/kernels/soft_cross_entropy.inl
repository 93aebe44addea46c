// CPU body: see soft_cross_entropy.h for what is computed, and softmax_rows.h for how rows are traversed.
#include "soft_cross_entropy.h"
#include "vocabulary/softmax_rows.h"

namespace pydistill {
namespace {

using Call = SoftCrossEntropy;
using Form = Call::Form;
using Kind = Call::Kind;

template <class T>
void run_row(const Call& call, int64_t n, T* scratch) {
  const int64_t K = call.K;
  const bool hard = call.kind == Kind::hard, probs = call.kind == Kind::probs;
  const bool tangents = call.form == Form::jvp || call.form == Form::backward_jvp;
  T *const u = scratch, *const p = u + K, *const t = p + K, *const l_t = t + K, *const t_t = l_t + K;

  load_row(call.scalar, call.logits, n, K, u);
  const T log_sum = softmax(K, T(1), u, u, p);
  for (int64_t k = 0; k < K; ++k) u[k] = log_sum - u[k];

  if (hard) {
    const int64_t label = static_cast<const int64_t*>(call.labels.data)[n * call.labels.row];
    const T off = label >= 0 && label < K ? T(0) : T(__builtin_nanf(""));
    for (int64_t k = 0; k < K; ++k) t[k] = k == label ? T(1) : off;
  } else if (probs) {
    load_row(call.scalar, call.labels, n, K, t);
  } else {
    load_row(call.scalar, call.labels, n, K, t_t);
    softmax(K, T(1), t_t, t_t, t);
  }
  const T s = probs ? sum<T>(K, [&](int64_t k) PYDISTILL_LAMBDA { return t[k]; }) : T(1);

  // A class with zero probability on both sides takes no part: its u counts as a constant 0.
  const T infinity = T(__builtin_inff());
  for (int64_t k = 0; k < K; ++k) u[k] = t[k] == 0 && u[k] == infinity ? T(0) : u[k];
  const auto weighted = [](T weight, T x) PYDISTILL_LAMBDA { return weight == 0 ? T(0) : weight * x; };
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
    T* const u_t = l_t;
    const auto out = [&](int64_t k) PYDISTILL_LAMBDA { return p[k] == 0 && u[k] == 0; };
    for (int64_t k = 0; k < K; ++k) u_t[k] = out(k) ? T(0) : a - l_t[k];
    T s_t = 0;
    if (hard) {
      for (int64_t k = 0; k < K; ++k) t_t[k] = 0;
    } else {
      load_row(call.scalar, call.labels_t, n, K, t_t);
      if (probs) {
        for (int64_t k = 0; k < K; ++k) t_t[k] = out(k) ? T(0) : t_t[k];
        s_t = sum<T>(K, [&](int64_t k) PYDISTILL_LAMBDA { return t_t[k]; });
      } else {
        const T b = sum<T>(K, [&](int64_t k) PYDISTILL_LAMBDA { return t[k] * t_t[k]; });
        for (int64_t k = 0; k < K; ++k) t_t[k] = t[k] * (t_t[k] - b);
      }
    }
    const T loss_t =
        sum<T>(K, [&](int64_t k) PYDISTILL_LAMBDA { return weighted(t_t[k], u[k]) + weighted(t[k], u_t[k]); });
    *loss_out = loss_t;

    if (call.form == Form::backward_jvp) {
      const T g = along(call.grad), g_t = along(call.grad_t);
      const bool moving = call.grad_t.data != nullptr;  // zero times an infinite u would be NaN
      for (int64_t k = 0; k < K; ++k) {
        T to_logits = g * (s_t * p[k] - s * (p[k] * u_t[k]) - t_t[k]);
        T to_labels = g * (probs ? u_t[k] : t_t[k] * (u[k] - loss) + t[k] * (u_t[k] - loss_t));
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
  with_number(call.scalar, [&](auto t) PYDISTILL_LAMBDA {
    for (int64_t n = begin; n < end; ++n) run_row(call, n, static_cast<decltype(t)*>(scratch));
  });
}

}  // namespace pydistill
