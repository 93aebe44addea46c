// Registers of elements whose storage type differs from the compute type.
#pragma once

#include "cpu_vocabulary.h"

namespace pydistill {
namespace {

typedef uint32_t FloatBits __attribute__((vector_size(kRegisterBytes)));
typedef uint16_t HalfBits __attribute__((vector_size(kRegisterBytes / 2), aligned(2), may_alias));

#if defined(__AVX512F__)
template <class S>
PYDISTILL_INLINE __m512 widened_lanes(__m256i halves) {
  if constexpr (__is_same(S, F16)) return _mm512_maskz_cvtph_ps(0xFFFF, halves);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));  // the compiler takes two registers
}
#endif

// A register of adjacent elements of storage type S, and back; lanes are converted as by widen and narrow.
template <class T, class S>
PYDISTILL_INLINE Register<T> widened_register(const S* p) {
  if constexpr (sizeof(S) == sizeof(T)) {
    return load_register(p);
  } else {
#if defined(__AVX512F__)
    return widened_lanes<S>(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
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
#if defined(__AVX512BF16__)
    if constexpr (__is_same(S, Bf16)) {  // it treats numbers below 2^-126 as zero
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(v));
      return;
    }
#endif
    constexpr int lanes = Registers<T>::lanes;
    if constexpr (__is_same(S, Bf16)) {
      const Register<T> rounded = rounded_to_bf16(v);
      FloatBits bits;
      __builtin_memcpy(&bits, &rounded, sizeof(v));
      bits = v == v ? bits >> 16 : FloatBits{} + 0x7FC0u;
#if defined(__AVX512F__)
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16((__m512i)bits));
#else
      *reinterpret_cast<HalfBits*>(p) = __builtin_convertvector(bits, HalfBits);
#endif
      return;
    }
    T each[lanes];
    __builtin_memcpy(each, &v, sizeof(v));
    for (int i = 0; i < lanes; ++i) narrow(each[i], p[i]);
  }
}

// For what takes one or two masked instructions, or else a loop that is not worth inlining for every pixel of a tile.
#if defined(__AVX512BW__)
#define PYDISTILL_MASKED PYDISTILL_INLINE
#else
#define PYDISTILL_MASKED __attribute__((noinline, unused))
#endif

// The same for `count` elements, fewer than a register's lanes: other lanes are zero when loading and skipped when
// storing, and no other memory is touched.
template <class T, class S>
PYDISTILL_MASKED Register<T> widened_register(const S* p, int64_t count) {
#if defined(__AVX512F__)
  const uint32_t mask = (uint32_t{1} << count) - 1;
  if constexpr (__is_same(S, float)) return _mm512_maskz_loadu_ps(static_cast<__mmask16>(mask), p);
  if constexpr (__is_same(S, double)) return _mm512_maskz_loadu_pd(static_cast<__mmask8>(mask), p);
  if constexpr (sizeof(S) == 2) return widened_lanes<S>(_mm256_maskz_loadu_epi16(static_cast<__mmask16>(mask), p));
#endif
  T each[Registers<T>::lanes] = {};
  for (int64_t i = 0; i < count; ++i) each[i] = widen(p[i]);
  return load_register(each);
}

template <class T, class S>
PYDISTILL_MASKED void store_narrowed_register(S* p, Register<T> v, int64_t count) {
  alignas(kRegisterBytes) S each[Registers<T>::lanes];
  store_narrowed_register<T>(each, v);
#if defined(__AVX512F__)
  if constexpr (sizeof(S) == 2) {
    const uint32_t mask = (uint32_t{1} << count) - 1;
    _mm256_mask_storeu_epi16(reinterpret_cast<void*>(p), static_cast<__mmask16>(mask),
                             _mm256_load_si256(reinterpret_cast<const __m256i*>(each)));
    return;
  }
#endif
  for (int64_t i = 0; i < count; ++i) p[i] = each[i];
}

