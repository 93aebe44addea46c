// The ConvNet block after the convolution, on CUDA; instance_norm_relu_avg_pool.h says what each form computes.
//
// One block of threads owns a panel: one sample, `lanes` adjacent channels, all H*W positions. Everything a plane needs
// is inside, so each tensor is read from global memory once, kept in shared memory, and written once:
//   1. read the inputs, sum x [and x_t]
//   2. sum the squared deviations of x [and their products with those of x_t]
//   3. backward: sum the shares of grad_weight and grad_bias, from which the means in grad_x follow as well
//   4. write y and grad_x
// A panel too large for shared memory is read again from global memory in every pass (`kept` is false).
//
// With `lanes` = 1 the threads run along W, which suits NCHW. With channels-last they run along C first, and `lanes`
// channels fill one 32-byte sector, the least that global memory moves.
//
// Derivation. With mean m, r = 1/sqrt(var + eps), h = (x - m) r, a = h weight + bias and a_bar = [a > 0] grad_y spread
// over its window:
//   grad_weight = sum a_bar h        grad_bias = sum a_bar
//   grad_x      = r (weight a_bar - mean(weight a_bar) - h mean(weight a_bar h))
// Along a direction, with s = mean(h x_t):
//   h_t = r (x_t - mean(x_t) - h s)     a_t = h_t weight + h weight_t + bias_t     y_t = pool([a > 0] a_t)
// and the product rule on the three lines of the backward, with r_t = -r^2 s, gives what the last pass writes.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <stdexcept>

#include "instance_norm_relu_avg_pool.h"
#include "vocabulary/cuda_vocabulary.h"

namespace pydistill::instance_norm_relu_avg_pool {

using Call = InstanceNormReluAvgPool;
using Form = Call::Form;

// Two blocks of 512 threads on a multiprocessor leave 64 registers per thread. Without the bound ptxas aims for fewer
// and spills; double needs more registers, so one block.
constexpr int max_threads = 512;
template <class T>
constexpr int blocks_at_once = std::is_same_v<T, double> ? 1 : 2;

__host__ __device__ constexpr bool has_tangents(Form form) { return form == Form::jvp || form == Form::backward_jvp; }
__host__ __device__ constexpr bool has_backward(Form form) {
  return form == Form::backward || form == Form::backward_jvp;
}

// How many sums over the panel the widest pass forms at once.
__host__ __device__ constexpr int most_sums(Form form) {
  return form == Form::backward_jvp ? 4 : form == Form::forward ? 1 : 2;
}

template <class T>
__device__ T* element(const Map& map, int64_t n, int64_t c, int64_t h, int64_t w) {
  return static_cast<T*>(map.data) + n * map.n + c * map.c + h * map.h + w * map.w;
}

// The positions of a plane that one thread visits: every `step`-th, row by row. Tracking row and column costs a few
// additions; dividing a running index at every step would cost more than the arithmetic.
struct Walk {
  int height, width, h, w, step_h, step_w;

  __device__ Walk(int height, int width, int first, int step)
      : height(height),
        width(width),
        h(width > 0 ? first / width : height),
        w(width > 0 ? first % width : 0),
        step_h(width > 0 ? step / width : 0),
        step_w(width > 0 ? step % width : 0) {}

  __device__ bool inside() const { return h < height; }
  __device__ void next() {
    h += step_h;
    w += step_w;
    if (w >= width) {
      w -= width;
      ++h;
    }
  }
};

// One input's part of the panel, as a thread sees it: a plane of its channel.
template <class T, bool kept>
struct Plane {
  const T* global = nullptr;
  int64_t stride_h = 0, stride_w = 0;
  T* shared = nullptr;  // [height * width][lanes], from this thread's lane on
  int width = 0, lanes = 0;

  // The first visit of a position. Other threads may read it after the next barrier.
  __device__ Accumulator<T> read(int h, int w) const {
    const T value = global_load(global + h * stride_h + w * stride_w);
    if constexpr (kept) shared[(h * width + w) * lanes] = value;
    return widen(value);
  }

