// Products of 16-bit integers, two by two: an int32_t lane holds a pair of neighbours, and a product adds both to a sum
// of 32 bits, exactly. An instruction makes twice as many of them as of float products, with 15 bits where bf16 has 8.
//
// No sum can overflow where a left vector's norm is at most kLeftNorm and a right one's kRightNorm (Cauchy-Schwarz).
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

// Two registers of floats within +-32767, rounded to nearest even, as neighbouring int16.
PYDISTILL_INLINE void store_rounded_registers(int16_t* to, Register<float> low, Register<float> high) {
#if defined(__AVX512F__)
  const __m512i order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);  // packing goes by quarters of a register
  const __m512i packed = _mm512_packs_epi32(_mm512_cvtps_epi32((__m512)low), _mm512_cvtps_epi32((__m512)high));
  _mm512_storeu_si512(to, _mm512_permutexvar_epi64(order, packed));
#elif defined(__AVX2__)
  const __m256i packed = _mm256_packs_epi32(_mm256_cvtps_epi32((__m256)low), _mm256_cvtps_epi32((__m256)high));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_permute4x64_epi64(packed, 0xD8));
#elif defined(__SSE2__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                   _mm_packs_epi32(_mm_cvtps_epi32((__m128)low), _mm_cvtps_epi32((__m128)high)));
#else
  constexpr int lanes = Registers<float>::lanes;
  for (int i = 0; i < lanes; ++i) {
    to[i] = low[i] == low[i] ? static_cast<int16_t>(__builtin_rintf(low[i])) : int16_t{0};
    to[lanes + i] = high[i] == high[i] ? static_cast<int16_t>(__builtin_rintf(high[i])) : int16_t{0};
  }
#endif
}

}  // namespace
}  // namespace pydistill
