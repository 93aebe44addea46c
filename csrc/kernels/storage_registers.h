// Registers of elements that are stored in another type than they are computed in.
#pragma once

#include "cpu_vocabulary.h"

namespace pydistill {
namespace {

typedef uint32_t FloatBits __attribute__((vector_size(kRegisterBytes)));
typedef uint16_t HalfBits __attribute__((vector_size(kRegisterBytes / 2), aligned(2)));

// A register of neighbouring elements of storage type S, and back; lanes are what widen and narrow make of them.
template <class T, class S>
PYDISTILL_INLINE Register<T> widened_register(const S* p) {
  if constexpr (sizeof(S) == sizeof(T)) {
    return load_register(p);
  } else {
#if defined(__AVX512F__)
    if constexpr (__is_same(S, F16))
      return _mm512_maskz_cvtph_ps(0xFFFF, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__F16C__)
    if constexpr (__is_same(S, F16)) return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#endif
    constexpr int lanes = Registers<T>::lanes;
    if constexpr (__is_same(S, Bf16)) {
      const FloatBits bits = __builtin_convertvector(*reinterpret_cast<const HalfBits*>(p), FloatBits) << 16;
      Register<T> v;
      __builtin_memcpy(&v, &bits, sizeof(v));
      return v;
    }
    T each[lanes];
    for (int i = 0; i < lanes; ++i) each[i] = widen(p[i]);
    return load_register(each);
  }
}

template <class T, class S>
PYDISTILL_INLINE void store_narrowed_register(S* p, Register<T> v) {
  if constexpr (sizeof(S) == sizeof(T)) {
    *reinterpret_cast<typename Registers<T>::Unaligned*>(p) = v;
  } else {
#if defined(__AVX512F__)
    if constexpr (__is_same(S, F16)) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_maskz_cvtps_ph(0xFFFF, v, _MM_FROUND_TO_NEAREST_INT));
      return;
    }
#elif defined(__F16C__)
    if constexpr (__is_same(S, F16)) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
      return;
    }
#endif
    constexpr int lanes = Registers<T>::lanes;
    if constexpr (__is_same(S, Bf16)) {
      const Register<T> rounded = rounded_to_bf16(v);
      FloatBits bits;
      __builtin_memcpy(&bits, &rounded, sizeof(v));
      bits = v == v ? bits >> 16 : FloatBits{} + 0x7FC0u;
      *reinterpret_cast<HalfBits*>(p) = __builtin_convertvector(bits, HalfBits);
      return;
    }
    T each[lanes];
    __builtin_memcpy(each, &v, sizeof(v));
    for (int i = 0; i < lanes; ++i) narrow(each[i], p[i]);
  }
}

}  // namespace
}  // namespace pydistill
