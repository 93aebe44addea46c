// CPU body: see max_pool2d.h for what is computed. Channels are lanes, and numbers of elements are integers as wide as
// them, so that a comparison chooses both.
#include "cpu_vocabulary.h"
#include "max_pool2d.h"
#include "storage_registers.h"

namespace pydistill {
namespace {

// What a lane chooses from: an element, counted from a position that the caller knows, and its number in its window.
struct Choice {
  int64_t offset;
  int32_t number;
};

struct Choices {
  Choice at[MaxPool2d::kLargest * MaxPool2d::kLargest];
  int count = 0;

  PYDISTILL_INLINE void add(int64_t offset, int64_t number) { at[count++] = {offset, static_cast<int32_t>(number)}; }
};

template <class T>
struct Numbered;
template <>
struct Numbered<float> {
  typedef int32_t Integer;
};
template <>
struct Numbered<double> {
  typedef int64_t Integer;
};

// A number for each lane of V, which is a register of T, or T itself; bytes in memory. What the compiler makes of its
// own conversions between them goes lane by lane, on AVX2 for double still.
template <class V, class T>
struct Numbers {
  typedef typename Numbered<T>::Integer Type __attribute__((vector_size(sizeof(V))));
  typedef uint8_t Bytes __attribute__((vector_size(sizeof(V) / sizeof(T))));

