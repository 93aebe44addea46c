// The vocabulary of CPU kernel bodies: 64-byte vectors of channels, and panels of them.
//
// A panel holds [H * W] vectors, one per position, each with the same position of L adjacent channels.
// Packing brings any layout and element type into that one form, so a kernel's arithmetic is written once. The
// vectors have the same width in every instruction set (the compiler splits them if registers are narrower), lanes
// never mix, and sums run in a fixed order: hence results are bitwise equal across instruction sets and thread counts.
//
// Everything lives in an unnamed namespace and uses nothing of the standard library: each .inl is compiled once per
// instruction set, and a symbol shared between those files could be linked from the wrong one.
#pragma once

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__x86_64__)
#include <emmintrin.h>  // SSE2; the other takes half a second in each of the baseline's files
#endif

#include <cstdint>

#include "../../common/scalar.h"

#define PYDISTILL_INLINE inline __attribute__((always_inline))
#define PYDISTILL_LAMBDA __attribute__((always_inline))

namespace pydistill {
namespace {

template <class T>
struct Lanes {
  static constexpr int count = 64 / sizeof(T);
  typedef T Vector __attribute__((vector_size(64)));
  typedef T Unaligned __attribute__((vector_size(64), aligned(sizeof(T))));
};
template <class T>
using Vec = typename Lanes<T>::Vector;

template <class T>
PYDISTILL_INLINE Vec<T> load(const T* p) {
  return *reinterpret_cast<const typename Lanes<T>::Unaligned*>(p);
}

template <class T>
PYDISTILL_INLINE void store(T* p, Vec<T> v) {
  *reinterpret_cast<typename Lanes<T>::Unaligned*>(p) = v;
}

template <class T>
PYDISTILL_INLINE Vec<T> broadcast(T value) {
  return Vec<T>{} + value;
}

PYDISTILL_INLINE float sqrt_lane(float v) { return __builtin_sqrtf(v); }
PYDISTILL_INLINE double sqrt_lane(double v) { return __builtin_sqrt(v); }
PYDISTILL_INLINE float power_lane(float v, float p) { return __builtin_powf(v, p); }
PYDISTILL_INLINE double power_lane(double v, double p) { return __builtin_pow(v, p); }

// The widest vector that is one register here.
#if defined(__AVX512F__)
constexpr int kRegisterBytes = 64;
#elif defined(__AVX2__)
constexpr int kRegisterBytes = 32;
#else
constexpr int kRegisterBytes = 16;
#endif

template <class T>
struct Registers {
  static constexpr int lanes = kRegisterBytes / sizeof(T);
  static constexpr int per_vector = 64 / kRegisterBytes;
  typedef T Type __attribute__((vector_size(kRegisterBytes)));
  typedef T Unaligned __attribute__((vector_size(kRegisterBytes), aligned(sizeof(T))));
};
template <class T>
using Register = typename Registers<T>::Type;

// One value from memory in all lanes; and a * b + c, rounded once if the instruction set can: for sums whose last bits
// may differ between instruction sets.
#if defined(__AVX512F__)
PYDISTILL_INLINE Register<float> splat(const float* p) { return _mm512_set1_ps(*p); }
PYDISTILL_INLINE Register<double> splat(const double* p) { return _mm512_set1_pd(*p); }
PYDISTILL_INLINE Register<float> multiply_add(Register<float> a, Register<float> b, Register<float> c) {
  return _mm512_fmadd_ps(a, b, c);
}
PYDISTILL_INLINE Register<double> multiply_add(Register<double> a, Register<double> b, Register<double> c) {
  return _mm512_fmadd_pd(a, b, c);
}
#elif defined(__AVX2__)
PYDISTILL_INLINE Register<float> splat(const float* p) { return _mm256_set1_ps(*p); }
PYDISTILL_INLINE Register<double> splat(const double* p) { return _mm256_set1_pd(*p); }
PYDISTILL_INLINE Register<float> multiply_add(Register<float> a, Register<float> b, Register<float> c) {
  return _mm256_fmadd_ps(a, b, c);
}
PYDISTILL_INLINE Register<double> multiply_add(Register<double> a, Register<double> b, Register<double> c) {
  return _mm256_fmadd_pd(a, b, c);
}
#else
template <class T>
PYDISTILL_INLINE Register<T> splat(const T* p) {
  return Register<T>{} + *p;
}
template <class R>
PYDISTILL_INLINE R multiply_add(R a, R b, R c) {
  return a * b + c;
}
#endif

// Loads and stores stay on their side of it. In a long unrolled body GCC moves all loads to the front and then runs
// out of registers.
PYDISTILL_INLINE void in_order() { asm volatile("" ::: "memory"); }

template <class T>
PYDISTILL_INLINE Register<T> load_register(const T* p) {
  return *reinterpret_cast<const typename Registers<T>::Unaligned*>(p);
}

// A 64-byte vector as the registers that it fills. For vectors wider than a register the compiler compares lane by lane
// and keeps temporaries in memory; a loop over a panel is several times faster on these. Lanes compute the same.
template <class T>
struct Wide {
  static constexpr int parts = Registers<T>::per_vector;
  Register<T> part[parts];
};

// A panel is an array of either form.
template <class T>
PYDISTILL_INLINE Wide<T>* wide(Vec<T>* panel) {
  return reinterpret_cast<Wide<T>*>(panel);
}
template <class T>
PYDISTILL_INLINE Wide<T> wide_of(Vec<T> v) {
  Wide<T> out;
  __builtin_memcpy(&out, &v, 64);
  return out;
}
template <class T>
PYDISTILL_INLINE Vec<T> vector_of(Wide<T> v) {
  Vec<T> out;
  __builtin_memcpy(&out, &v, 64);
  return out;
}

#define PYDISTILL_WIDE_OPERATOR(OP)                                              \
  template <class T>                                                             \
  PYDISTILL_INLINE Wide<T> operator OP(Wide<T> a, Wide<T> b) {                   \
    for (int i = 0; i < Wide<T>::parts; ++i) a.part[i] = a.part[i] OP b.part[i]; \
    return a;                                                                    \
  }                                                                              \
  template <class T>                                                             \
  PYDISTILL_INLINE Wide<T> operator OP(Wide<T> a, T b) {                         \
    for (int i = 0; i < Wide<T>::parts; ++i) a.part[i] = a.part[i] OP b;         \
    return a;                                                                    \
  }                                                                              \
  template <class T, class B>                                                    \
  PYDISTILL_INLINE Wide<T>& operator OP## = (Wide<T> & a, B b) {                 \
    return a = a OP b;                                                           \
  }
PYDISTILL_WIDE_OPERATOR(+)
PYDISTILL_WIDE_OPERATOR(-)
PYDISTILL_WIDE_OPERATOR(*)
PYDISTILL_WIDE_OPERATOR(/)
#undef PYDISTILL_WIDE_OPERATOR

// `value` where `argument` is above zero or NaN, zero elsewhere: what a ReLU lets through, as in torch. All of it if
// `floor` is NaN.
template <class T>
PYDISTILL_INLINE Wide<T> where_on(Wide<T> argument, Wide<T> value, Wide<T> floor = {}) {
  for (int i = 0; i < Wide<T>::parts; ++i) {
    const Register<T> zero{};
    value.part[i] = argument.part[i] <= floor.part[i] ? zero : value.part[i];
  }
  return value;
}

// a^p of a >= 0 as a function object: whole powers by products.
template <class T, int P>
struct WholePower {
  PYDISTILL_INLINE Wide<T> operator()(Wide<T> a) const {
    static_assert(P >= 0 && P <= 4);
    if constexpr (P == 0) return Wide<T>{} + T(1);
    if constexpr (P == 1) return a;
    if constexpr (P == 2) return a * a;
    if constexpr (P == 3) return a * a * a;
    if constexpr (P == 4) return (a * a) * (a * a);
  }
};
template <class T>
struct AnyPower {
  T p;
  PYDISTILL_INLINE Wide<T> operator()(Wide<T> a) const {
    T lanes[Lanes<T>::count];
    __builtin_memcpy(lanes, &a, 64);
    for (T& lane : lanes) lane = power_lane(lane, p);
    __builtin_memcpy(&a, lanes, 64);
    return a;
  }
};

// Calls visit with the function a^p, chosen once and not for every element.
template <class T, class Visit>
PYDISTILL_INLINE void with_power(T p, Visit visit) {
  if (p == T(0)) return visit(WholePower<T, 0>());
  if (p == T(1)) return visit(WholePower<T, 1>());
  if (p == T(2)) return visit(WholePower<T, 2>());
  if (p == T(3)) return visit(WholePower<T, 3>());
  if (p == T(4)) return visit(WholePower<T, 4>());
  visit(AnyPower<T>{p});
}

// The sum of the lanes, in a tree of fixed order.
template <class T>
PYDISTILL_INLINE T lane_sum(const T* lanes) {
  T sum[Lanes<T>::count / 2];
#pragma GCC unroll 8
  for (int i = 0; i < Lanes<T>::count / 2; ++i) sum[i] = lanes[i] + lanes[i + Lanes<T>::count / 2];
#pragma GCC unroll 4
  for (int n = Lanes<T>::count / 4; n > 0; n /= 2)
#pragma GCC unroll 4
    for (int i = 0; i < n; ++i) sum[i] += sum[i + n];
  return sum[0];
}

template <class T>
PYDISTILL_INLINE Vec<T> reciprocal_sqrt(Vec<T> v) {  // correctly rounded root and quotient, unlike rsqrt instructions
  for (int i = 0; i < Lanes<T>::count; ++i) v[i] = T(1) / sqrt_lane(v[i]);
  return v;
}

// e^x to about one unit in the last place, in operations that every instruction set rounds alike, and without branches
// so that loops over it are vectorised: x = n ln 2 + r, and e^r by the polynomial of Cephes' expf. NaN stays NaN.
PYDISTILL_INLINE float exp_lane(float x) {
  x = x < -104.0f ? -104.0f : x > 89.0f ? 89.0f : x;  // already give 0 and infinity
  const float magic = 12582912.0f;                    // 1.5 * 2^23: adding to it rounds to an integer
  const float shifted = x * 1.44269504f + magic, n = shifted - magic;
  int32_t bits, magic_bits;
  __builtin_memcpy(&bits, &shifted, 4);
  __builtin_memcpy(&magic_bits, &magic, 4);
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float y = 1.9875691500e-4f;
  y = y * r + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = (y * (r * r) + r) + 1.0f;
  // 2^n as two factors: one alone would overflow or lose the subnormal numbers
  const uint32_t whole = static_cast<uint32_t>(bits) - static_cast<uint32_t>(magic_bits);
  const uint32_t half = static_cast<uint32_t>(static_cast<int32_t>(whole) >> 1);
  const uint32_t first = (half + 127u) << 23, second = (whole - half + 127u) << 23;
  float a, b;
  __builtin_memcpy(&a, &first, 4);
  __builtin_memcpy(&b, &second, 4);
  return y * a * b;
}
PYDISTILL_INLINE double exp_lane(double x) { return __builtin_exp(x); }
PYDISTILL_INLINE float log_lane(float x) { return __builtin_logf(x); }  // libm's, whatever the instruction set
PYDISTILL_INLINE double log_lane(double x) { return __builtin_log(x); }

// A sum over H rows of W vectors, each row in four interleaved partial sums: independent additions for the pipeline
// and a rounding error that grows with W/4 + H, not H * W. `term(position, partial)` adds
// a position's terms to one of them.
template <class V, int K, class Term>
PYDISTILL_INLINE void sum_positions(int64_t H, int64_t W, V (&total)[K], Term term) {
  for (int k = 0; k < K; ++k) total[k] = V{};
  for (int64_t h = 0; h < H; ++h) {
    V part[4][K] = {};
    const int64_t row = h * W;
    int64_t w = 0;
    for (; w + 4 <= W; w += 4)
      for (int u = 0; u < 4; ++u) term(row + w + u, part[u]);
    for (; w < W; ++w) term(row + w, part[0]);
    for (int k = 0; k < K; ++k) total[k] += (part[0][k] + part[1][k]) + (part[2][k] + part[3][k]);
  }
}

// Storage types. bf16 and fp16 are only ever stored: arithmetic is in fp32.
struct Bf16 {
  uint16_t bits;
};
using F16 = _Float16;

// Calls visit with a number of the type that is computed in, float64 or float32; with_types also with one of the type
// that is stored. Kernels in float64, which gradients are tested in, end at AVX2, as best_of knows: there with AVX-512
// they would be half of the compilation.
#if defined(__AVX512F__)
constexpr bool kFloat64 = false;
#else
constexpr bool kFloat64 = true;
#endif
template <class Visit>
PYDISTILL_INLINE void with_number(Scalar scalar, Visit visit) {
  if constexpr (kFloat64)
    if (scalar == Scalar::f64) return visit(double());
  visit(float());
}
template <class Visit>
PYDISTILL_INLINE void with_types(Scalar scalar, Visit visit) {
  if constexpr (kFloat64)
    if (scalar == Scalar::f64) return visit(double(), double());
  if (scalar == Scalar::f32) visit(float(), float());
  if (scalar == Scalar::bf16) visit(float(), Bf16());
  if (scalar == Scalar::f16) visit(float(), F16());
}

PYDISTILL_INLINE float widen(float v) { return v; }
PYDISTILL_INLINE double widen(double v) { return v; }
PYDISTILL_INLINE float widen(F16 v) { return static_cast<float>(v); }
PYDISTILL_INLINE float widen(Bf16 v) {
  const uint32_t bits = static_cast<uint32_t>(v.bits) << 16;
  float out;
  __builtin_memcpy(&out, &bits, 4);
  return out;
}

PYDISTILL_INLINE void narrow(float v, float& out) { out = v; }
PYDISTILL_INLINE void narrow(double v, double& out) { out = v; }
PYDISTILL_INLINE void narrow(float v, F16& out) { out = static_cast<F16>(v); }
PYDISTILL_INLINE void narrow(float v, Bf16& out) {  // round to nearest even; NaN stays NaN
  uint32_t bits;
  __builtin_memcpy(&bits, &v, 4);
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  out.bits = static_cast<uint16_t>(v == v ? rounded : 0x7FC0u);
}

// Each lane after narrowing to bfloat16 and widening again.
PYDISTILL_INLINE Register<float> rounded_to_bf16(Register<float> v) {
  typedef uint32_t Bits __attribute__((vector_size(kRegisterBytes)));
  Bits bits;
  __builtin_memcpy(&bits, &v, sizeof(v));
  bits = (bits + 0x7FFFu + ((bits >> 16) & 1u)) & 0xFFFF0000u;
  Register<float> rounded;
  __builtin_memcpy(&rounded, &bits, sizeof(v));
  return v == v ? rounded : v;  // NaN stays NaN
}

// L adjacent elements of storage type S as one vector of T, and back.
template <class T, class S>
PYDISTILL_INLINE Vec<T> load_widened(const S* p) {
  Vec<T> v;
  for (int i = 0; i < Lanes<T>::count; ++i) v[i] = widen(p[i]);
  return v;
}
template <>
PYDISTILL_INLINE Vec<float> load_widened<float, float>(const float* p) {
  return load(p);
}
template <>
PYDISTILL_INLINE Vec<double> load_widened<double, double>(const double* p) {
  return load(p);
}

template <class T, class S>
PYDISTILL_INLINE void store_narrowed(S* p, Vec<T> v) {
  for (int i = 0; i < Lanes<T>::count; ++i) narrow(v[i], p[i]);
}
template <>
PYDISTILL_INLINE void store_narrowed<float, float>(float* p, Vec<float> v) {
  store(p, v);
}
template <>
PYDISTILL_INLINE void store_narrowed<double, double>(double* p, Vec<double> v) {
  store(p, v);
}

// One perfect shuffle of two vectors: (a0, b0, a1, b1, ...), its lower and its upper half.
PYDISTILL_INLINE void zip(Vec<float> a, Vec<float> b, Vec<float>& lower, Vec<float>& upper) {
  lower = __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  upper = __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
}
PYDISTILL_INLINE void zip(Vec<double> a, Vec<double> b, Vec<double>& lower, Vec<double>& upper) {
  lower = __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
  upper = __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
}

// Transposes an L x L block: log2(L) rounds of zipping row i with row i + L/2.
template <class T>
PYDISTILL_INLINE void transpose(Vec<T> (&rows)[Lanes<T>::count]) {
  constexpr int L = Lanes<T>::count;
  for (int round = 1; round < L; round *= 2) {
    Vec<T> next[L];
    for (int i = 0; i < L / 2; ++i) zip(rows[i], rows[i + L / 2], next[2 * i], next[2 * i + 1]);
    for (int i = 0; i < L; ++i) rows[i] = next[i];
  }
}

// Runs `block` over L positions at a time if positions are adjacent in memory (and every lane has its own channel),
// `vector` over single positions if channels are adjacent, `scalar` for all that is left.
template <class T, class Block, class Vector, class Scalar_>
PYDISTILL_INLINE void walk(const Map& map, int lanes, int64_t H, int64_t W, Block block, Vector vector,
                           Scalar_ scalar) {
  constexpr int L = Lanes<T>::count;
  const bool flat = map.h == W * map.w;  // rows follow one another: walk the plane as one long row
  const int64_t rows = flat ? 1 : H, columns = flat ? H * W : W;
  for (int64_t h = 0; h < rows; ++h) {
    int64_t w = 0;
    if (lanes == L && map.c == 1) {
      for (; w < columns; ++w) vector(h * W + w, h * map.h + w * map.w);
    } else if (map.w == 1) {
      for (; w + L <= columns; w += L) block(h * W + w, h * map.h + w);
    }
    for (; w < columns; ++w) scalar(h * W + w, h * map.h + w * map.w);
  }
}

template <class T, class S>
__attribute__((noinline)) void pack_from(const Map& map, int64_t n, int64_t c, int lanes, int64_t H, int64_t W,
                                         Vec<T>* panel) {
  constexpr int L = Lanes<T>::count;
  const S* from = static_cast<const S*>(map.data) + n * map.n + c * map.c;
  walk<T>(
      map, lanes, H, W,
      [&](int64_t position, int64_t offset) {
        Vec<T> rows[L];
        for (int i = 0; i < L; ++i) rows[i] = i < lanes ? load_widened<T>(from + offset + i * map.c) : Vec<T>{};
        transpose<T>(rows);
        for (int i = 0; i < L; ++i) panel[position + i] = rows[i];
      },
      [&](int64_t position, int64_t offset) { panel[position] = load_widened<T>(from + offset); },
      [&](int64_t position, int64_t offset) {
        Vec<T> v{};
        for (int i = 0; i < lanes; ++i) v[i] = widen(from[offset + i * map.c]);
        panel[position] = v;
      });
}

template <class T, class S>
__attribute__((noinline)) void unpack_to(const Vec<T>* panel, int64_t n, int64_t c, int lanes, int64_t H, int64_t W,
                                         const Map& map) {
  constexpr int L = Lanes<T>::count;
  S* to = static_cast<S*>(map.data) + n * map.n + c * map.c;
  walk<T>(
      map, lanes, H, W,
      [&](int64_t position, int64_t offset) {
        Vec<T> rows[L];
        for (int i = 0; i < L; ++i) rows[i] = panel[position + i];
        transpose<T>(rows);
        for (int i = 0; i < lanes; ++i) store_narrowed<T>(to + offset + i * map.c, rows[i]);
      },
      [&](int64_t position, int64_t offset) { store_narrowed<T>(to + offset, panel[position]); },
      [&](int64_t position, int64_t offset) {
        for (int i = 0; i < lanes; ++i) narrow(panel[position][i], to[offset + i * map.c]);
      });
}

// Sample n, channels [c, c + lanes) of `map` into a panel; lanes without a channel become zero.
template <class T>
void pack(Scalar scalar, const Map& map, int64_t n, int64_t c, int lanes, int64_t H, int64_t W, Vec<T>* panel) {
  if constexpr (sizeof(T) == 8) {
    pack_from<T, double>(map, n, c, lanes, H, W, panel);
  } else {
    if (scalar == Scalar::f32) pack_from<T, float>(map, n, c, lanes, H, W, panel);
    if (scalar == Scalar::bf16) pack_from<T, Bf16>(map, n, c, lanes, H, W, panel);
    if (scalar == Scalar::f16) pack_from<T, F16>(map, n, c, lanes, H, W, panel);
  }
}

// The inverse: the first `lanes` lanes of a panel into `map`.
template <class T>
void unpack(Scalar scalar, const Vec<T>* panel, int64_t n, int64_t c, int lanes, int64_t H, int64_t W, const Map& map) {
  if constexpr (sizeof(T) == 8) {
    unpack_to<T, double>(panel, n, c, lanes, H, W, map);
  } else {
    if (scalar == Scalar::f32) unpack_to<T, float>(panel, n, c, lanes, H, W, map);
    if (scalar == Scalar::bf16) unpack_to<T, Bf16>(panel, n, c, lanes, H, W, map);
    if (scalar == Scalar::f16) unpack_to<T, F16>(panel, n, c, lanes, H, W, map);
  }
}

// L adjacent values of a per-channel vector, zero where there is no channel; and back.
template <class T>
PYDISTILL_INLINE Vec<T> load_channels(const void* values, int64_t c, int lanes) {
  Vec<T> v{};
  for (int i = 0; i < lanes; ++i) v[i] = static_cast<const T*>(values)[c + i];
  return v;
}

template <class T>
PYDISTILL_INLINE void store_channels(Vec<T> v, void* values, int64_t offset, int lanes) {
  for (int i = 0; i < lanes; ++i) static_cast<T*>(values)[offset + i] = v[i];
}

}  // namespace
}  // namespace pydistill
