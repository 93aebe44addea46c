// The torch-free module: what was built, and which of it runs here. Safe to import in data-loader workers.
#include <pybind11/pybind11.h>

#include "../common/isa.h"

namespace py = pybind11;

namespace pydistill {
void bind_soft_labels(py::module_& m);  // bind_soft_labels.cpp
}

PYBIND11_MODULE(_host, m) {
  m.doc() = "Torch-free host helpers of pydistill.";
  m.def(
      "build_info",
      [] {
        py::dict info;
        info["version"] = PYDISTILL_VERSION;
        info["compiler"] = PYDISTILL_COMPILER;
        info["torch_headers"] = PYDISTILL_TORCH_VERSION;
        info["cuda_architectures"] = PYDISTILL_CUDA_ARCHITECTURES;
        return info;
      },
      "Facts baked in at build time: version, compiler, the torch whose headers were used, and the CUDA architectures "
      "that were compiled (empty: built without CUDA).");
  m.def(
      "isa", [] { return pydistill::kIsaNames[static_cast<int>(pydistill::isa())]; },
      "The CPU instruction set that kernels run with: base, avx2, avx512, avx512_bf16 or amx (PYDISTILL_ISA "
      "overrides).");
  pydistill::bind_soft_labels(m);
}
