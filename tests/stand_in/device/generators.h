// Random numbers: a device's generator is a generator of the CPU with a state of its own and, as on a GPU, other
// numbers for the same seed.
#pragma once

#include <ATen/CPUGeneratorImpl.h>

#include "counts.h"

namespace stand_in {

struct DeviceGenerator final : c10::GeneratorImpl {
  at::Generator cpu;
  static constexpr uint64_t OTHER = 0x5bd1e995;
  bool registered = false;  // with a graph, which may then draw from it

  DeviceGenerator(DeviceIndex index, at::Generator cpu)
      : GeneratorImpl(gpu(index), c10::DispatchKeySet(c10::DispatchKey::CUDA)), cpu(std::move(cpu)) {}
  void set_current_seed(uint64_t seed) override { cpu.set_current_seed(seed ^ OTHER); }
  void set_offset(uint64_t offset) override { cpu.set_offset(offset); }
  uint64_t get_offset() const override { return cpu.get_offset(); }
  uint64_t current_seed() const override { return cpu.current_seed() ^ OTHER; }
  uint64_t seed() override { return cpu.seed() ^ OTHER; }
  void set_state(const c10::TensorImpl& state) override { cpu.unsafeGetGeneratorImpl()->set_state(state); }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override { return cpu.unsafeGetGeneratorImpl()->get_state(); }
  DeviceGenerator* clone_impl() const override { return new DeviceGenerator(device_.index(), cpu.clone()); }
};

inline at::Generator new_generator(DeviceIndex index) {
  return at::Generator(
      c10::make_intrusive<DeviceGenerator>(index < 0 ? current_device : index, at::detail::createCPUGenerator()));
}

inline const at::Generator& default_generator(DeviceIndex index) {
  static const std::array<at::Generator, DEVICES> generators{new_generator(0), new_generator(1)};
  return generators.at(index < 0 ? current_device : index);
}

// The CPU's default generator in the state of a device's: operators that are given no generator draw from it.
class BorrowedState {
 public:
  explicit BorrowedState(DeviceIndex index) : device_(default_generator(index).get<DeviceGenerator>()->cpu) { swap(); }
  ~BorrowedState() { swap(); }

 private:
  at::Generator device_, host_ = at::detail::getDefaultCPUGenerator();

  void swap() {
    const auto device = device_.unsafeGetGeneratorImpl()->get_state(),
               host = host_.unsafeGetGeneratorImpl()->get_state();
    device_.unsafeGetGeneratorImpl()->set_state(*host);
    host_.unsafeGetGeneratorImpl()->set_state(*device);
  }
};

}  // namespace stand_in
