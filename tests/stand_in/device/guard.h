// Current devices, streams and events, as torch steers them. What is asked for is done at once, so that nobody really
// waits, and a missing synchronisation between streams is not found.
#pragma once

#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <chrono>

#include "counts.h"

namespace stand_in {

struct Guard final : c10::impl::DeviceGuardImplInterface {
  using Clock = std::chrono::steady_clock;

  c10::DeviceType type() const override { return c10::DeviceType::CUDA; }
  DeviceIndex deviceCount() const noexcept override { return DEVICES; }
  Device getDevice() const override { return gpu(current_device); }
  void setDevice(Device device) const override {
    TORCH_CHECK(device.index() < DEVICES, "CUDA error: invalid device ordinal");
    uncheckedSetDevice(device);
  }
  void uncheckedSetDevice(Device device) const noexcept override {
    if (device.index() >= 0) current_device = device.index();
  }
  Device exchangeDevice(Device device) const override {
    const Device before = getDevice();
    setDevice(device);
    return before;
  }

  static Device indexed(Device device) { return device.has_index() ? device : gpu(current_device); }
  static c10::Stream stream(Device device, c10::StreamId id) {
    return c10::Stream(c10::Stream::UNSAFE, indexed(device), id);
  }
  c10::Stream getStream(Device device) const override {
    return stream(device, current_stream.at(indexed(device).index()));
  }
  c10::Stream getDefaultStream(Device device) const override { return stream(device, 0); }
  c10::Stream getStreamFromGlobalPool(Device device, bool) const override { return getNewStream(device, 0); }
  c10::Stream getNewStream(Device device, int) const override {
    static std::atomic<c10::StreamId> last{0};
    return stream(device, ++last);
  }
  c10::Stream exchangeStream(c10::Stream next) const override {
    const c10::Stream before = getStream(next.device());
    current_stream.at(indexed(next.device()).index()) = next.id();
    return before;
  }
  bool queryStream(const c10::Stream&) const override { return true; }
  bool isStreamCapturing(const c10::Stream& asked) const override {
    const std::lock_guard lock(counting);
    return capture && capture->device == asked.device_index() && capture->stream == asked.id();
  }
  void synchronizeStream(const c10::Stream&) const override { note_wait("Stream.synchronize"); }
  void synchronizeDevice(DeviceIndex) const override { note_wait("synchronize"); }

  void record(void** event, const c10::Stream&, DeviceIndex, c10::EventFlag) const override {
    if (!*event) *event = new Clock::time_point;
    *static_cast<Clock::time_point*>(*event) = Clock::now();
  }
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void synchronizeEvent(void*) const override { note_wait("Event.synchronize"); }
  void destroyEvent(void* event, DeviceIndex) const noexcept override { delete static_cast<Clock::time_point*>(event); }
  double elapsedTime(void* from, void* to, DeviceIndex) const override {
    const auto took = *static_cast<Clock::time_point*>(to) - *static_cast<Clock::time_point*>(from);
    return std::chrono::duration<double, std::milli>(took).count();
  }
};

}  // namespace stand_in

// Operators of the stable ABI ask torch's CUDA part for the stream before they launch. A launch on a stream of another
// device than the current one fails on a GPU.
extern "C" __attribute__((visibility("default"))) int32_t aoti_torch_get_current_cuda_stream(int32_t device,
                                                                                             void** stream) {
  using namespace stand_in;
  const auto index = static_cast<DeviceIndex>(device);
  TORCH_CHECK(index == current_device, "CUDA error: a launch on cuda:", device, " while cuda:", int{current_device},
              " is current");
  note_launch(index, "a kernel");
  *stream = reinterpret_cast<void*>(current_stream.at(index));
  return 0;
}