// Adjacent pairs of bfloat16, in memory order; `count` elements of them, the others zero. Each pair's elements as
// float: neither has to move to another lane.
PYDISTILL_INLINE FloatBits load_bf16_pairs(const Bf16* p) {
  typedef FloatBits Unaligned __attribute__((aligned(2), may_alias));
  return *reinterpret_cast<const Unaligned*>(p);
}
PYDISTILL_MASKED FloatBits load_bf16_pairs(const Bf16* p, int64_t count) {
#if defined(__AVX512BW__)
  return (FloatBits)_mm512_maskz_loadu_epi16(static_cast<__mmask32>((uint64_t{1} << count) - 1), p);
#else
  Bf16 each[2 * Registers<float>::lanes] = {};
  for (int64_t i = 0; i < count; ++i) each[i] = p[i];
  return load_bf16_pairs(each);
#endif
}
PYDISTILL_INLINE Register<float> even_of_pairs(FloatBits pairs) { return (Register<float>)(pairs << 16); }
PYDISTILL_INLINE Register<float> odd_of_pairs(FloatBits pairs) { return (Register<float>)(pairs & 0xFFFF0000u); }

// Elements in two places, `half` in each: the register of those from c on, or of their pairs; zero past the end, and
// skipped when storing.
PYDISTILL_INLINE uint32_t lowest_bits(int64_t count) {
  return count <= 0 ? 0 : count >= 32 ? ~uint32_t{0} : (uint32_t{1} << count) - 1;
}

template <class T, class S>
PYDISTILL_MASKED Register<T> widened_register_of_two(const S* first, const S* second, int64_t half, int64_t c) {
#if defined(__AVX512BW__)
  const uint32_t low = lowest_bits(half - c), high = lowest_bits(2 * half - c) & ~low;
  const __mmask16 in_first = static_cast<__mmask16>(low), in_second = static_cast<__mmask16>(high);
  first += c, second += c - half;
  if constexpr (__is_same(S, float))
    return _mm512_mask_loadu_ps(_mm512_maskz_loadu_ps(in_first, first), in_second, second);
  if constexpr (__is_same(S, double))
    return _mm512_mask_loadu_pd(_mm512_maskz_loadu_pd(static_cast<__mmask8>(low), first), static_cast<__mmask8>(high),
                                second);
  if constexpr (sizeof(S) == 2)
    return widened_lanes<S>(_mm256_mask_loadu_epi16(_mm256_maskz_loadu_epi16(in_first, first), in_second, second));
#endif
  T each[Registers<T>::lanes] = {};
  for (int64_t i = 0; i < Registers<T>::lanes && c + i < 2 * half; ++i)
    each[i] = widen(c + i < half ? first[c + i] : second[c + i - half]);
  return load_register(each);
}

PYDISTILL_MASKED FloatBits load_bf16_pairs_of_two(const Bf16* first, const Bf16* second, int64_t half, int64_t c) {
#if defined(__AVX512BW__)
  const uint32_t low = lowest_bits(half - c), high = lowest_bits(2 * half - c) & ~low;
  return (FloatBits)_mm512_mask_loadu_epi16(_mm512_maskz_loadu_epi16(low, first + c), high, second + c - half);
#endif
  Bf16 each[2 * Registers<float>::lanes] = {};
  for (int64_t i = 0; i < 2 * Registers<float>::lanes && c + i < 2 * half; ++i)
    each[i] = c + i < half ? first[c + i] : second[c + i - half];
  return load_bf16_pairs(each);
}

template <class T, class S>
PYDISTILL_MASKED void store_narrowed_register_to_two(S* first, S* second, int64_t half, int64_t c, Register<T> v) {
  alignas(kRegisterBytes) S each[Registers<T>::lanes];
  store_narrowed_register<T>(each, v);
#if defined(__AVX512BW__)
  if constexpr (sizeof(S) == 2) {
    const uint32_t low = lowest_bits(half - c), high = lowest_bits(2 * half - c) & ~low;
    const __m256i all = _mm256_load_si256(reinterpret_cast<const __m256i*>(each));
    _mm256_mask_storeu_epi16(first + c, static_cast<__mmask16>(low), all);
    _mm256_mask_storeu_epi16(second + c - half, static_cast<__mmask16>(high), all);
    return;
  }
#endif
  for (int64_t i = 0; i < Registers<T>::lanes && c + i < 2 * half; ++i)
    (c + i < half ? first[c + i] : second[c + i - half]) = each[i];
}

}  // namespace
}  // namespace pydistill
