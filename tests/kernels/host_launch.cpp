// The CUDA launchers on the host machine of cuda_vocabulary.h, as plain C functions for ctypes, and a few kernels with
// known bugs that the machine must see. Each function returns null, or what went wrong as text.
#include "../../csrc/kernels/augment.cuh"
#include "../../csrc/kernels/bn_stat_match.cuh"
#include "../../csrc/kernels/instance_norm_relu_avg_pool.cuh"
#include "../../csrc/kernels/multi_crop.cuh"
#include "../../csrc/kernels/soft_cross_entropy.cuh"
#include "../../csrc/kernels/vocabulary/cuda_vocabulary.h"

namespace {

using namespace pydistill;

std::string error;

template <class Body>
const char* guarded(Body body) {
  try {
    cuda_host::machine().shared_memory_limit = cuda_host::Machine::default_shared_memory_limit;
    body();
    return nullptr;
  } catch (const std::exception& e) {
    error = e.what();
    return error.c_str();
  }
}

int threads() { return static_cast<int>(blockDim.x); }
int me() { return static_cast<int>(threadIdx.x); }
float* shared() { return reinterpret_cast<float*>(dynamic_shared()); }

__global__ void right_kernel(float* out) {  // every thread reads what another wrote before the barrier
  shared()[me()] = static_cast<float>(me());
  __syncthreads();
  out[me()] = shared()[threads() - 1 - me()];
}

__global__ void race_kernel(float* out) {  // the same without the barrier
  shared()[me()] = static_cast<float>(me());
  out[me()] = shared()[threads() - 1 - me()];
}

__global__ void unwritten_kernel(float* out) { out[me()] = shared()[me()]; }

__global__ void out_of_bounds_kernel(float* out) { out[me()] = shared()[me() + 1]; }

__global__ void barrier_for_some_kernel(float* out) {
  if (me() < 16) __syncthreads();
  out[me()] = 1;
}

__global__ void two_barriers_kernel(float* out) {
  if (me() < 16) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  out[me()] = 1;
}

__global__ void shuffle_for_some_kernel(float* out) {
  if (me() != 5) out[me()] = __shfl_xor_sync(0xFFFFFFFF, 1.0f, 1);
}

__global__ void shuffle_outside_mask_kernel(float* out) {
  if (me() < 16) out[me()] = __shfl_xor_sync(0x0000FFFF, 1.0f, 16);
}

__global__ void warp_sum_kernel(float* out) {
  float value = static_cast<float>(me());
  for (int step = 16; step; step /= 2) value += __shfl_xor_sync(0xFFFFFFFF, value, step);
  out[me()] = value;
}

__global__ void shift_kernel(float* out) {  // half warps apart: each shuffles among its own lanes
  const uint32_t mask = me() % 32 < 16 ? 0x0000FFFF : 0xFFFF0000;
  const int last = me() % 16 == 15;
  out[me()] = __shfl_down_sync(mask, static_cast<float>(me()), last ? 0 : 1);
  __syncwarp();
}

__global__ void throw_kernel(float*) {
  const std::string unwound = "longer than what a string keeps inside itself, so that a leak would be seen";
  if (me() == 7) throw std::runtime_error("thread 7 of " + std::to_string(threads()) + " threw");
  __syncthreads();
}

__global__ void order_kernel(float* out) {  // the turn that each thread of each block had
  float& turns = out[gridDim.x * blockDim.x];
  out[blockIdx.x * blockDim.x + threadIdx.x] = turns++;
}

constexpr std::pair<const char*, void (*)(float*)> kernels[] = {
    {"right", right_kernel},
    {"race", race_kernel},
    {"unwritten", unwritten_kernel},
    {"out_of_bounds", out_of_bounds_kernel},
    {"barrier_for_some", barrier_for_some_kernel},
    {"two_barriers", two_barriers_kernel},
    {"shuffle_for_some", shuffle_for_some_kernel},
    {"shuffle_outside_mask", shuffle_outside_mask_kernel},
    {"warp_sum", warp_sum_kernel},
    {"shift", shift_kernel},
    {"throw", throw_kernel},
    {"order", order_kernel},
};

struct Launch {  // what a test asks of the machine, and what it hears back
  uint64_t seed;
  int64_t shared_limit;
  int64_t lanes, threads, blocks, shared_bytes, kept;  // the launch plan
  int64_t bytes_loaded, bytes_stored;
};

void run(const InstanceNormReluAvgPool& call, Launch& launch) {
  using namespace instance_norm_relu_avg_pool;
  const Plan p = call.scalar == Scalar::f64   ? plan<double>(call, launch.shared_limit)
                 : call.scalar == Scalar::f32 ? plan<float>(call, launch.shared_limit)
                                              : plan<__half>(call, launch.shared_limit);
  launch.lanes = p.lanes, launch.threads = p.threads, launch.blocks = p.blocks;
  launch.shared_bytes = p.shared_bytes, launch.kept = p.kept;

  cuda_host::Machine& machine = cuda_host::machine();
  machine.seed(launch.seed);
  machine.shared_memory_limit = launch.shared_limit;
  machine.bytes_loaded = machine.bytes_stored = 0;
  launch_instance_norm_relu_avg_pool(call, nullptr);
  launch.bytes_loaded = machine.bytes_loaded;
  launch.bytes_stored = machine.bytes_stored;
}

}  // namespace

