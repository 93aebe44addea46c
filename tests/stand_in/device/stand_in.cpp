// A stand-in for two CUDA devices, for tests, on a torch that is built without CUDA.
//
// Tensors report cuda:0 or cuda:1 and lie in ordinary memory. torch's operators on them are the CPU's, so that values
// are the CPU's. What a GPU would do differently is counted: waits of the host, launches, copies, allocations.
#include "hooks.h"
#include "operators.h"

namespace stand_in {
namespace {

REGISTER_ALLOCATOR(c10::DeviceType::CUDA, &device_allocator)
C10_REGISTER_GUARD_IMPL(CUDA, Guard)

[[maybe_unused]] const bool hooked = (take_the_hooks_place(), true);

// Launches, copies, allocations and waits so far; and the reasons of the waits.
std::vector<int64_t> numbers() {
  const std::lock_guard lock(counting);
  return {counts.launches, counts.copies, counts.allocations, static_cast<int64_t>(counts.waits.size())};
}

std::vector<std::string> waits() {
  const std::lock_guard lock(counting);
  return counts.waits;
}

bool forbid_waits(bool forbidden) {
  const std::lock_guard lock(counting);
  return std::exchange(waits_are_forbidden, forbidden);
}

bool pause(bool pausing) {
  const std::lock_guard lock(counting);
  return std::exchange(paused, pausing);
}

void begin_capture(bool everywhere) {
  const std::lock_guard lock(counting);
  TORCH_CHECK(!capture, "a stream is capturing already");
  TORCH_CHECK(current_stream[current_device] != 0, "CUDA graphs must be captured on a non-default stream");
  capture = Capture{current_device, current_stream[current_device], std::this_thread::get_id(), everywhere};
}

void end_capture() {
  const std::lock_guard lock(counting);
  capture.reset();
}

void register_generator(const std::optional<at::Generator>& generator, bool registered) {
  const std::lock_guard lock(counting);
  generator->get<DeviceGenerator>()->registered = registered;
}

// Allocated bytes of a device, the most there were, and what torch would have reserved.
std::vector<int64_t> memory(int64_t device) {
  const std::lock_guard lock(counting);
  const Usage& used = usage.at(static_cast<size_t>(device));
  return {used.allocated, used.peak, used.reserved};
}

void reset_peak(int64_t device) {
  const std::lock_guard lock(counting);
  Usage& used = usage.at(static_cast<size_t>(device));
  used.peak = used.allocated;
}

void empty_cache() {
  const std::lock_guard lock(counting);
  for (Usage& used : usage) used.reserved = used.allocated;
}

// For what launches without asking for the stream.
void launch(int64_t device) {
  void* stream = nullptr;
  aoti_torch_get_current_cuda_stream(static_cast<int32_t>(device), &stream);
}

// A tensor of the CPU over the same memory.
at::Tensor on_host(const at::Tensor& t) {
  c10::StorageImpl* const twin = Twin::of(t.storage());
  TORCH_CHECK(twin, "expected a tensor of a device");
  return tensor_over(c10::Storage(c10::intrusive_ptr<c10::StorageImpl>::reclaim_copy(twin)), t, DispatchKey::CPU);
}

// Lets the kernel of the CPU answer for an operator, in place of one for the devices: quicker, and the same to whoever
// asks about dispatch, devices and waits.
void borrow(const std::string& name) {
  static auto* const libraries = new std::vector<torch::Library>;  // what they register goes with them
  const auto split = name.find("::");
  libraries->emplace_back(torch::Library::IMPL, name.substr(0, split), DispatchKey::CUDA, __FILE__, __LINE__);
  libraries->back().impl(name.substr(split + 2).c_str(), on_cpu());
}

TORCH_LIBRARY_IMPL(aten, CUDA, library) { register_operators(library); }

TORCH_LIBRARY(stand_in, library) {
  library.def("waits() -> str[]", &waits);
  library.def("numbers() -> int[]", &numbers);
  library.def("forbid_waits(bool forbidden) -> bool", &forbid_waits);
  library.def("pause(bool pausing) -> bool", &pause);
  library.def("begin_capture(bool everywhere) -> ()", &begin_capture);
  library.def("end_capture() -> ()", &end_capture);
  library.def("register_generator(Generator? generator, bool registered) -> ()", &register_generator);
  library.def("is_capturing() -> bool",
              [] { return Guard{}.isStreamCapturing(Guard{}.getStream(Guard{}.getDevice())); });
  library.def("memory(int device) -> int[]", &memory);
  library.def("reset_peak(int device) -> ()", &reset_peak);
  library.def("empty_cache() -> ()", &empty_cache);
  library.def("launch(int device) -> ()", &launch);
  library.def("on_host(Tensor(a) t) -> Tensor(a)", &on_host);
  library.def("borrow(str name) -> ()", &borrow);
  library.def("default_generator(int device) -> Generator?",
              [](int64_t device) { return default_generator(static_cast<DeviceIndex>(device)); });
}

}  // namespace
}  // namespace stand_in
