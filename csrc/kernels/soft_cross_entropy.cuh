// The soft-label cross entropy on CUDA; soft_cross_entropy.h says what each form computes.
//
// One warp owns a row: its lanes traverse the classes with a stride of 32 and sum by shuffles, so there is no shared
// memory, no barrier, and the order of additions depends only on K. A row is read once per pass; after the first pass
// it comes from the caches.
#pragma once

#include <cmath>
#include <cstdint>
#include <stdexcept>
#include <type_traits>

#include "soft_cross_entropy.h"
#include "vocabulary/cuda_vocabulary.h"

namespace pydistill::soft_cross_entropy {

using Call = SoftCrossEntropy;
using Form = Call::Form;
using Kind = Call::Kind;

constexpr int rows_per_block = 4;

// 80 registers per thread (128 for double). Without the bound ptxas aims for fewer and spills.
template <class T>
constexpr int blocks_at_once = std::is_same_v<T, double> ? 4 : 6;

// Every lane gets the total, with the same bits: at each step both partners add the same two numbers.
template <class A>
__device__ A sum_over_warp(A value) {
  for (int step = 16; step; step /= 2) value += __shfl_xor_sync(0xFFFFFFFF, value, step);
  return value;
}

template <class A>
__device__ A max_over_warp(A value) {
  for (int step = 16; step; step /= 2) {
    const A other = __shfl_xor_sync(0xFFFFFFFF, value, step);
    value = other > value ? other : value;
  }
  return value;
}

template <class T, Form form>
__global__ void __launch_bounds__(32 * rows_per_block, blocks_at_once<T>) kernel(const Call call) {
  using A = Accumulator<T>;
  constexpr bool tangents = form == Form::jvp || form == Form::backward_jvp;
  constexpr bool backward = form == Form::backward || form == Form::backward_jvp;

  const int64_t n = int64_t{blockIdx.x} * rows_per_block + threadIdx.x / 32, K = call.K;
  if (n >= call.N) return;  // a whole warp: no shuffle waits for it
  const int lane = threadIdx.x % 32;
  const bool hard = call.kind == Kind::hard, probs = call.kind == Kind::probs;
  const int64_t label = hard ? global_load(static_cast<const int64_t*>(call.labels.data) + n * call.labels.row) : 0;

  const auto load = [&](const Call::Rows& rows, int64_t k) {
    return widen(global_load(static_cast<const T*>(rows.data) + n * rows.row + k * rows.column));
  };

  // NaN is ignored here and shows in the sums.
  A max = -A(INFINITY), max_labels = max;
  for (int64_t k = lane; k < K; k += 32) {
    const A l = load(call.logits, k);
    max = l > max ? l : max;
    if (!hard && !probs) {
      const A q = load(call.labels, k);
      max_labels = q > max_labels ? q : max_labels;
    }
  }
  max = max_over_warp(max), max_labels = max_over_warp(max_labels);

  A total = 0, total_labels = 0;  // of exp(logits - max); of exp(labels - max), or of probs
  for (int64_t k = lane; k < K; k += 32) {
    total += std::exp(load(call.logits, k) - max);
    if (probs) total_labels += load(call.labels, k);
    if (!hard && !probs) total_labels += std::exp(load(call.labels, k) - max_labels);
  }
  total = sum_over_warp(total), total_labels = sum_over_warp(total_labels);
  const A log_total = std::log(total), s = probs ? total_labels : A(1);

  const A off = label >= 0 && label < K ? A(0) : A(NAN);
  const auto target = [&](int64_t k) -> A {
    if (hard) return k == label ? A(1) : off;
    const A q = load(call.labels, k);
    return probs ? q : std::exp(q - max_labels) / total_labels;
  };
  // A class with zero probability on both sides takes no part: its u counts as a constant 0.
  const auto out = [](A l, A t) { return t == 0 && l == -A(INFINITY); };
  const auto surprise = [&](A l, A t) { return out(l, t) ? A(0) : log_total - l; };
  const auto weighted = [](A weight, A x) { return weight == 0 ? A(0) : weight * x; };

  // loss, <P, logits_t>, and <t, labels_t> or for probs sum labels_t
  A loss = 0, a = 0, b = 0;
  for (int64_t k = lane; k < K; k += 32) {
    const A l = load(call.logits, k) - max, t = target(k);
    loss += weighted(t, surprise(l, t));
    if constexpr (tangents) {
      a += std::exp(l) / total * load(call.logits_t, k);
      if (!hard && !out(l, t)) b += (probs ? A(1) : t) * load(call.labels_t, k);
    }
  }
  loss = sum_over_warp(loss);
  const auto target_t = [&](A l, A t, int64_t k) -> A {
    if (hard || out(l, t)) return 0;
    return probs ? load(call.labels_t, k) : t * (load(call.labels_t, k) - b);
  };

  A loss_t = 0;
  if constexpr (tangents) {
    a = sum_over_warp(a), b = sum_over_warp(b);
    for (int64_t k = lane; k < K; k += 32) {
      const A l = load(call.logits, k) - max, t = target(k);
      loss_t += weighted(target_t(l, t, k), surprise(l, t)) + weighted(t, a - load(call.logits_t, k));
    }
    loss_t = sum_over_warp(loss_t);
  }
  if constexpr (form != Form::backward) {
    if (lane == 0) global_store(static_cast<A*>(call.loss) + n, tangents ? loss_t : loss);
  }

  if constexpr (backward) {
    const auto incoming = [&](const Call::Rows& rows) {
      return rows.data ? global_load(static_cast<const A*>(rows.data) + n * rows.row) : A(0);
    };
    const A g = incoming(call.grad), g_t = tangents ? incoming(call.grad_t) : A(0);
    const bool moving = call.grad_t.data != nullptr;  // zero times an infinite u would be NaN
    for (int64_t k = lane; k < K; k += 32) {
      const A l = load(call.logits, k) - max, p = std::exp(l) / total, t = target(k), u = surprise(l, t);
      const A first_logits = s * p - t, first_labels = probs ? u : t * (u - loss);
      A to_logits = g * first_logits, to_labels = g * first_labels;
      if constexpr (tangents) {
        const A u_t = out(l, t) ? A(0) : a - load(call.logits_t, k), t_t = target_t(l, t, k), s_t = probs ? b : A(0);
        to_logits = g * (s_t * p - s * (p * u_t) - t_t);
        to_labels = g * (probs ? u_t : t_t * (u - loss) + t * (u_t - loss_t));
        if (moving) to_logits += g_t * first_logits, to_labels += g_t * first_labels;
      }
      global_store(static_cast<T*>(call.grad_logits) + n * K + k, narrow<T>(to_logits));
      if (!hard) global_store(static_cast<T*>(call.grad_labels) + n * K + k, narrow<T>(to_labels));
    }
  }
}

template <class T>
void launch_scalar(const Call& call, cudaStream_t stream) {
  if (call.N == 0) return;
  const int64_t blocks = (call.N + rows_per_block - 1) / rows_per_block;
  if (blocks > 0x7FFFFFFF) throw std::invalid_argument("logits: more than 2^33 rows");
  const auto run = [&](void (*kernel)(Call)) {
    launch(kernel, dim3(static_cast<unsigned>(blocks)), dim3(32 * rows_per_block), 0, stream, call);
  };
  switch (call.form) {
    case Form::forward:
      return run(&kernel<T, Form::forward>);
    case Form::backward:
      return run(&kernel<T, Form::backward>);
    case Form::jvp:
      return run(&kernel<T, Form::jvp>);
    case Form::backward_jvp:
      return run(&kernel<T, Form::backward_jvp>);
  }
}

}  // namespace pydistill::soft_cross_entropy

namespace pydistill {

inline void launch_soft_cross_entropy(const SoftCrossEntropy& call, cudaStream_t stream) {
  with_scalar(call.scalar, [&](auto zero) { soft_cross_entropy::launch_scalar<decltype(zero)>(call, stream); });
}

}  // namespace pydistill
