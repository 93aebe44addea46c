// What a slot's passes share: its chunk, its tape, its sums. Part of convnet_step.inl.
#pragma once

#include "convnet_block.h"
#include "convnet_layout.h"
#include "instance_norm_relu_avg_pool_panel.h"

namespace pydistill {
namespace {

template <class T, class A>
class SlotState {
 protected:
  using V = Vec<T>;
  using R = Register<T>;
  using Operand = typename A::Operand;
  static constexpr int L = Lanes<T>::count, kParts = Wide<T>::parts, kLanes = Registers<T>::lanes;

 public:
  SlotState(const Step& step, int64_t e, int64_t slot, void* scratch)
      : step(step), layout(step), arena{static_cast<char*>(scratch)}, work(step, layout, arena), e(e) {
    filters = layout.set(step, e, false);
    filters_t = layout.set(step, e, true);
    tape_t = work.tape_t;
    if (step.grad != nullptr)
      sums = reinterpret_cast<T*>(static_cast<char*>(step.partials) + (e * step.slots + slot) * layout.partials);
    scale = step.scale != nullptr ? static_cast<const T*>(step.scale)[e] : T(1);
    split = A::kSplit && step.form != Step::Form::features && step.form != Step::Form::features_backward;
    begin = step.N * slot / step.slots;
    end = step.N * (slot + 1) / step.slots;
  }

 protected:
  const Step& step;
  const Layout<T, A> layout;
  Arena arena;
  Workspace<T, A> work;
  int64_t e, begin, end, first = 0, count = 0;
  T scale;
  bool split;         // the primal forward pass takes its factors as sums of two operands
  bool fresh = true;  // the slot's first chunk overwrites its sums
  void *filters, *filters_t;
  Operand* columns = nullptr;                             // of the first layer's input, for the current image
  T *sums = nullptr, *tape = nullptr, *tape_t = nullptr;  // no sums if step.grad is absent

  static void fill(T* to, int64_t n) {
    for (int64_t i = 0; i < n; ++i) to[i] = 0;
  }
  static void fill(V* to, int64_t n) {
    for (int64_t i = 0; i < n; ++i) to[i] = V{};
  }

  // The part of image g of the chunk in the tape that steps hand on; writing and reading it.
  char* kept_tape(int64_t g) const { return static_cast<char*>(step.tape) + (e * step.N + first + g) * layout.stored; }
  void keep_tape() const {
    for (int64_t g = 0; g < count; ++g) {
      auto* to = reinterpret_cast<typename A::Stored*>(kept_tape(g));
      for (int64_t i = 0; i < layout.logits_grad; i += L) A::keep(to + i, load(at(tape, g, i)));
      T* const logits = reinterpret_cast<T*>(to + layout.logits_grad);
      for (int64_t k = 0; k < layout.classes; ++k) logits[k] = at(tape, g, layout.logits_grad)[k];
    }
  }
  void take_tape() const {
    for (int64_t g = 0; g < count; ++g) {
      const auto* from = reinterpret_cast<const typename A::Stored*>(kept_tape(g));
      for (int64_t i = 0; i < layout.logits_grad; i += L) store(at(tape, g, i), load_widened<T>(from + i));
      const T* const logits = reinterpret_cast<const T*>(from + layout.logits_grad);
      for (int64_t k = 0; k < layout.classes; ++k) at(tape, g, layout.logits_grad)[k] = logits[k];
    }
  }

  // The part of image g of the chunk in a tape, and panel `group` of a plane there.
  T* at(T* in, int64_t g, int64_t offset) const { return in + g * (layout.tape / sizeof(T)) + offset; }
  V* panel(T* in, int64_t g, int64_t offset, int64_t group, int64_t plane) const {
    return reinterpret_cast<V*>(at(in, g, offset) + group * plane * L);
  }
  const Operand* filter(const void* set, int64_t offset) const { return layout.operands(set) + offset; }
  const T* value(void* set, int64_t offset) const { return layout.values(set) + offset; }

  Affine<T> affine(const LayerLayout& at, int64_t group, bool tangent) const {
    Affine<T> out;
    out.g = load(value(filters, at.norm) + group * L), out.b = load(value(filters, at.norm + at.out) + group * L);
    if (tangent) {
      out.g_t = load(value(filters_t, at.norm) + group * L);
      out.b_t = load(value(filters_t, at.norm + at.out) + group * L);
    }
    return out;
  }
  void add_norm(const LayerLayout& at, int64_t group, const AffineGradient<T>& grad) {
    if (sums == nullptr) return;
    T* const g = sums + at.sum_norm + group * L;
    T* const b = g + at.out;
    store(g, load(g) + grad.g);
    store(b, load(b) + grad.b);
  }
};

}  // namespace
}  // namespace pydistill
