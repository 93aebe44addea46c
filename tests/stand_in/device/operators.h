// The devices' operators: each is the CPU's, on tensors of the CPU over the device's memory.
#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/library.h>

#include <memory>

#include "costs.h"
#include "on_cpu_tensors.h"

namespace stand_in {

// These take tensors of the host of any shape beside those of the device: as indices, as lengths, and for copies.
inline const std::set<std::string> MIXED = {"aten::copy_", "aten::index", "aten::_index_put_impl_",
                                            "aten::_pack_padded_sequence"};

// A namespace whose operators have the schemas of those in another one, which answer for them.
inline const std::string TRITON = "pydistill_triton", NATIVE = "pydistill";

inline c10::OperatorHandle answering(const c10::OperatorHandle& op) {
  const std::string& name = op.schema().name();
  if (name.rfind(TRITON + "::", 0) != 0) return op;
  return c10::Dispatcher::singleton().findSchemaOrThrow((NATIVE + name.substr(TRITON.size())).c_str(), "");
}

inline void run_on_cpu(const c10::OperatorHandle& op, DispatchKeySet, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const std::string& name = schema.name();
  const size_t count = schema.arguments().size(), first = stack->size() - count;
  const auto argument = [&](size_t i) -> IValue& { return (*stack)[first + i]; };
  note_waits(name, c10::ArrayRef<IValue>(stack->data() + first, count));

  OnCpuTensors tensors(MIXED.count(name));
  for (size_t i = 0; i < count; ++i) argument(i) = tensors.to_cpu(argument(i));
  if (launches(op)) note_launch(tensors.device().index(), name);
  // softmax into a wider type, which the CPU has not without a copy
  if ((name == "aten::_softmax" || name == "aten::_log_softmax") && argument(2).toBool()) {
    argument(0) = argument(0).toTensor().to(c10::ScalarType::Float);
    argument(2) = false;
  }
  {
    const at::AutoDispatchBelowADInplaceOrView below;
    const std::unique_ptr<BorrowedState> borrowed(
        op.hasTag(at::Tag::nondeterministic_seeded) ? new BorrowedState(tensors.device().index()) : nullptr);
    answering(op).redispatchBoxed(DispatchKeySet(DispatchKey::CPU), stack);
  }
  tensors.follow();
  for (size_t i = stack->size() - schema.returns().size(); i < stack->size(); ++i)
    (*stack)[i] = tensors.to_device((*stack)[i]);
}

inline torch::CppFunction on_cpu() { return torch::CppFunction::makeFromBoxedFunction<&run_on_cpu>(); }

// Each of torch's operators that has a kernel of the CPU's. Not as a fallback: kernels that all devices share would go
// before it, with other values (layer_norm), and operators of other libraries must bring kernels of their own.
inline void register_operators(torch::Library& library) {
  auto& dispatcher = c10::Dispatcher::singleton();
  const auto register_one = [&](const std::string& name) { library.impl(name.c_str(), on_cpu()); };
  for (const c10::OperatorName& name : dispatcher.getAllOpNames()) {
    const auto op = dispatcher.findOp(name);
    const std::string full = toString(name);
    // one launch for a list of tensors, where the CPU's kernels go through it one by one
    const bool list = full.rfind("aten::_foreach_", 0) == 0 || full.rfind("aten::_amp_foreach_", 0) == 0;
    if (name.getNamespace() == "aten" && !op->hasKernelForDispatchKey(DispatchKey::CUDA) &&
        (op->hasKernelForDispatchKey(DispatchKey::CPU) || list))
      register_one(full.substr(6));
  }
  // Shared kernels that look at the device, and would go on to what only CUDA has.
  for (const char* name : {"copy_", "convolution", "convolution_overrideable", "convolution_backward"})
    if (!dispatcher.findOp({std::string("aten::") + name, ""})->hasKernelForDispatchKey(DispatchKey::CUDA))
      register_one(name);
  library.impl("record_stream", [](at::Tensor&, c10::Stream) {});
}

}  // namespace stand_in
