#include "crc32.h"

#include <array>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace pydistill {
namespace {

constexpr uint32_t kPolynomial = 0xEDB88320u;
constexpr int kTables = 8;

// a * x modulo the polynomial; bit 31 - i holds the coefficient of x^i
constexpr uint32_t times_x(uint32_t a) { return (a >> 1) ^ ((a & 1) ? kPolynomial : 0); }

constexpr uint32_t x_to_the(int n) {
  uint32_t a = 0x80000000u;
  for (int i = 0; i < n; ++i) a = times_x(a);
  return a;
}

// table[j][b]: the effect of byte b on the register j bytes later
constexpr auto kTable = [] {
  std::array<std::array<uint32_t, 256>, kTables> table{};
  for (uint32_t byte = 0; byte < 256; ++byte) {
    uint32_t a = byte;
    for (int bit = 0; bit < 8; ++bit) a = times_x(a);
    table[0][byte] = a;
  }
  for (int j = 1; j < kTables; ++j)
    for (uint32_t byte = 0; byte < 256; ++byte) {
      const uint32_t before = table[j - 1][byte];
      table[j][byte] = (before >> 8) ^ table[0][before & 255];
    }
  return table;
}();

uint32_t by_tables(const uint8_t* data, std::size_t size, uint32_t a) {
  for (; size >= kTables; data += kTables, size -= kTables) {
    uint32_t next = 0;
    for (int i = 0; i < kTables; ++i) {
      const uint8_t byte = i < 4 ? data[i] ^ static_cast<uint8_t>(a >> (8 * i)) : data[i];
      next ^= kTable[kTables - 1 - i][byte];
    }
    a = next;
  }
  for (; size > 0; ++data, --size) a = (a >> 8) ^ kTable[0][(a ^ *data) & 255];
  return a;
}

#if defined(__x86_64__)
constexpr std::size_t kFold = 64;  // bytes folded at once: four registers

// Multiplies the two halves of `a`, which are `bits` + 64 and `bits` before the end of `next`, and adds `next`. A
// product of reflected factors is reflected up to one bit, hence the shift of the constants.
template <int bits>
__attribute__((target("pclmul,sse4.1"))) __m128i fold(__m128i a, __m128i next) {
  constexpr uint64_t far = static_cast<uint64_t>(x_to_the(bits + 32)) << 1;
  constexpr uint64_t near = static_cast<uint64_t>(x_to_the(bits - 32)) << 1;
  const __m128i factors = _mm_set_epi64x(static_cast<int64_t>(near), static_cast<int64_t>(far));
  const __m128i product = _mm_xor_si128(_mm_clmulepi64_si128(a, factors, 0x00), _mm_clmulepi64_si128(a, factors, 0x11));
  return _mm_xor_si128(product, next);
}

__attribute__((target("pclmul,sse4.1"))) uint32_t by_products(const uint8_t* data, std::size_t size, uint32_t a) {
  const auto load = [&](int i) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(data + 16 * i)); };
  __m128i sums[4] = {_mm_xor_si128(load(0), _mm_cvtsi32_si128(static_cast<int>(a))), load(1), load(2), load(3)};
  for (data += kFold, size -= kFold; size >= kFold; data += kFold, size -= kFold)
    for (int i = 0; i < 4; ++i) sums[i] = fold<8 * kFold>(sums[i], load(i));
  __m128i sum = sums[0];
  for (int i = 1; i < 4; ++i) sum = fold<128>(sum, sums[i]);
  uint8_t rest[16];  // congruent to all bytes read so far
  _mm_storeu_si128(reinterpret_cast<__m128i*>(rest), sum);
  return by_tables(data, size, by_tables(rest, sizeof rest, 0));
}
#endif

}  // namespace

uint32_t crc32(const uint8_t* data, std::size_t size, uint32_t value) {
#if defined(__x86_64__)
  static const bool has_products = __builtin_cpu_supports("pclmul") && __builtin_cpu_supports("sse4.1");
  if (has_products && size >= kFold) return ~by_products(data, size, ~value);
#endif
  return ~by_tables(data, size, ~value);
}

}  // namespace pydistill
