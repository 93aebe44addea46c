// The BatchNorm statistics with the frozen BatchNorm on CUDA; bn_stat_match.h says what each pass computes.
//
// tiles: a block takes a tile of positions and 32 channels if channels are adjacent in memory (a warp reads 32 of them,
// its row of threads every 8th position), otherwise a tile of one channel (all threads along the positions). Both sum
// in an order that depends only on the shape, first a thread's own elements and then the block's threads in a tree.
// merge: a warp per channel. backward: elements in memory order.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <type_traits>

#include "bn_stat_match.h"
#include "vocabulary/cuda_vocabulary.h"

namespace pydistill::bn_stat_match {

using Call = BnStatMatch;
using Planes = Call::Planes;

constexpr int threads = 256, warp = 32, rows = threads / warp;

inline bool channels_are_neighbours(const Call& call) { return call.x.c == 1 && call.C > 1; }

// Enough elements for a block to be worth starting, and enough blocks for the device.
inline int64_t tile(const Call& call) { return channels_are_neighbours(call) ? 256 : 4096; }

__device__ inline int64_t tiles_of_sample(const Call& call) { return (call.P + call.tile - 1) / call.tile; }

template <class T>
__device__ T* at(const Planes& planes, int64_t n, int64_t c, int64_t p) {
  return static_cast<T*>(planes.data) + n * planes.n + c * planes.c + p * planes.p;
}

template <class T, class A>
struct Norm {  // the frozen BatchNorm of a channel
  A scale, shift;

  __device__ Norm(const Call& call, int64_t c)
      : scale(call.scale ? global_load(static_cast<const A*>(call.scale) + c) : A(0)),
        shift(call.scale ? global_load(static_cast<const A*>(call.shift) + c) : A(0)) {}

  // Not fused: the backward must find the ReLU open where the forward did, whatever the surrounding code.
  __device__ A operator()(const Call& call, int64_t n, int64_t c, int64_t p, A x) const {
    A y = separately_rounded_sum(x * scale, shift);
    if (call.residual.data) y += widen(global_load(at<T>(call.residual, n, c, p)));
    return y;
  }

