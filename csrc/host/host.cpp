// The torch-free module: what was built and which of it runs here, and the label store's codec with NumPy arrays in and
// out and the GIL released. Safe to import in data-loader workers.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <string>
#include <vector>

#include "../common/isa.h"
#include "crc32.h"
#include "soft_labels.h"

namespace py = pybind11;

namespace pydistill {
namespace {

using Values = py::array_t<float, py::array::c_style>;
using Bytes = py::array_t<uint8_t>;

std::string shape_of(const py::array& array) {
  std::string text = "[";
  for (py::ssize_t i = 0; i < array.ndim(); ++i) text += (i ? ", " : "") + std::to_string(array.shape(i));
  return text + "]";
}

TopK form_of(int64_t classes, int64_t k, double step, bool row_step = false) {
  if (classes < 1 || classes > 65536)
    throw py::value_error("num_classes: expected 1 to 65536, got " + std::to_string(classes));
  if (k < 1 || k > classes)
    throw py::value_error("k: expected 1 to the " + std::to_string(classes) + " classes, got " + std::to_string(k));
  if (!(step >= 0)) throw py::value_error("step: expected a positive number, or 0, got " + std::to_string(step));
  return {classes, k, step, row_step};
}

const char* text_of(Flaw flaw) {
  switch (flaw) {
    case Flaw::not_finite:
      return "expected finite numbers";
    case Flaw::negative:
      return "expected probabilities, got a negative number";
    default:
      return "expected probabilities, got numbers that do not add up to one";
  }
}

Bytes encode_topk(const Values& values, int64_t k, double step, bool probs, double temperature, bool row_step) {
  if (values.ndim() != 2) throw py::value_error("values: expected [N, C], got " + shape_of(values));
  if (!(temperature > 0))
    throw py::value_error("temperature: expected a positive number, got " + std::to_string(temperature));
  const int64_t n = values.shape(0), classes = values.shape(1);
  const TopK form = form_of(classes, k, step, row_step);
  Bytes out({n, form.bytes()});
  const float* from = values.data();
  uint8_t* to = out.mutable_data();
  Flaw flaw = Flaw::none;
  int64_t row = 0;
  {
    py::gil_scoped_release free;
    std::vector<int32_t> order(classes);
    std::vector<double> weights(classes);
    for (; row < n && flaw == Flaw::none; ++row)
      flaw =
          encode(from + row * classes, form, probs, temperature, order.data(), weights.data(), to + row * form.bytes());
  }
  if (flaw != Flaw::none) throw py::value_error("row " + std::to_string(row - 1) + ": " + text_of(flaw));
  return out;
}

py::tuple decode_topk(const Bytes& rows, int64_t classes, int64_t k, double step) {
  const TopK form = form_of(classes, k, step);
  if (rows.ndim() != 2 || rows.shape(1) < form.bytes() || (rows.size() > 0 && rows.strides(1) != 1))
    throw py::value_error("rows: expected [N, " + std::to_string(form.bytes()) +
                          " or more] of consecutive bytes, got " + shape_of(rows));
  const int64_t n = rows.shape(0), stride = rows.strides(0);
  py::array_t<int64_t> indices({n, k});
  py::array_t<float> values({n, k}), tail(n);
  const uint8_t* from = rows.data();
  int64_t *to_indices = indices.mutable_data(), row = 0;
  float *to_values = values.mutable_data(), *to_tail = tail.mutable_data();
  bool right = true;
  {
    py::gil_scoped_release free;
    thread_local Weights weights;  // the rows of the next call mostly have equally fine steps
    for (; row < n && right; ++row)
      right = decode(from + row * stride, form, weights, to_indices + row * k, to_values + row * k, to_tail + row);
  }
  if (!right)
    throw py::value_error("row " + std::to_string(row - 1) + ": a class is not below " + std::to_string(classes));
  return py::make_tuple(indices, values, tail);
}

uint32_t crc32_of(const py::buffer& data, uint32_t value) {
  const py::buffer_info info = data.request();
  py::ssize_t expected = info.itemsize;
  for (py::ssize_t i = info.ndim - 1; i >= 0; expected *= info.shape[i--])
    if (info.shape[i] > 1 && info.strides[i] != expected) throw py::value_error("data: expected consecutive bytes");
  py::gil_scoped_release free;
  return crc32(static_cast<const uint8_t*>(info.ptr), static_cast<std::size_t>(info.size * info.itemsize), value);
}

}  // namespace

}  // namespace pydistill

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
        info["cuda_toolkit"] = PYDISTILL_CUDA_TOOLKIT;
        return info;
      },
      "Facts baked in at build time: version, compiler, the torch whose headers were used, the CUDA architectures that "
      "were compiled, and the version of the toolkit that did it (both empty: built without CUDA).");
  m.def(
      "isa", [] { return pydistill::kIsaNames[static_cast<int>(pydistill::isa())]; },
      "The CPU instruction set that kernels run with: base, avx2, avx512, avx512_bf16 or amx (PYDISTILL_ISA "
      "overrides).");
  m.def("crc32", &pydistill::crc32_of, py::arg("data"), py::arg("value") = 0,
        "The CRC-32 of consecutive bytes, the number that zlib.crc32 gives.");
  m.def("encode_topk", &pydistill::encode_topk, py::arg("values").noconvert(), py::arg("k"), py::arg("step"),
        py::arg("probs"), py::arg("temperature"), py::arg("row_step") = false,
        "Rows of top-k labels, uint8 [N, bytes], of float32 logits [N, C] (a softmax at a temperature is taken) or "
        "probabilities. step: of the logarithms in uint8, at most; 0 for halves. row_step: as fine as a row lets "
        "them be. ValueError names a row that is not finite or "
        "no distribution.");
  m.def("decode_topk", &pydistill::decode_topk, py::arg("rows").noconvert(), py::arg("num_classes"), py::arg("k"),
        py::arg("step"),
        "Of rows of top-k labels, which may be longer, the classes int64 [N, k], their probabilities float32 [N, k] "
        "and the mass of all others float32 [N].");
}
