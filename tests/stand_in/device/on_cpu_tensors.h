// An operator's arguments as tensors of the CPU over the same memory, and the way back.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/ivalue.h>

#include <utility>

#include "generators.h"
#include "guard.h"
#include "memory.h"

namespace stand_in {

using c10::DispatchKey;
using c10::DispatchKeySet;
using c10::IValue;

inline at::Tensor tensor_over(c10::Storage storage, const at::Tensor& like, DispatchKey backend) {
  // these tell how the values are to be read
  const DispatchKeySet reading({DispatchKey::Conjugate, DispatchKey::Negative, DispatchKey::ZeroTensor});
  auto out = at::detail::make_tensor<c10::TensorImpl>(
      std::move(storage), (like.key_set() & reading) | DispatchKeySet(backend), like.dtype());
  auto* const impl = out.unsafeGetTensorImpl();
  impl->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  if (like.unsafeGetTensorImpl()->is_wrapped_number()) impl->set_wrapped_number(true);
  return out;
}

class OnCpuTensors {
 public:
  // mixed: whether tensors of the host beside those of the device may have any shape
  explicit OnCpuTensors(bool mixed) : mixed_(mixed) {}

  IValue to_cpu(const IValue& value) {
    if (value.isTensor()) return to_cpu(value.toTensor());
    if (value.isStorage()) return cpu_storage(value.toStorage());
    if (value.isList() && !value.isIntList() && !value.isDoubleList() && !value.isBoolList()) {
      const auto list = value.toList();
      c10::List<IValue> out(list.elementType());
      for (const IValue& item : list.vec()) out.push_back(to_cpu(item));
      return out;
    }
    if (value.isDevice() && value.toDevice().is_cuda()) {
      device_ = Guard::indexed(value.toDevice());
      TORCH_CHECK(device_->index() < DEVICES, "CUDA error: invalid device ordinal");
      return Device(c10::DeviceType::CPU);
    }
    if (value.isGenerator()) return generator(value.toGenerator());
    return value;
  }

  Device device() const { return device_.value_or(gpu(current_device)); }

  IValue to_device(const IValue& value) {
    if (value.isTensor()) return to_device(value.toTensor());
    if (value.isTensorList()) {
      c10::List<at::Tensor> out;
      for (const at::Tensor& item : value.toTensorVector()) out.push_back(to_device(item));
      return out;
    }
    return value;
  }

  // Gives the device's tensors the sizes and memory that the operator has given their likenesses.
  void follow() {
    for (const auto& [device, cpu] : storages_)
      if (device.nbytes() != cpu.nbytes() || device.data() != cpu.data()) {
        device.unsafeGetStorageImpl()->set_data_ptr_noswap(Twin::data_of(shared(cpu), device.device().index()));
        device.unsafeGetStorageImpl()->set_nbytes(cpu.nbytes());
      }
    for (const auto& [device, cpu] : tensors_) {
      auto* const impl = device.unsafeGetTensorImpl();
      if (const c10::Storage storage = device_storage(cpu.storage()); !storage.is_alias_of(device.storage()))
        impl->set_storage_keep_dtype(storage);
      if (device.sizes() != cpu.sizes() || device.strides() != cpu.strides() ||
          device.storage_offset() != cpu.storage_offset())
        impl->set_sizes_and_strides(cpu.sizes(), cpu.strides(), cpu.storage_offset());
    }
  }

 private:
  bool mixed_;
  std::optional<Device> device_;
  std::vector<at::Tensor> of_host_;
  std::vector<std::pair<at::Tensor, at::Tensor>> tensors_;       // the device's and the CPU's
  std::vector<std::pair<c10::Storage, c10::Storage>> storages_;  // likewise

  static c10::intrusive_ptr<c10::StorageImpl> shared(const c10::Storage& storage) {
    return c10::intrusive_ptr<c10::StorageImpl>::reclaim_copy(storage.unsafeGetStorageImpl());
  }

  at::Tensor to_cpu(const at::Tensor& t) {
    if (!t.defined()) return t;
    if (!t.is_cuda()) {
      check_same_device(t.dim() == 0, t);
      of_host_.push_back(t);
      return t;
    }
    check_dense(t);
    check_same_device(!device_ || *device_ == t.device(), t);
    if (!device_) device_ = t.device();
    for (const auto& [known, cpu] : tensors_)
      if (known.is_same(t)) return cpu;
    tensors_.emplace_back(t, tensor_over(cpu_storage(t.storage()), t, DispatchKey::CPU));
    return tensors_.back().second;
  }

  void check_same_device(bool same, const at::Tensor& t) const {
    TORCH_CHECK(mixed_ || same, "Expected all tensors to be on the same device, but found at least two devices, ",
                t.device(), " and ", device(), "!");
  }

  static void check_dense(const at::Tensor& t) {
    TORCH_CHECK_NOT_IMPLEMENTED(t.has_storage() && t.layout() == c10::kStrided, "the stand-in has dense tensors only");
  }

  c10::Storage cpu_storage(const c10::Storage& storage) {
    if (storage.device_type() != c10::DeviceType::CUDA) return storage;
    for (const auto& [known, cpu] : storages_)
      if (known.is_alias_of(storage)) return cpu;
    c10::StorageImpl* const twin = Twin::of(storage);
    storages_.emplace_back(storage, twin ? c10::Storage(c10::intrusive_ptr<c10::StorageImpl>::reclaim_copy(twin))
                                         : over_foreign_memory(storage));
    return storages_.back().second;
  }

  static c10::Storage over_foreign_memory(const c10::Storage& storage) {
    void* const data = storage.unsafeGetStorageImpl()->mutable_data();
    return c10::Storage(c10::make_intrusive<c10::StorageImpl>(c10::StorageImpl::use_byte_size_t(), storage.nbytes(),
                                                              c10::DataPtr(data, Device(c10::DeviceType::CPU)), nullptr,
                                                              false));
  }

  c10::Storage device_storage(const c10::Storage& cpu) {
    for (const auto& [device, known] : storages_)
      if (known.is_alias_of(cpu)) return device;
    c10::Storage device(c10::make_intrusive<c10::StorageImpl>(c10::StorageImpl::use_byte_size_t(), cpu.nbytes(),
                                                              Twin::data_of(shared(cpu), this->device().index()),
                                                              &device_allocator, true));
    storages_.emplace_back(device, cpu);
    return device;
  }

  at::Tensor to_device(const at::Tensor& t) {
    if (!t.defined()) return t;
    for (const auto& [device, cpu] : tensors_)
      if (cpu.is_same(t)) return device;
    for (const at::Tensor& given : of_host_)
      if (given.is_same(t)) return t;
    check_dense(t);
    return tensor_over(device_storage(t.storage()), t, DispatchKey::CUDA);
  }

  static at::Generator generator(const at::Generator& given) {
    TORCH_CHECK(given.device().is_cuda(), "Expected a 'cuda' device type for generator but found '", given.device(),
                "'");
    const auto* const own = given.get<DeviceGenerator>();
    const std::lock_guard lock(counting);
    TORCH_CHECK(!capture || paused || own->registered, "a generator that is not registered with the graph is drawn ",
                "from while its stream is capturing");
    return own->cpu;
  }
};

}  // namespace stand_in
