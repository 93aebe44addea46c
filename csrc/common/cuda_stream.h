// The CUDA stream that torch is working on.
#pragma once

#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/headeronly/util/shim_utils.h>

#include <stdexcept>

namespace pydistill {

// The function is in libtorch_cuda, which a build against the CPU wheel cannot name as a dependency and which torch
// loads without exporting its symbols globally. It is loaded whenever there are CUDA tensors: look it up there.
inline void* current_cuda_stream(int32_t device) {
  using Function = AOTITorchError(int32_t device, void** stream);
  static Function* const get = [] {
    void* const library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    void* const symbol = library ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr;
    if (!symbol) throw std::runtime_error("this torch does not tell its current CUDA stream");
    return reinterpret_cast<Function*>(symbol);
  }();
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(get(device, &stream));
  return stream;
}

}  // namespace pydistill
