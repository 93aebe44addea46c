// What an operator call costs on a GPU: whether the host waits, and whether a kernel is launched.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/enum_tag.h>

#include <set>

#include "counts.h"
#include "memory.h"

namespace stand_in {

using Arguments = std::vector<c10::IValue>;

// After these the host knows what the device has computed: a value, a number of elements, or whether all went well.
inline const std::set<std::string> WAITING = {
    "aten::_local_scalar_dense", "aten::nonzero",         "aten::masked_select",      "aten::_unique2",
    "aten::unique_dim",          "aten::equal",           "aten::unique_consecutive", "aten::unique_dim_consecutive",
    "aten::multinomial",         "aten::bincount",        "aten::_linalg_eigh",       "aten::_linalg_svd",
    "aten::linalg_lstsq",        "aten::_linalg_eigvals", "aten::linalg_eig",
};

// These read or write nothing, and are no views by their schema.
inline const std::set<std::string> WITHOUT_LAUNCH = {
    "aten::empty",     "aten::empty_strided",        "aten::resize_",
    "aten::set_",      "aten::_efficientzerotensor", "aten::record_stream",
    "aten::is_set_to", "aten::_local_scalar_dense",  "aten::_reshape_alias",
    "aten::copy_",  // of copies only those within a device are launches
};

// Blocking copies, and copies from pageable memory or to it.
inline void note_copy(const at::Tensor& to, const at::Tensor& from, bool non_blocking) {
  if (to.is_cuda() == from.is_cuda()) {
    note_launch(to.is_cuda() ? to.device().index() : current_device, "copy_");
    return;
  }
  const at::Tensor &host = to.is_cuda() ? from : to, &device = to.is_cuda() ? to : from;
  if (!non_blocking || !PinnedAllocator::has(host.const_data_ptr()))
    note_wait(to.is_cuda() ? "copy from host" : "copy to host");
  note_copy_of_host(device.device().index(), "copy_");
}

inline void note_indices(const at::Tensor& indexed, const c10::IValue& indices) {
  TORCH_CHECK(indexed.is_cuda(), "indices should be either on cpu or on the same device as the indexed tensor (cpu)");
  for (const c10::IValue& item : indices.toListRef()) {
    if (!item.isTensor() || !item.toTensor().defined()) continue;
    const at::Tensor& index = item.toTensor();
    if (!index.is_cuda()) {
      note_wait("copy from host");
      note_copy_of_host(indexed.device().index(), "index");
    }
    if (index.scalar_type() == c10::kBool || index.scalar_type() == c10::kByte) note_wait("nonzero");
  }
}

inline void note_waits(const std::string& name, c10::ArrayRef<c10::IValue> arguments) {
  if (WAITING.count(name) || (name == "aten::repeat_interleave" && arguments[1].isNone())) note_wait(name.substr(6));
  if (name == "aten::copy_") note_copy(arguments[0].toTensor(), arguments[1].toTensor(), arguments[2].toBool());
  // a lone mask and a value of the host make a masked_fill instead
  if (name == "aten::index" || (name == "aten::_index_put_impl_" && arguments[2].toTensor().is_cuda()))
    note_indices(arguments[0].toTensor(), arguments[1]);
}

inline bool launches(const c10::OperatorHandle& op) {
  const auto& schema = op.schema();
  if (WITHOUT_LAUNCH.count(schema.name()) || op.hasTag(at::Tag::inplace_view)) return false;
  for (const auto& out : schema.returns())
    if (const auto* const alias = out.alias_info(); alias && !alias->isWrite()) return false;  // a view
  return true;
}

}  // namespace stand_in
