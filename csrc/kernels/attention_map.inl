// CPU body: see attention_map.h for what is computed.
#include "attention_map.h"
#include "vocabulary/cpu_vocabulary.h"

namespace pydistill {
namespace {

// The order-th derivative of |x|^p, with `power` the function a^(p - order).
template <class T, class Power>
struct Derivative {
  Power power;
  T coefficient = 1;
  bool odd, original;

  Derivative(const AttentionMap& call, Power power) : power(power), odd(call.order % 2), original(call.order == 0) {
    for (int64_t k = 0; k < call.order; ++k) coefficient *= T(call.power - static_cast<double>(k));
  }

  PYDISTILL_INLINE Wide<T> operator()(Wide<T> x) const {
    const Wide<T> magnitude = choose_below_zero(x, Wide<T>{} - x, x);
    if (original) return power(magnitude);
    const Wide<T> value = where_on(magnitude, power(magnitude) * coefficient);
    return odd ? choose_below_zero(x, Wide<T>{} - value, value) : value;
  }

 private:
  PYDISTILL_INLINE static Wide<T> choose_below_zero(Wide<T> x, Wide<T> below, Wide<T> otherwise) {
    const Register<T> zero{};
    for (int i = 0; i < Wide<T>::parts; ++i) otherwise.part[i] = x.part[i] < zero ? below.part[i] : otherwise.part[i];
    return otherwise;
  }
};

// Up to L adjacent values, padded with zeros; and back.
template <class T, class S>
PYDISTILL_INLINE Wide<T> read(const S* from, int64_t count) {
  if (count >= Lanes<T>::count) return wide_of<T>(load_widened<T>(from));
  Vec<T> v{};
  for (int64_t i = 0; i < count; ++i) v[i] = widen(from[i]);
  return wide_of<T>(v);
}
template <class T, class S>
PYDISTILL_INLINE void write(S* to, Wide<T> value, int64_t count) {
  const Vec<T> v = vector_of(value);
  if (count >= Lanes<T>::count) return store_narrowed<T>(to, v);
  for (int64_t i = 0; i < count; ++i) narrow(v[i], to[i]);
}

template <class T, class S, class Power>
__attribute__((noinline)) void reduce(const AttentionMap& call, Power power, int64_t n, T* partial) {
  constexpr int64_t L = Lanes<T>::count;
  constexpr int64_t kBlock = 16;  // rows that are summed separately: rounding errors stay small
  const Derivative<T, Power> derivative(call, power);
  const int64_t inner = call.inner, outer = call.outer;
  const S* x = static_cast<const S*>(call.x) + n * outer * inner;
  const S* factor = call.factor ? static_cast<const S*>(call.factor) + n * outer * inner : nullptr;
  T* const over_outer = call.over_outer ? static_cast<T*>(call.over_outer) + n * inner : nullptr;
  T* const over_inner = call.over_inner ? static_cast<T*>(call.over_inner) + n * outer : nullptr;
  if (over_outer)
    for (int64_t i = 0; i < inner; ++i) over_outer[i] = 0;
  for (int64_t first = 0; first < outer; first += kBlock) {
    const int64_t last = first + kBlock < outer ? first + kBlock : outer;
    for (int64_t row = first; row < last; ++row) {
      Wide<T> sum{};
      for (int64_t i = 0; i < inner; i += L) {
        Wide<T> value = derivative(read<T>(x + row * inner + i, inner - i));
        if (factor) value = value * read<T>(factor + row * inner + i, inner - i);
        sum += value;
        if (over_outer) {
          Wide<T>* const to = reinterpret_cast<Wide<T>*>(partial + i);
          *to = row == first ? value : *to + value;
        }
      }
      if (over_inner) over_inner[row] = lane_sum(reinterpret_cast<const T*>(&sum));
    }
    if (over_outer)
      for (int64_t i = 0; i < inner; ++i) over_outer[i] += partial[i];
  }
}

template <class T, class S, class Power>
__attribute__((noinline)) void spread(const AttentionMap& call, Power power, int64_t n) {
  constexpr int64_t L = Lanes<T>::count;
  const Derivative<T, Power> derivative(call, power);
  const int64_t inner = call.inner, outer = call.outer;
  const S* x = static_cast<const S*>(call.x) + n * outer * inner;
  const S* factor = call.factor ? static_cast<const S*>(call.factor) + n * outer * inner : nullptr;
  const T* over_outer = call.over_outer ? static_cast<const T*>(call.over_outer) + n * inner : nullptr;
  const T* over_inner = call.over_inner ? static_cast<const T*>(call.over_inner) + n * outer : nullptr;
  S* out = static_cast<S*>(call.out) + n * outer * inner;
  for (int64_t row = 0; row < outer; ++row) {
    const Wide<T> of_row = Wide<T>{} + (over_inner ? over_inner[row] : T(0));
    for (int64_t i = 0; i < inner; i += L) {
      const int64_t at = row * inner + i;
      Wide<T> grad = of_row;
      if (over_outer) grad += read<T>(over_outer + i, inner - i);
      Wide<T> value = derivative(read<T>(x + at, inner - i)) * grad;
      if (factor) value = value * read<T>(factor + at, inner - i);
      write(out + at, value, inner - i);
    }
  }
}

template <class T, class S>
void run_samples(const AttentionMap& call, int64_t begin, int64_t end, void* scratch) {
  with_power(T(call.power - static_cast<double>(call.order)), [&](auto power) {
    for (int64_t n = begin; n < end; ++n)
      call.adjoint ? spread<T, S>(call, power, n) : reduce<T, S>(call, power, n, static_cast<T*>(scratch));
  });
}

}  // namespace

// `scratch` holds `inner` values plus 64 bytes, 64-byte aligned.
void PYDISTILL_KERNEL(const AttentionMap& call, int64_t begin, int64_t end, void* scratch) {
  with_types(call.scalar, [&](auto t, auto s)
                              PYDISTILL_LAMBDA { run_samples<decltype(t), decltype(s)>(call, begin, end, scratch); });
}

}  // namespace pydistill
