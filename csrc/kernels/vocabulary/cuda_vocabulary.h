// The vocabulary of kernels/*.cuh, so that one source runs in two places.
//
// Under nvcc it is the device's own, plus launch(), dynamic_shared() and the element types' conversions.
// Under a host compiler it is emulated by a machine in this file: one fiber per thread, blocks and threads in a random
// order that is reproducible by a seed. It makes the usual kernel bugs visible without a GPU:
//   - shared memory that is read before it is written: every block starts with all bytes 0xFF, a NaN in every
//     floating-point type;
//   - barriers and shuffles that not every thread reaches: a Fault that names the block, the threads and the lines;
//   - a missing barrier: two seeds give two results;
//   - shared memory out of bounds: the heap block has the launch's exact size, so AddressSanitizer sees it.
// It does not model caches, timing, memory ordering between blocks, or warps in lockstep.
//
// Static __shared__ arrays are left out on purpose: a host compiler cannot poison or bound them.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

#ifdef __CUDACC__

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace pydistill {

inline void check_cuda(cudaError_t status, const char* what) {
  if (status != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

// The most dynamic shared memory that a block may ask for on the current device.
inline int64_t shared_memory_limit() {
  int device = 0, bytes = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  check_cuda(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "shared memory limit");
  return bytes;
}

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, int64_t shared_bytes, cudaStream_t stream,
            const Arguments&... arguments) {
  // Without opting in, a launch that asks for more than 48 KB fails.
  if (shared_bytes > 48 * 1024) {
    check_cuda(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    static_cast<int>(shared_bytes)),
               "cudaFuncSetAttribute");
  }
  kernel<<<grid, block, static_cast<size_t>(shared_bytes), stream>>>(arguments...);
  check_cuda(cudaGetLastError(), "kernel launch");
}

__device__ __forceinline__ unsigned char* dynamic_shared() {
  extern __shared__ __align__(16) unsigned char bytes[];
  return bytes;
}

// Global memory is read and written through these two: the load promises that no launch writes what it reads, which
// lets the compiler move it ahead of stores, and the host machine counts the bytes.
template <class T>
__device__ __forceinline__ T global_load(const T* address) {
  return __ldg(address);
}

template <class T>
__device__ __forceinline__ void global_store(T* address, T value) {
  *address = value;
}

}  // namespace pydistill

#else

#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <exception>
#include <functional>
#include <memory>
#include <random>
#include <source_location>
#include <utility>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

using cudaStream_t = void*;

// Storage only, as kernels must treat them on the device too: arithmetic is done in float.
struct __half {
  uint16_t bits;
};
struct __nv_bfloat16 {
  uint16_t bits;
};

inline float __half2float(__half value) { return static_cast<float>(std::bit_cast<_Float16>(value.bits)); }
inline __half __float2half(float value) { return {std::bit_cast<uint16_t>(static_cast<_Float16>(value))}; }
inline float __bfloat162float(__nv_bfloat16 value) { return std::bit_cast<float>(uint32_t{value.bits} << 16); }
inline __nv_bfloat16 __float2bfloat16(float value) {
  if (std::isnan(value)) return {0x7FFF};
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  return {static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16)};  // to nearest, ties to even
}

