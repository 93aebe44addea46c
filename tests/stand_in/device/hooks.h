// What torch's CPU part asks of its CUDA part.
#pragma once

#include <ATen/detail/CUDAHooksInterface.h>

#include "generators.h"
#include "guard.h"
#include "memory.h"

namespace stand_in {

struct Hooks final : at::CUDAHooksInterface {
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  int getNumGPUs() const override { return DEVICES; }
  DeviceIndex deviceCount() const override { return DEVICES; }
  DeviceIndex current_device() const override { return stand_in::current_device; }
  DeviceIndex getCurrentDevice() const override { return stand_in::current_device; }
  void setCurrentDevice(DeviceIndex index) const override { Guard{}.setDevice(gpu(index)); }
  DeviceIndex exchangeDevice(DeviceIndex index) const override { return Guard{}.exchangeDevice(gpu(index)).index(); }
  DeviceIndex maybeExchangeDevice(DeviceIndex index) const override { return exchangeDevice(index); }
  Device getDeviceFromPtr(void*) const override { return gpu(stand_in::current_device); }
  at::Allocator* getCUDADeviceAllocator() const override { return &device_allocator; }
  at::Allocator* getPinnedMemoryAllocator() const override { return &pinned_allocator; }
  bool isPinnedPtr(const void* data) const override { return PinnedAllocator::has(data); }
  const at::Generator& getDefaultGenerator(DeviceIndex index) const override { return default_generator(index); }
  at::Generator getNewGenerator(DeviceIndex index) const override { return new_generator(index); }
  void deviceSynchronize(DeviceIndex index) const override { Guard{}.synchronizeDevice(index); }
};

// REGISTER_CUDA_HOOKS would come too late: torch asks for the hooks while it is imported, and keeps those it was given.
// They are an object without data, so that another of their kind can take their place.
static_assert(sizeof(Hooks) == sizeof(at::CUDAHooksInterface));
inline void take_the_hooks_place() { new (const_cast<at::CUDAHooksInterface*>(&at::detail::getCUDAHooks())) Hooks; }

}  // namespace stand_in
