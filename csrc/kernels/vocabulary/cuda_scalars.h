// The element types that tensors have, in CUDA kernels: part of cuda_vocabulary.h.
#pragma once

#include <type_traits>

#include "../../common/scalar.h"

namespace pydistill {

// What sums over elements of type T are kept in.
template <class T>
using Accumulator = std::conditional_t<std::is_same_v<T, double>, double, float>;

__device__ __forceinline__ double widen(double value) { return value; }
__device__ __forceinline__ float widen(float value) { return value; }
__device__ __forceinline__ float widen(__half value) { return __half2float(value); }
__device__ __forceinline__ float widen(__nv_bfloat16 value) { return __bfloat162float(value); }

template <class T>
__device__ __forceinline__ T narrow(Accumulator<T> value) {
  if constexpr (std::is_same_v<T, __half>) {
    return __float2half(value);
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16(value);
  } else {
    return value;
  }
}

// Calls visit with a zero of the type that `scalar` names.
template <class Visit>
void with_scalar(Scalar scalar, Visit visit) {
  switch (scalar) {
    case Scalar::f32:
      return visit(float());
    case Scalar::f64:
      return visit(double());
    case Scalar::bf16:
      return visit(__nv_bfloat16());
    case Scalar::f16:
      return visit(__half());
  }
}

}  // namespace pydistill
