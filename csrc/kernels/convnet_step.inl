// CPU body: see convnet_step.h for what is computed and in what order.
//
// Names: `conv` is a convolution's output before the norm, `pooled` a block's output; _t is the derivative along the
// direction, grad_ that of the loss, grad_..._t both. Panels are those of cpu_vocabulary.h; channel counts are padded
// to whole panels, and the padding stays zero all the way: its filters and affine parameters are.
#include "convnet_filters.h"
#include "convnet_reduction.h"
#include "convnet_slot.h"
#include "convnet_variants.h"

namespace pydistill {
namespace {

// Calls visit with the types that a step is computed in: each file has one kind of them.
template <class Visit>
PYDISTILL_INLINE auto with_types([[maybe_unused]] const Step& step, Visit visit) {
#if defined(PYDISTILL_FLOAT64)
  return visit(double(), Native<double, false>());
#elif defined(PYDISTILL_ROUNDED)
  return visit(float(), Native<float, true>());
#elif defined(__AMX_BF16__)
  return visit(float(), Amx());
#elif defined(__AVX512BF16__)
  return visit(float(), Bf16Pairs());
#else
  return visit(float(), Native<float, false>());
#endif
}

ConvNetStepSizes sizes(const Step& step) {
  return with_types(step, [&](auto t, auto a) {
    using T = decltype(t);
    using A = decltype(a);
    const Layout<T, A> layout(step);
    Arena arena{nullptr};
    Workspace<T, A>(step, layout, arena);
    return ConvNetStepSizes{layout.filters, layout.partials, arena.used, layout.stored, layout.exchange, layout.tape};
  });
}

template <template <class, class> class Part>
int64_t units(const Step& step) {
  return with_types(step, [&](auto t, auto a) { return Part<decltype(t), decltype(a)>(step).units(); });
}

template <template <class, class> class Part>
void run_units(const Step& step, int64_t begin, int64_t end) {
  with_types(step, [&](auto t, auto a) {
    const Part<decltype(t), decltype(a)> part(step);
    for (int64_t unit = begin; unit < end; ++unit) part.run(unit);
  });
}

int64_t passes(const Step& step) { return step.fused() ? 1 : Program(step).passes; }

void run_slots(const Step& step, int64_t pass, int64_t begin, int64_t end, void* scratch) {
#if defined(__AMX_BF16__)
  const TileConfig tiles;
  _tile_loadconfig(&tiles);
#endif
  with_types(step, [&](auto t, auto a) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t e = unit / step.slots, slot = unit % step.slots;
      if (step.fused())
        Slot<decltype(t), decltype(a)>(step, e, slot, scratch).run();
      else
        VariantSlot<decltype(t), decltype(a)>(step, e, slot, scratch).run(pass);
    }
  });
#if defined(__AMX_BF16__)
  _tile_release();
#endif
}

}  // namespace

extern const ConvNetStepKernel PYDISTILL_KERNEL;
const ConvNetStepKernel PYDISTILL_KERNEL = {sizes,     units<Filters>,   run_units<Filters>,  passes,
                                            run_slots, units<Reduction>, run_units<Reduction>};

}  // namespace pydistill