// Set by the machine whenever it switches to another thread.
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace pydistill::cuda_host {

// What a GPU would answer with a hang, an error or silence.
struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

class Machine {
 public:
  static constexpr int64_t default_shared_memory_limit = 99 * 1024;  // the least among current architectures
  int64_t shared_memory_limit = default_shared_memory_limit;         // tests lower it to reach other launch plans
  int64_t bytes_loaded = 0, bytes_stored = 0;                        // by global_load and global_store
  unsigned char* dynamic_shared() { return shared_.get(); }

  void seed(uint64_t value) { random_.seed(value); }

  void run(dim3 grid, dim3 block, int64_t shared_bytes, const std::function<void()>& body);

  void wait_for_block(std::source_location at) { wait({State::in_block, "__syncthreads", at, 0, 0, 0}); }

  // Waits for the lanes of `mask`, then returns what `source` brought along.
  uint64_t wait_for_warp(const char* call, std::source_location at, uint32_t mask, uint64_t value, int source) {
    return wait({State::in_warp, call, at, mask, value, source});
  }

  int lane() const { return static_cast<int>(running_ - threads_.data()) % 32; }

 private:
  enum class State { ready, in_block, in_warp, finished };

  struct Pause {
    State state = State::ready;
    const char* call = nullptr;
    std::source_location at;
    uint32_t mask = 0;   // shuffles: which lanes take part,
    uint64_t value = 0;  // what this lane gives, and after the shuffle what it takes,
    int source = 0;      // and from which lane
    bool same_as(const Pause& other) const {
      return state == other.state && mask == other.mask && at.line() == other.at.line() &&
             at.column() == other.at.column() && !std::strcmp(at.file_name(), other.at.file_name());
    }
  };

  // A place to run: the caller's own stack, or a fiber's. Its stack ends in a page that cannot be touched, so that a
  // kernel with too large local arrays crashes instead of writing into its neighbour.
  struct Context {
    static constexpr size_t stack_bytes = 128 * 1024;
    ucontext_t place{};
    std::shared_ptr<void> stack;
    const void* bottom = nullptr;  // what AddressSanitizer must know before a switch
    size_t size = 0;
    void* fake_stack = nullptr;
  };

  struct Thread {
    Context context;
    dim3 index;
    Pause pause;
  };

  struct Abandoned {};  // unwinds the threads of a block that has failed

  static void switch_to(Context& from, Context& to) {
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_start_switch_fiber(&from.fake_stack, to.bottom, to.size);
#endif
    swapcontext(&from.place, &to.place);
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
  }

  static void fiber_entry();
  void new_thread();
  void resume(Thread& thread);
  uint64_t wait(Pause pause);
  void run_block();
  void release_if_complete(Thread& thread);
  void release(Thread& thread);
  void abandon_block();
  std::string describe(const char* problem) const;
  uint64_t below(uint64_t bound) { return random_() % bound; }

  std::mt19937_64 random_{0};
  std::vector<Thread> threads_;
  std::vector<Thread*> ready_;
  size_t size_ = 0, waiting_ = 0, unfinished_ = 0;  // threads in the block; at its barrier; not yet returned
  std::unique_ptr<unsigned char[]> shared_;
  const std::function<void()>* body_ = nullptr;
  Thread* running_ = nullptr;
  Context caller_;
  std::exception_ptr failure_;
  bool abandoning_ = false;
};

// One machine per process, driven from one thread: threadIdx and the like are plain globals.
inline Machine& machine() {
  static Machine instance;
  return instance;
}

// A fiber lives as long as the machine and runs one thread of one block after another.
inline void Machine::fiber_entry() {
  Machine& self = machine();
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(nullptr, &self.caller_.bottom, &self.caller_.size);
#endif
  for (;;) {
    // The exception must not leave the fiber, and no switch may happen inside a catch block.
    if (!self.abandoning_) {
      try {
        (*self.body_)();
      } catch (const Abandoned&) {
      } catch (...) {
        self.failure_ = std::current_exception();
      }
    }
    Thread& thread = *self.running_;
    thread.pause.state = State::finished;
    --self.unfinished_;
    switch_to(thread.context, self.caller_);
  }
}

inline void Machine::new_thread() {
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE)), bytes = page + Context::stack_bytes;
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  Context context;
  context.stack.reset(memory, [bytes](void* stack) { munmap(stack, bytes); });
  mprotect(memory, page, PROT_NONE);
  context.bottom = static_cast<char*>(memory) + page;
  context.size = Context::stack_bytes;
  threads_.push_back({std::move(context), {}, {}});

  // The ucontext_t holds pointers into itself, so it is filled where it stays.
  ucontext_t& place = threads_.back().context.place;
  getcontext(&place);
  place.uc_stack.ss_sp = static_cast<char*>(memory) + page;
  place.uc_stack.ss_size = Context::stack_bytes;
  place.uc_link = nullptr;
  makecontext(&place, fiber_entry, 0);
}

inline void Machine::resume(Thread& thread) {
  running_ = &thread;
  threadIdx = thread.index;
  switch_to(caller_, thread.context);
  running_ = nullptr;
}

