// CPU body: see kd_divergence.h for what is computed, and softmax_rows.h for how rows are traversed.
#include "kd_divergence.h"
#include "vocabulary/softmax_rows.h"

namespace pydistill {
namespace {

using Call = KdDivergence;
using Form = Call::Form;
using Kind = Call::Kind;

// log x to about one unit in the last place, without branches so that loops over it are vectorised, and in operations
// that every instruction set rounds alike: x = 2^n m, and log m by the polynomial of Cephes' logf.
PYDISTILL_INLINE float log_of(float x) {
  const bool subnormal = x < 1.17549435e-38f;
  const float normal = subnormal ? x * 8388608.0f : x;
  int32_t bits;
  __builtin_memcpy(&bits, &normal, 4);
  int32_t exponent = (bits >> 23) - (subnormal ? 126 + 23 : 126);
  const int32_t mantissa = (bits & 0x007FFFFF) | 0x3F000000;
  float m;  // in [0.5, 1)
  __builtin_memcpy(&m, &mantissa, 4);
  const bool low = m < 0.707106781f;
  exponent -= low ? 1 : 0;
  m = (low ? m + m : m) - 1.0f;
  const float n = static_cast<float>(exponent), square = m * m;
  float y = 7.0376836292e-2f;
  y = y * m - 1.1514610310e-1f;
  y = y * m + 1.1676998740e-1f;
  y = y * m - 1.2420140846e-1f;
  y = y * m + 1.4249322787e-1f;
  y = y * m - 1.6668057665e-1f;
  y = y * m + 2.0000714765e-1f;
  y = y * m - 2.4999993993e-1f;
  y = y * m + 3.3333331174e-1f;
  y = y * m * square + n * -2.12194440e-4f - 0.5f * square;
  const float found = (m + y) + n * 0.693359375f;
  const float infinity = __builtin_inff();
  return x > 0 && x < infinity ? found : x == 0 ? -infinity : x > 0 ? x : __builtin_nanf("");
}
PYDISTILL_INLINE double log_of(double x) { return log_lane(x); }

// (1 + x)^gamma - 1
PYDISTILL_INLINE float grown(float x, float gamma) { return __builtin_expm1f(gamma * __builtin_log1pf(x)); }
PYDISTILL_INLINE double grown(double x, double gamma) { return __builtin_expm1(gamma * __builtin_log1p(x)); }

// A zero probability adds nothing; NaN stays.
template <class T>
PYDISTILL_INLINE T weighted(T weight, T x) {
  return weight == 0 ? T(0) : weight * x;
}

// A row in scratch memory; `h` and `u` only along a direction.
template <class T>
struct Row {
  T *x, *log_q, *q, *p, *log_p, *a, *g, *x_t, *u, *h;