 private:
  __device__ static A separately_rounded_sum(A product, A shift) {
#ifdef __CUDACC__
    if constexpr (std::is_same_v<A, float>)
      return __fadd_rn(product, shift);
    else
      return __dadd_rn(product, shift);
#else
    return product + shift;
#endif
  }
};

template <class T>
__global__ void __launch_bounds__(threads) tiles_kernel(const Call call, const bool by_rows) {
  using A = Accumulator<T>;
  A* const shared = reinterpret_cast<A*>(dynamic_shared());  // [2][threads]
  const int me = static_cast<int>(threadIdx.x);
  const int64_t of_sample = tiles_of_sample(call), t = blockIdx.x, n = t / of_sample;
  const int64_t begin = t % of_sample * call.tile, end = begin + call.tile < call.P ? begin + call.tile : call.P;
  const int64_t c = by_rows ? int64_t{blockIdx.y} * warp + me % warp : int64_t{blockIdx.y};
  const bool active = c < call.C;

  A first = 0, sum = 0, squares = 0;
  if (active) {
    const Norm<T, A> norm(call, c);
    first = widen(global_load(at<T>(call.x, n, c, begin)));
    for (int64_t p = begin + (by_rows ? me / warp : me); p < end; p += by_rows ? rows : threads) {
      const A x = widen(global_load(at<T>(call.x, n, c, p))), d = x - first;
      sum += d;
      squares += d * d;
      if (call.y.data) {
        const A y = norm(call, n, c, p, x);
        global_store(at<T>(call.y, n, c, p), narrow<T>(call.relu && y <= 0 ? A(0) : y));
      }
    }
  }
  shared[me] = sum;
  shared[threads + me] = squares;
  __syncthreads();
  for (int half = threads / 2; half >= (by_rows ? warp : 1); half /= 2) {
    if (me < half) {
      shared[me] += shared[me + half];
      shared[threads + me] += shared[threads + me + half];
    }
    __syncthreads();
  }
  if (active && me < (by_rows ? warp : 1)) {
    A* const partial = static_cast<A*>(call.partial) + t * 3 * call.C + c;
    global_store(partial, first);
    global_store(partial + call.C, shared[me]);
    global_store(partial + 2 * call.C, shared[threads + me]);
  }
}

__device__ inline double sum_over_warp(double value) {
  for (int step = warp / 2; step; step /= 2) value += __shfl_xor_sync(0xFFFFFFFF, value, step);
  return value;
}

template <class A>
__global__ void __launch_bounds__(threads, std::is_same_v<A, double> ? 2 : 4) merge_kernel(const Call call) {
  const int64_t c = int64_t{blockIdx.x} * rows + threadIdx.x / warp;
  if (c >= call.C) return;  // a whole warp: no shuffle waits for it
  const int lane = threadIdx.x % warp;
  const int64_t of_sample = tiles_of_sample(call);
  const double last = static_cast<double>(call.P - (of_sample - 1) * call.tile);
  const double full = static_cast<double>(call.tile), inverse_of_full = 1 / full, inverse_of_last = 1 / last;
  const double count = static_cast<double>(call.M);
  // A sample's tiles are spread over the lanes: dividing by the number of a sample's tiles takes registers.
  const auto each_tile = [&](auto body) {
    for (int64_t n = 0; n < call.N; ++n)
#ifdef __CUDACC__
#pragma unroll 1
#endif
      for (int64_t t = lane; t < of_sample; t += warp) {
        const A* const at = static_cast<const A*>(call.partial) + (n * of_sample + t) * 3 * call.C + c;
        body(t == of_sample - 1 ? last : full, t == of_sample - 1 ? inverse_of_last : inverse_of_full, at);
      }
  };
  double total = 0;
  each_tile([&](double size, double, const A* at) {
    total += size * static_cast<double>(global_load(at)) + static_cast<double>(global_load(at + call.C));
  });
  const double mean = sum_over_warp(total) / count;
  double squares = 0;
  each_tile([&](double size, double inverse, const A* at) {
    const double sum = static_cast<double>(global_load(at + call.C)), own = sum * inverse;
    const double apart = static_cast<double>(global_load(at)) + own - mean;
    squares += (static_cast<double>(global_load(at + 2 * call.C)) - sum * own) + size * apart * apart;
  });
  const double var = sum_over_warp(squares) / count;
  if (lane == 0) {
    global_store(static_cast<A*>(call.statistics) + c, static_cast<A>(mean));
    global_store(static_cast<A*>(call.statistics) + call.C + c, static_cast<A>(var < 0 ? 0 : var));
    global_store(static_cast<A*>(call.kept_mean) + c, static_cast<A>(mean));
  }
}

template <class T>
__global__ void __launch_bounds__(threads) backward_kernel(const Call call, const bool by_rows) {
  using A = Accumulator<T>;
  const int64_t element = int64_t{blockIdx.x} * threads + threadIdx.x;
  if (element >= call.N * call.C * call.P) return;
  const int64_t inner = by_rows ? call.C : call.P, outer = by_rows ? call.P : call.C;
  const int64_t i = element % inner, j = element / inner % outer, n = element / inner / outer;
  const int64_t c = by_rows ? i : j, p = by_rows ? j : i;

  const A count = static_cast<A>(call.M), x = widen(global_load(at<T>(call.x, n, c, p)));
  const A* const grads = static_cast<const A*>(call.grad_statistics);
  A grad = global_load(grads + c) / count +
           2 * global_load(grads + call.C + c) / count * (x - global_load(static_cast<const A*>(call.mean) + c));
  if (call.grad_y.data) {
    const Norm<T, A> norm(call, c);
    A g = widen(global_load(at<T>(call.grad_y, n, c, p)));
    if (call.relu && norm(call, n, c, p, x) <= 0) g = 0;
    if (call.residual.data) global_store(at<T>(call.grad_residual, n, c, p), narrow<T>(g));
    grad += norm.scale * g;
  }
  global_store(at<T>(call.grad_x, n, c, p), narrow<T>(grad));
}

inline unsigned blocks(int64_t count, int64_t most, const char* what) {
  if (count > most) throw std::invalid_argument(std::string("x: too many ") + what + " for one launch");
  return static_cast<unsigned>(count);
}

template <class T>
void launch_scalar(const Call& call, cudaStream_t stream) {
  using A = Accumulator<T>;
  const bool by_rows = channels_are_neighbours(call);
  if (call.pass == Call::Pass::tiles) {
    const dim3 grid(blocks(call.tiles(), 0x7FFFFFFF, "positions"),
                    blocks(by_rows ? (call.C + warp - 1) / warp : call.C, 65535, "channels"));
    launch(&tiles_kernel<T>, grid, dim3(threads), 2 * threads * int64_t{sizeof(A)}, stream, call, by_rows);
  } else if (call.pass == Call::Pass::merge) {
    launch(&merge_kernel<A>, dim3(blocks((call.C + rows - 1) / rows, 0x7FFFFFFF, "channels")), dim3(threads), 0, stream,
           call);
  } else {
    const int64_t count = (call.N * call.C * call.P + threads - 1) / threads;
    launch(&backward_kernel<T>, dim3(blocks(count, 0x7FFFFFFF, "elements")), dim3(threads), 0, stream, call, by_rows);
  }
}

}  // namespace pydistill::bn_stat_match

namespace pydistill {

inline void launch_bn_stat_match(const BnStatMatch& call, cudaStream_t stream) {
  with_scalar(call.scalar, [&](auto zero) { bn_stat_match::launch_scalar<decltype(zero)>(call, stream); });
}

}  // namespace pydistill