inline uint64_t Machine::wait(Pause pause) {
  if (!running_) throw Fault(std::string(pause.call) + " outside of a kernel");
  Thread& thread = *running_;
  thread.pause = pause;
  switch_to(thread.context, caller_);
  if (abandoning_) throw Abandoned();
  return thread.pause.value;
}

inline void Machine::run(dim3 grid, dim3 block, int64_t shared_bytes, const std::function<void()>& body) {
  if (running_) throw Fault("a kernel cannot launch a kernel here");
  const uint64_t threads = uint64_t{block.x} * block.y * block.z, blocks = uint64_t{grid.x} * grid.y * grid.z;
  if (threads == 0 || threads > 1024 || block.z > 64) throw Fault("a block has 1 to 1024 threads, 64 along z");
  if (blocks == 0 || grid.x > 0x7FFFFFFF || grid.y > 65535 || grid.z > 65535) {
    throw Fault("a grid has 1 to 2^31-1, 65535, 65535 blocks along x, y, z");
  }
  if (shared_bytes < 0 || shared_bytes > shared_memory_limit) {
    throw Fault("a block asks for " + std::to_string(shared_bytes) + " bytes of shared memory, the limit is " +
                std::to_string(shared_memory_limit));
  }

  size_ = threads;
  threads_.reserve(1024);  // contexts must not move
  while (threads_.size() < size_) new_thread();
  for (unsigned i = 0; i < size_; ++i) {
    threads_[i].index = dim3(i % block.x, i / block.x % block.y, i / (block.x * block.y));
  }
  shared_.reset(new unsigned char[static_cast<size_t>(shared_bytes)]);
  body_ = &body;
  gridDim = grid;
  blockDim = block;

  std::vector<uint64_t> order(blocks);
  for (uint64_t i = 0; i < blocks; ++i) order[i] = i;
  std::shuffle(order.begin(), order.end(), random_);
  for (const uint64_t i : order) {
    blockIdx = dim3(static_cast<unsigned>(i % grid.x), static_cast<unsigned>(i / grid.x % grid.y),
                    static_cast<unsigned>(i / grid.x / grid.y));
    if (shared_bytes > 0) std::memset(shared_.get(), 0xFF, static_cast<size_t>(shared_bytes));
    run_block();
  }
  shared_.reset();
}

inline void Machine::run_block() {
  unfinished_ = size_;
  waiting_ = 0;
  ready_.clear();
  for (size_t i = 0; i < size_; ++i) release(threads_[i]);

  while (!ready_.empty() && !failure_) {
    std::swap(ready_[below(ready_.size())], ready_.back());
    Thread& thread = *ready_.back();
    ready_.pop_back();
    resume(thread);
    if (!failure_) release_if_complete(thread);
  }
  if (!failure_ && unfinished_ > 0) {
    failure_ = std::make_exception_ptr(Fault(describe("divergent barrier or shuffle")));
  }
  if (failure_) {
    abandon_block();
    std::rethrow_exception(std::exchange(failure_, nullptr));
  }
}

inline void Machine::release(Thread& thread) {
  thread.pause.state = State::ready;
  ready_.push_back(&thread);
}

// Releases all that waited for `thread`, which has just stopped.
inline void Machine::release_if_complete(Thread& thread) {
  const Pause& pause = thread.pause;
  if (pause.state == State::in_block && ++waiting_ == size_) {
    for (size_t i = 0; i < size_; ++i) {
      if (!threads_[i].pause.same_as(pause)) return;  // two different barriers: no thread can continue
    }
    waiting_ = 0;
    for (size_t i = 0; i < size_; ++i) release(threads_[i]);
  }
  if (pause.state == State::in_warp) {
    const size_t first = static_cast<size_t>(&thread - threads_.data()) / 32 * 32;
    const uint32_t mask = pause.mask;
    uint64_t taken[32];
    for (size_t lane = 0; lane < 32; ++lane) {
      if (!(mask >> lane & 1)) continue;
      if (first + lane >= size_ || !threads_[first + lane].pause.same_as(pause)) return;
      taken[lane] = threads_[first + static_cast<size_t>(threads_[first + lane].pause.source)].pause.value;
    }
    for (size_t lane = 0; lane < 32; ++lane) {
      if (!(mask >> lane & 1)) continue;
      threads_[first + lane].pause.value = taken[lane];
      release(threads_[first + lane]);
    }
  }
}

