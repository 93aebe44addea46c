// What is counted: waits of the host, calls that launch, copies between host and device, allocations. And what may not
// happen while a stream is captured.
#pragma once

#include <c10/core/Device.h>
#include <c10/core/Stream.h>
#include <c10/util/Exception.h>

#include <array>
#include <atomic>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

namespace stand_in {

using c10::Device;
using c10::DeviceIndex;

constexpr DeviceIndex DEVICES = 2;

inline Device gpu(DeviceIndex index) { return {c10::DeviceType::CUDA, index}; }

// Each thread has its own current device, and on each device a current stream; 0 is the default stream.
inline thread_local DeviceIndex current_device = 0;
inline thread_local std::array<c10::StreamId, DEVICES> current_stream{};

struct Counts {
  std::vector<std::string> waits;  // the reasons, in their order
  int64_t launches = 0, copies = 0, allocations = 0;
};

struct Capture {
  DeviceIndex device;
  c10::StreamId stream;
  std::thread::id thread;
  bool everywhere;  // whether other threads are bound, too

  bool binds_this_thread() const { return everywhere || thread == std::this_thread::get_id(); }
};

// Autograd's device threads count as well.
inline std::recursive_mutex counting;
inline Counts counts;
inline std::optional<Capture> capture;
inline bool waits_are_forbidden = false;
inline bool paused = false;  // while a graph is replayed, which counts as one call

inline void note_wait(const std::string& reason) {
  const std::lock_guard lock(counting);
  if (paused) return;
  TORCH_CHECK(!capture || !capture->binds_this_thread(), "operation not permitted when stream is capturing: ", reason);
  TORCH_CHECK(!waits_are_forbidden, "the host waits for the device: ", reason);
  counts.waits.push_back(reason);
}

// Work on a device goes to its current stream. On a GPU, work beside a captured stream runs at once and is missing in
// the graph, without a word.
inline void check_place(DeviceIndex device, const std::string& what) {
  const std::lock_guard lock(counting);
  if (!capture || paused || capture->thread != std::this_thread::get_id()) return;
  TORCH_CHECK(device == capture->device, "not captured: ", what, " on cuda:", int{device},
              ", while a stream of cuda:", int{capture->device}, " is capturing");
  TORCH_CHECK(current_stream[device] == capture->stream, "not captured: ", what,
              " on another stream than the one that ", "is capturing");
}

inline void note_launch(DeviceIndex device, const std::string& what) {
  const std::lock_guard lock(counting);
  check_place(device, what);
  if (!paused) ++counts.launches;
}

inline void note_copy_of_host(DeviceIndex device, const std::string& what) {
  const std::lock_guard lock(counting);
  check_place(device, what);
  if (!paused) ++counts.copies;
}

}  // namespace stand_in