  // Every later visit.
  __device__ Accumulator<T> operator()(int h, int w) const {
    if constexpr (kept) return widen(shared[(h * width + w) * lanes]);
    return widen(global_load(global + h * stride_h + w * stride_w));
  }
};

// Sums over the block's threads, separately for each of its `lanes` channels (a power of two up to 32), in an order
// fixed by the launch. Every thread gets its channel's sums. Also a barrier: earlier writes to shared memory are then
// visible to all.
template <int count, class A>
__device__ void sum_over_block(A (&values)[count], int lanes, A* scratch /* [count][warps][lanes] */) {
  const int warp = threadIdx.x / 32, warps = blockDim.x / 32, thread = threadIdx.x % 32;
  for (int i = 0; i < count; ++i) {
    for (int step = 16; step >= lanes; step /= 2) values[i] += __shfl_xor_sync(0xFFFFFFFF, values[i], step);
    if (thread < lanes) scratch[(i * warps + warp) * lanes + thread] = values[i];
  }
  __syncthreads();
  for (int i = 0; i < count; ++i) {
    values[i] = 0;
    for (int other = 0; other < warps; ++other) values[i] += scratch[(i * warps + other) * lanes + thread % lanes];
  }
  __syncthreads();  // the next sum writes to scratch again
}

template <class T, Form form, bool kept>
__global__ void __launch_bounds__(max_threads, blocks_at_once<T>) kernel(const Call call, const int lanes) {
  using A = Accumulator<T>;
  constexpr bool tangents = has_tangents(form), backward = has_backward(form);
  constexpr int each = tangents ? 2 : 1;  // sums alone, or followed by their tangents

  const int lane = threadIdx.x % lanes, slot = threadIdx.x / lanes, slots = blockDim.x / lanes;
  const unsigned panels = static_cast<unsigned>((call.C + lanes - 1) / lanes);  // of one sample
  const int64_t n = blockIdx.x / panels, c = int64_t{blockIdx.x % panels} * lanes + lane;
  // Past the last channel there is nothing to visit, but every thread must reach the barriers.
  const bool active = c < call.C;

  const int H = static_cast<int>(call.H), W = static_cast<int>(call.W);
  const int halved = call.pool ? 1 : 0, H_y = H >> halved, W_y = W >> halved;
  const A size = static_cast<A>(int64_t{H} * W);
  const Walk over_x(active ? H : 0, W, slot, slots), over_y(active ? H_y : 0, W_y, slot, slots);

  A* const scratch = reinterpret_cast<A*>(dynamic_shared());
  T* room = reinterpret_cast<T*>(scratch + most_sums(form) * (blockDim.x / 32) * lanes);
  const auto plane = [&](const Map& map, int height, int width) -> Plane<T, kept> {
    if (!map.data) return {};
    T* const shared = room + lane;
    room += height * width * lanes;
    return {element<const T>(map, n, c, 0, 0), map.h, map.w, shared, width, lanes};
  };
  const Plane<T, kept> x = plane(call.x, H, W), x_t = plane(call.x_t, H, W);
  const Plane<T, kept> grad_y = plane(call.grad_y, H_y, W_y), grad_y_t = plane(call.grad_y_t, H_y, W_y);
  const bool has_grad_y_t = call.grad_y_t.data != nullptr;

  const auto channel = [&](const void* values) { return active ? static_cast<const A*>(values)[c] : A(0); };
  const A weight = channel(call.weight), bias = channel(call.bias);
  A weight_t = 0, bias_t = 0;
  if constexpr (tangents) weight_t = channel(call.weight_t), bias_t = channel(call.bias_t);

  // Pass 1: sum x [, sum x_t]
  A first[each] = {};
  for (Walk at = over_x; at.inside(); at.next()) {
    first[0] += x.read(at.h, at.w);
    if constexpr (tangents) first[1] += x_t.read(at.h, at.w);
  }
  if constexpr (backward && kept) {
    for (Walk at = over_y; at.inside(); at.next()) {
      grad_y.read(at.h, at.w);
      if (tangents && has_grad_y_t) grad_y_t.read(at.h, at.w);
    }
  }
  sum_over_block(first, lanes, scratch);
  const A mean = first[0] / size, mean_t = tangents ? first[each - 1] / size : 0;

  // Pass 2: sum (x - mean)^2 [, sum (x - mean)(x_t - mean_t)]
  A second[each] = {};
  for (Walk at = over_x; at.inside(); at.next()) {
    const A deviation = x(at.h, at.w) - mean;
    second[0] = std::fma(deviation, deviation, second[0]);
    if constexpr (tangents) second[1] = std::fma(deviation, x_t(at.h, at.w) - mean_t, second[1]);
  }
  sum_over_block(second, lanes, scratch);
  const A r = 1 / std::sqrt(second[0] / size + static_cast<A>(call.eps));
  const A s = tangents ? r * (second[each - 1] / size) : 0;

  // The ReLU must open at exactly the same positions in every form, or a gradient would not be that of its forward. So
  // h and a are written once, in operations that the compiler cannot contract.
  // NaN counts as open: it shows in y, and its gradient passes, as in torch.
  const auto normalized = [&](int h, int w) { return (x(h, w) - mean) * r; };
  const auto affine = [&](A norm) { return std::fma(norm, weight, bias); };
  const auto open = [&](A norm) { return !(call.relu && affine(norm) <= 0); };

  const auto normalized_t = [&](A norm, int h, int w) { return r * (x_t(h, w) - mean_t - norm * s); };
  const auto affine_t = [&](A norm, A norm_t) { return norm_t * weight + norm * weight_t + bias_t; };

  if constexpr (backward) {
    // Gradient of the affine map's output: grad_y spread over its window, zero where the pool dropped a row or column.
    const A share = call.pool ? A(0.25) : A(1);
    const auto spread = [&](const Plane<T, kept>& grad, A norm, const Walk& at) {
      const int h = at.h >> halved, w = at.w >> halved;
      return h < H_y && w < W_y && open(norm) ? grad(h, w) * share : A(0);
    };

    // Pass 3: sum a_bar, sum a_bar h [, both along the direction]
    A third[2 * each] = {};
    for (Walk at = over_x; at.inside(); at.next()) {
      const A norm = normalized(at.h, at.w), a_bar = spread(grad_y, norm, at);
      third[0] += a_bar;
      third[1] = std::fma(a_bar, norm, third[1]);
      if constexpr (tangents) {
        const A norm_t = normalized_t(norm, at.h, at.w), a_bar_t = has_grad_y_t ? spread(grad_y_t, norm, at) : A(0);
        third[2] += a_bar_t;
        third[3] += a_bar_t * norm + a_bar * norm_t;
      }
    }
    sum_over_block(third, lanes, scratch);
    const A* const shares = third + 2 * (each - 1);
    if (slot == 0 && active) {
      global_store(static_cast<A*>(call.grad_weight) + n * call.C + c, shares[1]);
      global_store(static_cast<A*>(call.grad_bias) + n * call.C + c, shares[0]);
    }

    // Pass 4: grad_x. The means of weight a_bar and weight a_bar h are those sums, and so are their tangents.
    const A m1 = weight * third[0] / size, m2 = weight * third[1] / size;
    A m1_t = 0, m2_t = 0;
    if constexpr (tangents) {
      m1_t = (weight_t * third[0] + weight * third[2]) / size;
      m2_t = (weight_t * third[1] + weight * third[3]) / size;
    }
    for (Walk at = over_x; at.inside(); at.next()) {
      const A norm = normalized(at.h, at.w), a_bar = spread(grad_y, norm, at);
      A grad = r * (weight * a_bar - m1 - norm * m2);
      if constexpr (tangents) {
        const A norm_t = normalized_t(norm, at.h, at.w), a_bar_t = has_grad_y_t ? spread(grad_y_t, norm, at) : A(0);
        grad = r * (weight_t * a_bar + weight * a_bar_t - m1_t - norm_t * m2 - norm * m2_t - s * grad);
      }
      global_store(element<T>(call.grad_x, n, c, at.h, at.w), narrow<T>(grad));
    }
  }

  if constexpr (form != Form::backward) {
    const auto activated = [&](int h, int w) {
      const A norm = normalized(h, w);
      if (!open(norm)) return A(0);
      if constexpr (tangents) return affine_t(norm, normalized_t(norm, h, w));
      return affine(norm);
    };
    for (Walk at = over_y; at.inside(); at.next()) {
      const int h = at.h << halved, w = at.w << halved;
      A y = activated(h, w);
      if (call.pool) y = (y + activated(h, w + 1) + activated(h + 1, w) + activated(h + 1, w + 1)) * A(0.25);
      global_store(element<T>(call.y, n, c, at.h, at.w), narrow<T>(y));
    }
  }
}

// A channel per column of threads, and sum_rows samples at a time: enough loads in flight for thousands of samples.
constexpr int sum_columns = 32, sum_rows = 16;

template <class A>
__global__ void __launch_bounds__(sum_columns* sum_rows)
    sum_over_batch_kernel(const A* shares /* [N, C] */, A* sum /* [C] */, int64_t N, int64_t C) {
  double* const partial = reinterpret_cast<double*>(dynamic_shared());  // [sum_rows][sum_columns]
  const int64_t c = int64_t{blockIdx.x} * sum_columns + threadIdx.x;
  double total = 0;
  for (int64_t n = threadIdx.y; n < N && c < C; n += sum_rows) total += global_load(shares + n * C + c);
  partial[threadIdx.y * sum_columns + threadIdx.x] = total;
  __syncthreads();
  if (threadIdx.y == 0 && c < C) {
    for (int row = 1; row < sum_rows; ++row) total += partial[row * sum_columns + threadIdx.x];
    global_store(sum + c, static_cast<A>(total));
  }
}

struct Plan {
  int lanes = 1, threads = 0;
  bool kept = false;
  int64_t blocks = 0, shared_bytes = 0;
};

inline int64_t positions(const Call& call) { return call.H * call.W; }
inline int64_t positions_y(const Call& call) { return call.pool ? (call.H / 2) * (call.W / 2) : positions(call); }

// How many channels a block takes. All forms of one x must agree on it, as it sets the order of the sums and so the
// last bits of mean and r, on which the ReLU depends.
template <class T>
int lanes_of(const Call& call, int64_t shared_limit) {
  if (call.C == 1 || call.x.c != 1) return 1;
  constexpr int sector = 32 / sizeof(T);
  const int64_t plane_bytes = (positions(call) + positions_y(call)) * int64_t{sizeof(T)};  // of x and grad_y
  // Part of a sector is still cheaper than a panel read in every pass: the blocks that need the other parts run at the
  // same time and find them in the L2 cache. Room for tangents also means two blocks of the other forms.
  for (const int64_t planes : {2 * plane_bytes, plane_bytes}) {
    for (int lanes = sector; lanes >= sector / 4; lanes /= 2) {
      if (planes * lanes <= shared_limit * 15 / 16) return lanes;  // the rest is for the sums
    }
  }
  return sector;
}

template <class T>
Plan plan(const Call& call, int64_t shared_limit) {
  Plan plan;
  plan.lanes = lanes_of<T>(call, shared_limit);
  plan.blocks = call.N * ((call.C + plan.lanes - 1) / plan.lanes);

  // About eight elements per thread: enough work to amortise block-wide sums, and loads to hide latency.
  plan.threads =
      static_cast<int>(std::clamp<int64_t>((positions(call) * plan.lanes / 8 + 31) / 32 * 32, 32, max_threads));

  const int64_t panel = (positions(call) * (1 + has_tangents(call.form)) +
                         positions_y(call) * (has_backward(call.form) + (call.grad_y_t.data != nullptr))) *
                        plan.lanes * int64_t{sizeof(T)};
  plan.shared_bytes = most_sums(call.form) * (plan.threads / 32) * plan.lanes * int64_t{sizeof(Accumulator<T>)};
  plan.kept = plan.shared_bytes + panel <= shared_limit;
  if (plan.kept) plan.shared_bytes += panel;
  return plan;
}

template <class T, Form form>
void launch_form(const Call& call, cudaStream_t stream) {
  const Plan p = plan<T>(call, shared_memory_limit());
  if (p.blocks == 0) return;
  if (call.H * call.W > int64_t{1} << 30) throw std::invalid_argument("x: planes of more than 2^30 positions");
  if (p.blocks > 0x7FFFFFFF) throw std::invalid_argument("x: more than 2^31 - 1 planes");
  launch(p.kept ? &kernel<T, form, true> : &kernel<T, form, false>, dim3(static_cast<unsigned>(p.blocks)),
         dim3(static_cast<unsigned>(p.threads)), p.shared_bytes, stream, call, p.lanes);
}

template <class T>
void launch_scalar(const Call& call, cudaStream_t stream) {
  switch (call.form) {
    case Form::forward:
      return launch_form<T, Form::forward>(call, stream);
    case Form::backward:
      return launch_form<T, Form::backward>(call, stream);
    case Form::jvp:
      return launch_form<T, Form::jvp>(call, stream);
    case Form::backward_jvp:
      return launch_form<T, Form::backward_jvp>(call, stream);
  }
}

template <class A>
void launch_sum(const void* shares, void* sum, int64_t N, int64_t C, cudaStream_t stream) {
  launch(&sum_over_batch_kernel<A>, dim3(static_cast<unsigned>((C + sum_columns - 1) / sum_columns)),
         dim3(sum_columns, sum_rows), sum_columns * sum_rows * int64_t{sizeof(double)}, stream,
         static_cast<const A*>(shares), static_cast<A*>(sum), N, C);
}

}  // namespace pydistill::instance_norm_relu_avg_pool

namespace pydistill {

inline void launch_instance_norm_relu_avg_pool(const InstanceNormReluAvgPool& call, cudaStream_t stream) {
  with_scalar(call.scalar,
              [&](auto zero) { instance_norm_relu_avg_pool::launch_scalar<decltype(zero)>(call, stream); });
}

// sum[c] = sum of shares[n, c] over n: the grad_weight or grad_bias of the whole batch.
inline void launch_sum_over_batch(Scalar scalar, const void* shares, void* sum, int64_t N, int64_t C,
                                  cudaStream_t stream) {
  using namespace instance_norm_relu_avg_pool;
  if (C == 0) return;
  scalar == Scalar::f64 ? launch_sum<double>(shares, sum, N, C, stream) : launch_sum<float>(shares, sum, N, C, stream);
}

}  // namespace pydistill