  Row(T* scratch, int64_t C) {
    T** const all[] = {&x, &log_q, &q, &p, &log_p, &a, &g, &x_t, &u, &h};
    for (T** row : all) *row = scratch, scratch += C;
  }
};

// q = softmax(x factor) and its logarithm.
template <class T>
PYDISTILL_INLINE void distribution(int64_t C, const T* x, T factor, T* log_q, T* q) {
  const T log_sum = softmax(C, factor, x, log_q, q);
  for (int64_t c = 0; c < C; ++c) log_q[c] -= log_sum;
}

template <class T>
PYDISTILL_INLINE T inner(int64_t C, const T* a, const T* b) {
  return sum<T>(C, [&](int64_t c) PYDISTILL_LAMBDA { return a[c] * b[c]; });
}

// The kinds whose loss is -sum t log q, up to a term of the target alone: g and h from t, which is in p.
template <class T>
void weigh(int64_t C, const Row<T>& row, bool along, T s, T* loss) {
  if (loss) *loss = sum<T>(C, [&](int64_t c) PYDISTILL_LAMBDA { return -weighted(row.p[c], row.log_q[c]); });
  for (int64_t c = 0; c < C; ++c) row.g[c] = s * row.q[c] - row.p[c];
  if (!along) return;
  const T mean = inner(C, row.q, row.u);
  for (int64_t c = 0; c < C; ++c) row.h[c] = s * (row.q[c] * (row.u[c] - mean));
}

// The kinds whose gradient in q is a; `moved(c, v)` is a's derivative along v, that of log q.
template <class T, class Moved>
PYDISTILL_INLINE void by_student(int64_t C, const Row<T>& row, bool along, Moved moved) {
  const T mean = sum<T>(C, [&](int64_t c) PYDISTILL_LAMBDA { return weighted(row.q[c], row.a[c]); });
  for (int64_t c = 0; c < C; ++c) row.g[c] = weighted(row.q[c], row.a[c] - mean);
  if (!along) return;
  const T drift = inner(C, row.q, row.u);
  const T mean_t = sum<T>(C, [&](int64_t c) PYDISTILL_LAMBDA {
    const T v = row.u[c] - drift;
    return weighted(row.q[c], v * row.a[c] + moved(c, v));
  });
  for (int64_t c = 0; c < C; ++c) {
    const T v = row.u[c] - drift;
    row.h[c] = weighted(row.q[c], v * (row.a[c] - mean) + moved(c, v) - mean_t);
  }
}

// The row's D, with its gradient in z in g and, along u, the derivative of g in h.
template <class T>
T divergence(const Call& call, int64_t n, const Row<T>& row, int64_t label, bool along) {
  const int64_t C = call.C;
  const Kind kind = call.kind;
  const T cold = T(1 / call.T), nan = T(__builtin_nanf(""));
  T *const p = row.p, *const q = row.q, *const log_p = row.log_p, *const log_q = row.log_q, *const a = row.a;

  if (kind != Kind::ce) load_row(call.target_scalar, call.target, n, C, row.a);
  if (kind == Kind::mse) {
    for (int64_t c = 0; c < C; ++c) row.g[c] = (row.x[c] - a[c]) * cold;
    const T loss = inner(C, row.g, row.g);
    for (int64_t c = 0; c < C; ++c) row.g[c] *= T(2);
    if (along)
      for (int64_t c = 0; c < C; ++c) row.h[c] = T(2) * row.u[c];
    return loss;
  }

  distribution(C, row.x, cold, log_q, q);
  T s = 1;
  if (kind == Kind::ce) {
    const T off = label >= 0 && label < C ? T(0) : nan;
    for (int64_t c = 0; c < C; ++c) p[c] = c == label ? T(1) : off;
  } else if (call.probs) {
    for (int64_t c = 0; c < C; ++c) p[c] = a[c];
    s = sum<T>(C, [&](int64_t c) PYDISTILL_LAMBDA { return p[c]; });
    if (kind != Kind::soft_ce)
      for (int64_t c = 0; c < C; ++c) log_p[c] = log_of(p[c]);
  } else {
    distribution(C, a, cold, log_p, p);
  }

  T loss = 0;
  if (kind == Kind::rkl) {
    for (int64_t c = 0; c < C; ++c) a[c] = log_q[c] - log_p[c];
    loss = sum<T>(C, [&](int64_t c) PYDISTILL_LAMBDA { return weighted(q[c], a[c]); });
    by_student(C, row, along, [](int64_t, T v) PYDISTILL_LAMBDA { return v; });
    return loss;
  }
  if (kind == Kind::jsd) {
    const T beta = T(call.beta), rest = T(1 - call.beta);
    // In units of the larger of p and q, where m is near one: by itself it may underflow.
    for (int64_t c = 0; c < C; ++c) {
      const bool more = p[c] > q[c];
      const T unit = more ? p[c] : q[c], log_unit = more ? log_p[c] : log_q[c];
      const T share = rest * (q[c] / unit), m = beta * (p[c] / unit) + share, log_m = log_of(m);
      log_p[c] = weighted(p[c], (log_p[c] - log_unit) - log_m);
      a[c] = rest * ((log_q[c] - log_unit) - log_m);
      p[c] = share / m;
    }
    loss = beta * sum<T>(C, [&](int64_t c) PYDISTILL_LAMBDA { return log_p[c]; }) +
           sum<T>(C, [&](int64_t c) PYDISTILL_LAMBDA { return weighted(q[c], a[c]); });
    by_student(C, row, along, [&](int64_t c, T v) PYDISTILL_LAMBDA { return rest * v * (T(1) - p[c]); });
    return loss;
  }
  if (kind == Kind::fkl) {
    loss = sum<T>(C, [&](int64_t c) PYDISTILL_LAMBDA { return weighted(p[c], log_p[c] - log_q[c]); });
    weigh<T>(C, row, along, s, nullptr);
    return loss;
  }
  if (kind == Kind::ofa) {
    const bool valid = label >= 0 && label < C;
    if (call.gamma != 1) {
      const T gamma = T(call.gamma), own = valid ? p[label] : T(0);
      for (int64_t c = 0; c < C; ++c) p[c] = exp_lane(gamma * log_p[c]);  // p itself may have underflowed
      if (valid) p[label] = grown(own, gamma);
    }
    if (!valid) p[0] = nan;
    s = sum<T>(C, [&](int64_t c) PYDISTILL_LAMBDA { return p[c]; });
  }
  weigh(C, row, along, s, &loss);
  return loss;
}

template <class T>
void run_row(const Call& call, int64_t n, T* scratch) {
  const int64_t C = call.C;
  const bool along = call.form == Form::backward_jvp, moving = along || call.form == Form::jvp;
  const Row<T> row(scratch, C);
  const int64_t label =
      call.labels.data ? static_cast<const int64_t*>(call.labels.data)[n * call.labels.row] : int64_t{-1};
  const auto given = [&](const Call::Rows& rows)
                         PYDISTILL_LAMBDA { return rows.data ? static_cast<const T*>(rows.data)[n * rows.row] : T(0); };

  load_row(call.scalar, call.student, n, C, row.x);
  if (moving) {
    load_row(call.scalar, call.student_t, n, C, row.x_t);
    for (int64_t c = 0; c < C; ++c) row.u[c] = row.x_t[c] * T(1 / call.T);
  }
  const T scale = T(call.scale), to_student = T(call.scale / call.T);
  T loss = scale * divergence(call, n, row, label, along);
  for (int64_t c = 0; c < C; ++c) row.g[c] *= to_student;
  if (along)
    for (int64_t c = 0; c < C; ++c) row.h[c] *= to_student;

  if (call.ce_weight != 0) {
    const T weight = T(call.ce_weight);
    const bool valid = label >= 0 && label < C;
    if (call.T != 1 || call.kind == Kind::mse) distribution(C, row.x, T(1), row.log_q, row.q);
    loss -= weight * (valid ? row.log_q[label] : T(__builtin_nanf("")));
    for (int64_t c = 0; c < C; ++c) row.g[c] += valid ? weight * row.q[c] : T(__builtin_nanf(""));
    if (valid) row.g[label] -= weight;
    if (along) {
      const T mean = inner(C, row.q, row.x_t);
      for (int64_t c = 0; c < C; ++c) row.h[c] += weight * (row.q[c] * (row.x_t[c] - mean));
    }
  }

  if (moving) loss = inner(C, row.g, row.x_t);
  if (call.loss) static_cast<T*>(call.loss)[n] = loss;
  if (!call.grad_logits) return;
  if (call.form == Form::backward) {
    const T grad = given(call.grad);
    for (int64_t c = 0; c < C; ++c) row.g[c] *= grad;
  }
  if (along) {
    const T grad = given(call.grad), grad_t = given(call.grad_t);
    const bool both = call.grad_t.data != nullptr;
    for (int64_t c = 0; c < C; ++c) row.g[c] = both ? grad * row.h[c] + grad_t * row.g[c] : grad * row.h[c];
  }
  store_row(call.scalar, row.g, n, C, call.grad_logits);
}

}  // namespace

void PYDISTILL_KERNEL(const KdDivergence& call, int64_t begin, int64_t end, void* scratch) {
  with_number(call.scalar, [&](auto t) PYDISTILL_LAMBDA {
    for (int64_t n = begin; n < end; ++n) run_row(call, n, static_cast<decltype(t)*>(scratch));
  });
}

}  // namespace pydistill
