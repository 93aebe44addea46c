// Products of 16-bit integers, in pairs: an int32_t lane holds a pair of adjacent ones, and a product adds both to a
// 32-bit sum, exactly. An instruction does twice as many of them as float products, with 15 bits where bf16 has 8.
//
// No sum can overflow if a left vector's norm is at most kLeftNorm and a right one's kRightNorm (Cauchy-Schwarz).
#pragma once

#include "cpu_vocabulary.h"

namespace pydistill {
namespace {

constexpr float kLeftNorm = 32767, kRightNorm = 65535;  // their product is below 2^31; no number is above 32767

#if defined(__AVX512F__)
PYDISTILL_INLINE Register<int32_t> splat(const int32_t* p) { return (Register<int32_t>)_mm512_set1_epi32(*p); }
PYDISTILL_INLINE Register<int32_t> multiply_add(Register<int32_t> a, Register<int32_t> b, Register<int32_t> c) {
#if defined(__AVX512VNNI__)
  return (Register<int32_t>)_mm512_dpwssd_epi32((__m512i)c, (__m512i)a, (__m512i)b);
#else
  return c + (Register<int32_t>)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#endif
}
#elif defined(__AVX2__)
PYDISTILL_INLINE Register<int32_t> splat(const int32_t* p) { return (Register<int32_t>)_mm256_set1_epi32(*p); }
PYDISTILL_INLINE Register<int32_t> multiply_add(Register<int32_t> a, Register<int32_t> b, Register<int32_t> c) {
  return c + (Register<int32_t>)_mm256_madd_epi16((__m256i)a, (__m256i)b);
}
#else
PYDISTILL_INLINE Register<int32_t> splat(const int32_t* p) { return Register<int32_t>{} + *p; }
PYDISTILL_INLINE Register<int32_t> multiply_add(Register<int32_t> a, Register<int32_t> b, Register<int32_t> c) {
#if defined(__SSE2__)
  return c + (Register<int32_t>)_mm_madd_epi16((__m128i)a, (__m128i)b);
#else
  return c + (a >> 16) * (b >> 16) + ((a << 16) >> 16) * ((b << 16) >> 16);
#endif
}
#endif

PYDISTILL_INLINE Register<int32_t> rounded_to_integers(
    Register<float> v) {  // to nearest even; NaN becomes a value with zero in its lower half
#if defined(__AVX512F__)
  return (Register<int32_t>)_mm512_cvtps_epi32((__m512)v);
#elif defined(__AVX2__)
  return (Register<int32_t>)_mm256_cvtps_epi32((__m256)v);
#elif defined(__SSE2__)
  return (Register<int32_t>)_mm_cvtps_epi32((__m128)v);
#else
  Register<int32_t> rounded;
  for (int i = 0; i < Registers<float>::lanes; ++i)
    rounded[i] = v[i] == v[i] ? static_cast<int32_t>(__builtin_rintf(v[i])) : 0;
  return rounded;
#endif
}

// Adjacent floats within +-32767, rounded; and pairs of them given as even and odd ones.
PYDISTILL_INLINE void store_rounded_register(int16_t* to, Register<float> v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16((__m512i)rounded_to_integers(v)));
#else
  typedef int16_t Halves __attribute__((vector_size(kRegisterBytes / 2), aligned(2), may_alias));
  *reinterpret_cast<Halves*>(to) = __builtin_convertvector(rounded_to_integers(v), Halves);
#endif
}
PYDISTILL_INLINE Register<int32_t> rounded_pairs(Register<float> even, Register<float> odd) {
  return (rounded_to_integers(even) & 0xFFFF) | (rounded_to_integers(odd) << 16);
}

}  // namespace
}  // namespace pydistill
