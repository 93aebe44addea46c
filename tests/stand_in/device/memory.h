// Memory of the devices, which is ordinary memory, and pinned memory.
#pragma once

#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/StorageImpl.h>
#include <c10/core/impl/alloc_cpu.h>

#include <algorithm>
#include <map>

#include "counts.h"

namespace stand_in {

struct Usage {
  int64_t allocated = 0, peak = 0, reserved = 0;
};

inline std::array<Usage, DEVICES> usage;

// Every storage of a device owns a twin: a storage of the CPU over the same bytes, on which the CPU's kernels work.
class Twin {
 public:
  static c10::DataPtr data_of(c10::intrusive_ptr<c10::StorageImpl> cpu, DeviceIndex device) {
    void* const data = cpu->mutable_data();
    return {data, new Twin(std::move(cpu), device), &drop, gpu(device)};
  }

  // Null if the memory is someone else's, as from_blob makes it.
  static c10::StorageImpl* of(const c10::Storage& storage) {
    const auto* const twin = storage.data_ptr().cast_context<Twin>(&drop);
    return twin ? twin->cpu_.get() : nullptr;
  }

 private:
  c10::intrusive_ptr<c10::StorageImpl> cpu_;
  DeviceIndex device_;
  int64_t bytes_;

  Twin(c10::intrusive_ptr<c10::StorageImpl> cpu, DeviceIndex device)
      : cpu_(std::move(cpu)), device_(device), bytes_(static_cast<int64_t>(cpu_->nbytes())) {
    const std::lock_guard lock(counting);
    if (bytes_ == 0) return;
    TORCH_CHECK(!capture || paused || capture->device == device,
                "an allocation outside of the graph's pool, on cuda:", int{device},
                ", while a stream of cuda:", int{capture->device}, " is capturing");
    if (!paused) ++counts.allocations;
    Usage& used = usage[device];
    used.allocated += bytes_;
    used.peak = std::max(used.peak, used.allocated);
    used.reserved = std::max(used.reserved, used.allocated);  // torch keeps what is freed
  }

  static void drop(void* pointer) {
    auto* const twin = static_cast<Twin*>(pointer);
    {
      const std::lock_guard lock(counting);
      usage[twin->device_].allocated -= twin->bytes_;
    }
    delete twin;
  }
};

struct DeviceAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    return Twin::data_of(
        c10::make_intrusive<c10::StorageImpl>(c10::StorageImpl::use_byte_size_t(), bytes, c10::GetCPUAllocator(), true),
        current_device);
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
};

inline DeviceAllocator device_allocator;

// Pinned memory is known by a list of where it is.
class PinnedAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    void* const data = c10::alloc_cpu(bytes);
    if (data) {
      const std::lock_guard lock(mutex());
      blocks()[static_cast<const char*>(data)] = bytes;
    }
    return {data, data, &release, Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }

  static bool has(const void* data) {
    const std::lock_guard lock(mutex());
    const auto* const byte = static_cast<const char*>(data);
    const auto after = blocks().upper_bound(byte);
    return after != blocks().begin() && byte < std::prev(after)->first + std::prev(after)->second;
  }

 private:
  // never destroyed: tensors may outlive this library's statics
  static std::mutex& mutex() {
    static auto* const instance = new std::mutex;
    return *instance;
  }
  static std::map<const char*, size_t>& blocks() {
    static auto* const instance = new std::map<const char*, size_t>;
    return *instance;
  }
  static void release(void* data) {
    {
      const std::lock_guard lock(mutex());
      blocks().erase(static_cast<const char*>(data));
    }
    c10::free_cpu(data);
  }
};

inline PinnedAllocator pinned_allocator;

}  // namespace stand_in