  PYDISTILL_INLINE static Type load(const uint8_t* p) {
#if defined(__AVX512F__)
    if constexpr (sizeof(T) == 4) {
      return reinterpret_cast<Type>(
          _mm512_maskz_cvtepu8_epi32(0xFFFF, _mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
    } else {
      return reinterpret_cast<Type>(
          _mm512_maskz_cvtepu8_epi64(0xFF, _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
    }
#elif defined(__AVX2__)
    if constexpr (sizeof(T) == 4)
      return reinterpret_cast<Type>(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#elif defined(__SSE2__)
    if constexpr (sizeof(T) == 4) {
      int whole;
      __builtin_memcpy(&whole, p, sizeof(whole));
      const __m128i low = _mm_unpacklo_epi8(_mm_cvtsi32_si128(whole), _mm_setzero_si128());
      return reinterpret_cast<Type>(_mm_unpacklo_epi16(low, _mm_setzero_si128()));
    }
#endif
    Bytes bytes;
    __builtin_memcpy(&bytes, p, sizeof(bytes));
    return __builtin_convertvector(bytes, Type);
  }
  PYDISTILL_INLINE static void store(uint8_t* p, Type numbers) {
#if defined(__AVX512F__)
    if constexpr (sizeof(T) == 4)
      _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                       _mm512_maskz_cvtepi32_epi8(0xFFFF, reinterpret_cast<__m512i>(numbers)));
    else
      _mm_storel_epi64(reinterpret_cast<__m128i*>(p),
                       _mm512_maskz_cvtepi64_epi8(0xFF, reinterpret_cast<__m512i>(numbers)));
    return;
#elif defined(__AVX2__)
    if constexpr (sizeof(T) == 4) {
      const __m256i all = reinterpret_cast<__m256i>(numbers);
      const __m128i pairs = _mm_packus_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
      return _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(pairs, pairs));
    }
#elif defined(__SSE2__)
    if constexpr (sizeof(T) == 4) {
      const __m128i pairs = _mm_packs_epi32(reinterpret_cast<__m128i>(numbers), reinterpret_cast<__m128i>(numbers));
      const int bytes = _mm_cvtsi128_si32(_mm_packus_epi16(pairs, pairs));
      __builtin_memcpy(p, &bytes, sizeof(bytes));
      return;
    }
#endif
    const Bytes bytes = __builtin_convertvector(numbers, Bytes);
    __builtin_memcpy(p, &bytes, sizeof(bytes));
  }
  PYDISTILL_INLINE static Type all(int32_t number) { return Type{} + number; }
};
template <class T>
struct Numbers<T, T> {
  typedef int32_t Type;
  PYDISTILL_INLINE static Type load(const uint8_t* p) { return *p; }
  PYDISTILL_INLINE static void store(uint8_t* p, Type number) { *p = static_cast<uint8_t>(number); }
  PYDISTILL_INLINE static Type all(int32_t number) { return number; }
};

// What is done with the lanes at one position and the K choices that they have; K is 0 where it is not known when
// compiling.
template <class T, class S>
struct Lanewise {
  template <class V, int K>
  PYDISTILL_INLINE static void pool(const Choices& choices, const S* from, S* to, uint8_t* which) {
    using Number = Numbers<V, T>;
    const int count = K ? K : choices.count;
    V best = load_lanes<V, T>(from + choices.at[0].offset);
    auto number = Number::all(choices.at[0].number);
#pragma GCC unroll 9
    for (int i = 1; i < count; ++i) {
      const V v = load_lanes<V, T>(from + choices.at[i].offset);
      const auto wins = (v > best) | (v != v);  // of equals the first, of NaN the last: as in torch
      best = wins ? v : best;
      number = wins ? Number::all(choices.at[i].number) : number;
    }
    store_lanes<V, T>(to, best);
    Number::store(which, number);
  }

  template <class V, int K>
  PYDISTILL_INLINE static void pick(const Choices& choices, const S* from, S* to, const uint8_t* which) {
    using Number = Numbers<V, T>;
    const int count = K ? K : choices.count;
    const auto number = Number::load(which);
    V found{};
#pragma GCC unroll 9
    for (int i = 0; i < count; ++i) {
      const auto named = number == Number::all(choices.at[i].number);
      found = named ? load_lanes<V, T>(from + choices.at[i].offset) : found;
    }
    store_lanes<V, T>(to, found);
  }

  template <class V, int K>
  PYDISTILL_INLINE static void scatter(const Choices& choices, const S* from, S* to, const uint8_t* which) {
    using Number = Numbers<V, T>;
    const int count = K ? K : choices.count;
    V sum{};
#pragma GCC unroll 9
    for (int i = 0; i < count; ++i) {
      const auto named = Number::load(which + choices.at[i].offset) == Number::all(choices.at[i].number);
      sum += named ? load_lanes<V, T>(from + choices.at[i].offset) : V{};
    }
    store_lanes<V, T>(to, sum);
  }
};

template <class T, class S, MaxPool2d::Pass PASS>
struct Pooling {
  using Pass = MaxPool2d::Pass;
  const MaxPool2d& call;
  const int64_t C = call.C, H = call.H, W = call.W, rows = call.rows(), columns = call.columns();
  const int64_t kernel = call.kernel, stride = call.stride, padding = call.padding;
  Choices choices;

  void run(int64_t begin, int64_t end) {
    const S* const from = static_cast<const S*>(call.from);
    S* const to = static_cast<S*>(call.to);
    for (int64_t unit = begin; unit < end; ++unit) {
      if constexpr (PASS == Pass::scatter) {
        const int64_t image = unit / H * rows * columns * C;
        positions(unit % H, from + image, to + unit * W * C, call.which + image);
      } else {
        const int64_t row = unit * columns * C;
        windows(unit % rows, from + unit / rows * H * W * C, to + row, call.which + row);
      }
    }
  }

  // A row of windows. All but the outer ones have the same elements.
  void windows(int64_t p, const S* image, S* to, uint8_t* which) {
    const int64_t top = p * stride - padding, i_begin = top < 0 ? -top : 0, i_end = H - top < kernel ? H - top : kernel;
    for (int64_t q = 0, seen_begin = 0, seen_end = 0; q < columns; ++q) {
      const int64_t left = q * stride - padding;
      const int64_t j_begin = left < 0 ? -left : 0, j_end = W - left < kernel ? W - left : kernel;
      if (j_begin != seen_begin || j_end != seen_end) {
        seen_begin = j_begin, seen_end = j_end;
        choices.count = 0;
        for (int64_t i = i_begin; i < i_end; ++i)
          for (int64_t j = j_begin; j < j_end; ++j) choices.add(((i - i_begin) * W + j - j_begin) * C, i * kernel + j);
      }
      channels(image + ((top + i_begin) * W + left + j_begin) * C, to + q * C, which + q * C);
    }
  }

  // A row of what was pooled. Windows come in their own order, and so do the terms of the sums.
  void positions(int64_t h, const S* image, S* to, uint8_t* which) {
    const int64_t outside = h + padding - kernel;  // where windows begin that end above the row
    const int64_t p_begin = outside < 0 ? 0 : outside / stride + 1;
    const int64_t last = (h + padding) / stride, p_end = last < rows ? last + 1 : rows;
    for (int64_t w = 0, q_begin = 0, q_end = 0; w < W; ++w) {
      while (q_end < columns && q_end * stride <= w + padding) ++q_end;
      while (q_begin < q_end && q_begin * stride + kernel <= w + padding) ++q_begin;
      choices.count = 0;
      for (int64_t p = p_begin; p < p_end; ++p)
        for (int64_t q = q_begin; q < q_end; ++q)
          choices.add((p * columns + q) * C, (h + padding - p * stride) * kernel + w + padding - q * stride);
      channels(image, to + w * C, which);
    }
  }

  PYDISTILL_INLINE void channels(const S* from, S* to, uint8_t* which) {
    if (choices.count == 1) return channels_of<1>(from, to, which);
    if (choices.count == 2) return channels_of<2>(from, to, which);
    if (choices.count == 4) return channels_of<4>(from, to, which);
    if (choices.count == 9) return channels_of<9>(from, to, which);
    channels_of<0>(from, to, which);
  }

  template <int K>
  __attribute__((noinline)) void channels_of(const S* from, S* to, uint8_t* which) {
    constexpr int L = Registers<T>::lanes;
    int64_t c = 0;
    for (; c + L <= C; c += L) step<Register<T>, K>(from + c, to + c, which + c);
    for (; c < C; ++c) step<T, K>(from + c, to + c, which + c);
  }

  template <class V, int K>
  PYDISTILL_INLINE void step(const S* from, S* to, uint8_t* which) {
    if constexpr (PASS == Pass::pool) Lanewise<T, S>::template pool<V, K>(choices, from, to, which);
    if constexpr (PASS == Pass::pick) Lanewise<T, S>::template pick<V, K>(choices, from, to, which);
    if constexpr (PASS == Pass::scatter) Lanewise<T, S>::template scatter<V, K>(choices, from, to, which);
  }
};

template <class T, class S>
void run(const MaxPool2d& call, int64_t begin, int64_t end) {
  using Pass = MaxPool2d::Pass;
  if (call.pass == Pass::pool) Pooling<T, S, Pass::pool>{call}.run(begin, end);
  if (call.pass == Pass::pick) Pooling<T, S, Pass::pick>{call}.run(begin, end);
  if (call.pass == Pass::scatter) Pooling<T, S, Pass::scatter>{call}.run(begin, end);
}

}  // namespace

void PYDISTILL_KERNEL(const MaxPool2d& call, int64_t begin, int64_t end) {
  if (call.scalar == Scalar::f64) run<double, double>(call, begin, end);
  if (call.scalar == Scalar::f32) run<float, float>(call, begin, end);
  if (call.scalar == Scalar::bf16) run<float, Bf16>(call, begin, end);
  if (call.scalar == Scalar::f16) run<float, F16>(call, begin, end);
}

}  // namespace pydistill