extern "C" {

// The tests mirror these structs and compare their sizes before the first call.
int64_t size_of_call() { return sizeof(InstanceNormReluAvgPool); }
int64_t size_of_soft_cross_entropy() { return sizeof(SoftCrossEntropy); }
int64_t size_of_bn_stat_match() { return sizeof(BnStatMatch); }
int64_t size_of_augment() { return sizeof(Augment); }
int64_t size_of_multi_crop() { return sizeof(MultiCrop); }
int64_t size_of_launch() { return sizeof(Launch); }

const char* run_small_kernel(const char* name, uint64_t seed, unsigned grid, unsigned block, int64_t shared_bytes,
                             float* out) {
  return guarded([&] {
    for (const auto& [known, kernel] : kernels) {
      if (std::strcmp(known, name)) continue;
      cuda_host::machine().seed(seed);
      return launch(kernel, dim3(grid), dim3(block), shared_bytes, nullptr, out);
    }
    throw std::invalid_argument("no such kernel");
  });
}

const char* run_instance_norm_relu_avg_pool(const InstanceNormReluAvgPool* call, Launch* launch) {
  return guarded([&] { run(*call, *launch); });
}

// The same on tensors of its own, each a heap block of its exact size: for sanitizers and for counting bytes.
const char* exercise_instance_norm_relu_avg_pool(int form, int scalar, const int64_t* shape, bool relu, bool pool,
                                                 bool channels_last, Launch* launch) {
  return guarded([&] {
    InstanceNormReluAvgPool call;
    call.form = static_cast<InstanceNormReluAvgPool::Form>(form);
    call.scalar = static_cast<Scalar>(scalar);
    call.N = shape[0], call.C = shape[1], call.H = shape[2], call.W = shape[3];
    call.eps = 1e-5, call.relu = relu, call.pool = pool;
    const bool f64 = call.scalar == Scalar::f64;
    const int64_t element = f64 ? 8 : call.scalar == Scalar::f32 ? 4 : 2, parameter = f64 ? 8 : 4;

    std::vector<std::vector<unsigned char>> memory;
    const auto zeros = [&](int64_t bytes) -> void* {
      return memory.emplace_back(static_cast<size_t>(bytes)).data();  // a vector keeps its block when it moves
    };
    const auto image = [&](int64_t H, int64_t W) -> Map {
      void* const data = zeros(call.N * call.C * H * W * element);
      if (channels_last) return {data, call.C * H * W, 1, W * call.C, call.C};
      return {data, call.C * H * W, H * W, W, 1};
    };
    const int64_t H_y = pool ? call.H / 2 : call.H, W_y = pool ? call.W / 2 : call.W;
    call.x = image(call.H, call.W), call.x_t = image(call.H, call.W), call.grad_x = image(call.H, call.W);
    call.y = image(H_y, W_y), call.grad_y = image(H_y, W_y), call.grad_y_t = image(H_y, W_y);
    call.weight = zeros(call.C * parameter), call.bias = zeros(call.C * parameter);
    call.weight_t = zeros(call.C * parameter), call.bias_t = zeros(call.C * parameter);
    call.grad_weight = zeros(call.N * call.C * parameter), call.grad_bias = zeros(call.N * call.C * parameter);
    if (!instance_norm_relu_avg_pool::has_tangents(call.form)) call.x_t = {};
    if (!instance_norm_relu_avg_pool::has_backward(call.form)) call.grad_y = call.grad_y_t = {};
    if (call.form == InstanceNormReluAvgPool::Form::backward) call.grad_y_t = {};
    run(call, *launch);
  });
}

const char* run_sum_over_batch(int scalar, const void* shares, void* sum, int64_t N, int64_t C, uint64_t seed) {
  return guarded([&] {
    cuda_host::machine().seed(seed);
    launch_sum_over_batch(static_cast<Scalar>(scalar), shares, sum, N, C, nullptr);
  });
}

const char* run_soft_cross_entropy(const SoftCrossEntropy* call, uint64_t seed) {
  return guarded([&] {
    cuda_host::machine().seed(seed);
    launch_soft_cross_entropy(*call, nullptr);
  });
}

// As exercise_instance_norm_relu_avg_pool: on heap blocks of their exact sizes.
const char* exercise_soft_cross_entropy(int form, int scalar, int kind, int64_t N, int64_t K) {
  return guarded([&] {
    SoftCrossEntropy call;
    call.form = static_cast<SoftCrossEntropy::Form>(form);
    call.scalar = static_cast<Scalar>(scalar);
    call.kind = static_cast<SoftCrossEntropy::Kind>(kind);
    call.N = N, call.K = K;
    const bool hard = call.kind == SoftCrossEntropy::Kind::hard, f64 = call.scalar == Scalar::f64;
    const int64_t element = f64 ? 8 : call.scalar == Scalar::f32 ? 4 : 2, compute = f64 ? 8 : 4;

    std::vector<std::vector<unsigned char>> memory;
    const auto zeros = [&](int64_t bytes) -> void* {
      return memory.emplace_back(static_cast<size_t>(bytes)).data();  // a vector keeps its block when it moves
    };
    call.logits = {zeros(N * K * element), K, 1};
    call.logits_t = {zeros(N * K * element), K, 1};
    if (hard) {
      call.labels = {zeros(N * 8), 1, 0};
    } else {
      call.labels = {zeros(N * K * element), K, 1};
      call.labels_t = {zeros(N * K * element), K, 1};
      call.grad_labels = zeros(N * K * element);
    }
    call.grad = {zeros(N * compute), 1, 0};
    call.grad_t = {zeros(N * compute), 1, 0};
    call.loss = zeros(N * compute);
    call.grad_logits = zeros(N * K * element);
    launch_soft_cross_entropy(call, nullptr);
  });
}

const char* run_augment(const Augment* call, uint64_t seed) {
  return guarded([&] {
    cuda_host::machine().seed(seed);
    launch_augment(*call, nullptr);
  });
}

// As exercise_instance_norm_relu_avg_pool: on heap blocks of their exact sizes.
const char* exercise_augment(int form, int scalar, const int64_t* shape, bool flip_batch, const float* parameters) {
  return guarded([&] {
    Augment call;
    call.form = static_cast<Augment::Form>(form);
    call.scalar = static_cast<Scalar>(scalar);
    call.N = shape[0], call.C = shape[1], call.H = shape[2], call.W = shape[3];
    call.copies = flip_batch ? 2 : 1;
    const int64_t element = call.scalar == Scalar::f64 ? 8 : call.scalar == Scalar::f32 ? 4 : 2;
    const int64_t plane = call.H * call.W, rows = call.copies * call.N;
    const bool forward = call.form == Augment::Form::forward;

    const std::vector<float> record = [&] {
      std::vector<float> all;
      for (int64_t n = 0; n < rows; ++n) all.insert(all.end(), parameters, parameters + Augment::columns);
      return all;
    }();
    call.record = record.data(), call.record_row = Augment::columns, call.record_column = 1;
    std::vector<unsigned char> images(static_cast<size_t>(call.N * call.C * plane * element));
    std::vector<unsigned char> results(static_cast<size_t>(rows * call.C * plane * element));
    call.from = {(forward ? images : results).data(), call.C * plane, plane, call.W, 1};
    call.to = {(forward ? results : images).data(), call.C * plane, plane, call.W, 1};
    launch_augment(call, nullptr);
  });
}

const char* run_multi_crop(const MultiCrop* call, uint64_t seed) {
  return guarded([&] {
    cuda_host::machine().seed(seed);
    launch_multi_crop(*call, nullptr);
  });
}

// As exercise_instance_norm_relu_avg_pool: on heap blocks of their exact sizes. `shape` is N, C, H, W and the results'
// B, height and width; every row of the record has the same two parts.
const char* exercise_multi_crop(int form, int scalar, const int64_t* shape, bool shared, const float* parameters) {
  return guarded([&] {
    MultiCrop call;
    call.form = static_cast<MultiCrop::Form>(form);
    call.scalar = static_cast<Scalar>(scalar);
    call.N = shape[0], call.C = shape[1], call.H = shape[2], call.W = shape[3];
    call.B = shape[4], call.height_out = shape[5], call.width_out = shape[6];
    call.parts = 2, call.shared = shared;
    const int64_t element = call.scalar == Scalar::f64 ? 8 : call.scalar == Scalar::f32 ? 4 : 2;
    const int64_t in = call.H * call.W, out = call.height_out * call.width_out;
    const bool forward = call.form == MultiCrop::Form::forward;

    std::vector<float> record;
    const int64_t row = call.parts * MultiCrop::columns;
    for (int64_t b = 0; b < call.B; ++b) record.insert(record.end(), parameters, parameters + row);
    call.record = record.data(), call.record_row = row, call.record_part = MultiCrop::columns, call.record_column = 1;
    const std::vector<double> norm(static_cast<size_t>(2 * call.C), 0.5);
    call.norm = norm.data();
    std::vector<unsigned char> images(static_cast<size_t>((shared ? 1 : call.N) * call.C * in * element));
    std::vector<unsigned char> base(static_cast<size_t>(call.C * in * element));
    std::vector<unsigned char> results(static_cast<size_t>(call.B * call.C * out * element));
    const Map outer = {images.data(), call.C * in, in, call.W, 1};
    const Map inner = {results.data(), call.C * out, out, call.width_out, 1};
    call.from = forward ? outer : inner, call.to = forward ? inner : outer;
    if (forward) call.base = {base.data(), 0, in, call.W, 1};
    launch_multi_crop(call, nullptr);
  });
}

const char* run_bn_stat_match(const BnStatMatch* call, uint64_t seed) {
  return guarded([&] {
    cuda_host::machine().seed(seed);
    launch_bn_stat_match(*call, nullptr);
  });
}

}  // extern "C"