// Every fiber must be back at the top of its loop before the next launch, with its destructors run.
inline void Machine::abandon_block() {
  abandoning_ = true;
  for (size_t i = 0; i < size_; ++i) {
    if (threads_[i].pause.state != State::finished) resume(threads_[i]);
  }
  abandoning_ = false;
  shared_.reset();
}

inline std::string Machine::describe(const char* problem) const {
  const auto where = [](const Pause& pause) -> std::string {
    if (pause.state == State::finished) return "returned";
    const std::string file = pause.at.file_name();
    return "wait in " + std::string(pause.call) + " at " + file.substr(file.find_last_of('/') + 1) + ":" +
           std::to_string(pause.at.line());
  };
  std::string text = std::string(problem) + ": in block (" + std::to_string(blockIdx.x) + ", " +
                     std::to_string(blockIdx.y) + ", " + std::to_string(blockIdx.z) + ")";
  for (size_t first = 0, last; first < size_; first = last + 1) {
    for (last = first; last + 1 < size_ && where(threads_[last + 1].pause) == where(threads_[first].pause);) ++last;
    text += (first ? ", threads " : " threads ") + std::to_string(first) + "-" + std::to_string(last) + " " +
            where(threads_[first].pause);
  }
  return text;
}

template <class T>
T shuffle(const char* call, std::source_location at, uint32_t mask, T value, int source) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= sizeof(uint64_t));
  if (!(mask >> machine().lane() & 1)) throw Fault(std::string(call) + ": a lane calls it that its mask leaves out");
  if (!(mask >> source & 1)) throw Fault(std::string(call) + ": a lane reads from one that the mask leaves out");
  uint64_t carried = 0;
  std::memcpy(&carried, &value, sizeof(T));
  carried = machine().wait_for_warp(call, at, mask, carried, source);
  std::memcpy(&value, &carried, sizeof(T));
  return value;
}

}  // namespace pydistill::cuda_host

// The caller's line arrives as a default argument, which is how a Fault can name it and how two different barriers
// are told apart.
inline void __syncthreads(std::source_location at = std::source_location::current()) {
  pydistill::cuda_host::machine().wait_for_block(at);
}

inline void __syncwarp(uint32_t mask = ~0u, std::source_location at = std::source_location::current()) {
  pydistill::cuda_host::shuffle("__syncwarp", at, mask, 0, pydistill::cuda_host::machine().lane());
}

template <class T>
T __shfl_xor_sync(uint32_t mask, T value, int lane_mask, std::source_location at = std::source_location::current()) {
  return pydistill::cuda_host::shuffle("__shfl_xor_sync", at, mask, value,
                                       pydistill::cuda_host::machine().lane() ^ lane_mask);
}

template <class T>
T __shfl_down_sync(uint32_t mask, T value, int delta, std::source_location at = std::source_location::current()) {
  const int lane = pydistill::cuda_host::machine().lane();
  return pydistill::cuda_host::shuffle("__shfl_down_sync", at, mask, value, lane + delta < 32 ? lane + delta : lane);
}

namespace pydistill {

inline int64_t shared_memory_limit() { return cuda_host::machine().shared_memory_limit; }

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, int64_t shared_bytes, cudaStream_t,
            const Arguments&... arguments) {
  cuda_host::machine().run(grid, block, shared_bytes, [&] { kernel(arguments...); });
}

inline unsigned char* dynamic_shared() { return cuda_host::machine().dynamic_shared(); }

template <class T>
T global_load(const T* address) {
  cuda_host::machine().bytes_loaded += sizeof(T);
  return *address;
}

template <class T>
void global_store(T* address, T value) {
  cuda_host::machine().bytes_stored += sizeof(T);
  *address = value;
}

}  // namespace pydistill

#endif

#include "cuda_scalars.h"
