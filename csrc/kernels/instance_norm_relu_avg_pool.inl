// CPU body: packs panels, runs the block on them and unpacks; see instance_norm_relu_avg_pool.h for what is computed.
#include "instance_norm_relu_avg_pool_panel.h"

namespace pydistill {
namespace {

template <class T, Form FORM, bool POOL>
void run_unit(const InstanceNormReluAvgPool& call, int64_t n, int64_t c, int lanes, void* scratch) {
  constexpr bool TANGENT = FORM == Form::jvp || FORM == Form::backward_jvp;
  constexpr bool BACKWARD = FORM == Form::backward || FORM == Form::backward_jvp;
  const int64_t H = call.H, W = call.W, OH = POOL ? H / 2 : H, OW = POOL ? W / 2 : W;
  Panels<T> panel;
  panel.x = static_cast<Vec<T>*>(scratch);
  panel.x_t = panel.x + H * W;
  panel.grad_y = panel.x_t + H * W;
  panel.grad_y_t = panel.grad_y + OH * OW;
  panel.y = panel.grad_y_t + OH * OW;
  Affine<T> affine;
  affine.g = load_channels<T>(call.weight, c, lanes), affine.b = load_channels<T>(call.bias, c, lanes);
  pack<T>(call.scalar, call.x, n, c, lanes, H, W, panel.x);
  if constexpr (TANGENT) {
    affine.g_t = load_channels<T>(call.weight_t, c, lanes), affine.b_t = load_channels<T>(call.bias_t, c, lanes);
    pack<T>(call.scalar, call.x_t, n, c, lanes, H, W, panel.x_t);
  }
  if constexpr (BACKWARD) {
    pack<T>(call.scalar, call.grad_y, n, c, lanes, OH, OW, panel.grad_y);
    if (call.grad_y_t.data != nullptr)
      pack<T>(call.scalar, call.grad_y_t, n, c, lanes, OH, OW, panel.grad_y_t);
    else
      panel.grad_y_t = nullptr;
  }
  const AffineGradient<T> grad = run_panel<T, FORM, POOL>(H, W, T(call.eps), affine, call.relu, panel);
  if constexpr (BACKWARD) {
    unpack<T>(call.scalar, panel.x, n, c, lanes, H, W, call.grad_x);
    store_channels<T>(grad.g, call.grad_weight, n * call.C + c, lanes);
    store_channels<T>(grad.b, call.grad_bias, n * call.C + c, lanes);
  }
  if constexpr (FORM != Form::backward) unpack<T>(call.scalar, panel.y, n, c, lanes, OH, OW, call.y);
}

template <class T, Form FORM>
void run_form(const InstanceNormReluAvgPool& call, int64_t n, int64_t c, int lanes, void* scratch) {
  call.pool ? run_unit<T, FORM, true>(call, n, c, lanes, scratch)
            : run_unit<T, FORM, false>(call, n, c, lanes, scratch);
}

template <class T>
void run_units(const InstanceNormReluAvgPool& call, int64_t begin, int64_t end, void* scratch) {
  constexpr int L = Lanes<T>::count;
  const int64_t panels = (call.C + L - 1) / L;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t n = unit / panels, c = unit % panels * L;
    const int lanes = static_cast<int>(call.C - c < L ? call.C - c : L);
    switch (call.form) {
      case Form::forward:
        run_form<T, Form::forward>(call, n, c, lanes, scratch);
        break;
      case Form::backward:
        run_form<T, Form::backward>(call, n, c, lanes, scratch);
        break;
      case Form::jvp:
        run_form<T, Form::jvp>(call, n, c, lanes, scratch);
        break;
      case Form::backward_jvp:
        run_form<T, Form::backward_jvp>(call, n, c, lanes, scratch);
        break;
    }
  }
}

}  // namespace

void PYDISTILL_KERNEL(const InstanceNormReluAvgPool& call, int64_t begin, int64_t end, void* scratch) {
  with_number(call.scalar, [&](auto t) PYDISTILL_LAMBDA { run_units<decltype(t)>(call, begin, end, scratch); });
}

}  // namespace pydistill
