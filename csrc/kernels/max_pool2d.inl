// CPU body: see max_pool2d.h for what is computed. Channels are lanes, and the numbers of elements are integers of the
// same width, so that one comparison selects both.
#include "max_pool2d.h"
#include "vocabulary/cpu_vocabulary.h"
#include "vocabulary/storage_registers.h"

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

// Adjacent channels that are processed together: `parts` times a Value, with a Number for each lane. A single one, for
// the remainder:
template <class T, class S>
struct One {
  static constexpr int parts = 1, lanes = 1;
  typedef T Value;
  typedef int32_t Number;

  PYDISTILL_INLINE static void load(const S* p, Value (&v)[1]) { v[0] = widen(*p); }
  PYDISTILL_INLINE static void store(S* p, const Value (&v)[1]) { narrow(v[0], *p); }
  PYDISTILL_INLINE static void load(const uint8_t* p, Number (&n)[1]) { n[0] = *p; }
  PYDISTILL_INLINE static void store(uint8_t* p, const Number (&n)[1]) { *p = static_cast<uint8_t>(n[0]); }
};

// A register of them. The compiler converts between bytes and wider lanes one by one unless told how; for double only
// AVX-512 is.
template <class T, class S>
struct Whole {
  static constexpr int parts = 1, lanes = Registers<T>::lanes;
  typedef Register<T> Value;
  typedef decltype(Value{} > Value{}) Number;
  typedef uint8_t Bytes __attribute__((vector_size(lanes)));

  PYDISTILL_INLINE static void load(const S* p, Value (&v)[1]) { v[0] = widened_register<T>(p); }
  PYDISTILL_INLINE static void store(S* p, const Value (&v)[1]) { store_narrowed_register<T>(p, v[0]); }

  PYDISTILL_INLINE static void load(const uint8_t* p, Number (&n)[1]) {
    Bytes bytes;
    __builtin_memcpy(&bytes, p, lanes);
#if defined(__AVX512F__)
    const __m128i low = lanes == 16 ? _mm_loadu_si128(reinterpret_cast<const __m128i*>(p))
                                    : _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
    n[0] = reinterpret_cast<Number>(lanes == 16 ? _mm512_maskz_cvtepu8_epi32(0xFFFF, low)
                                                : _mm512_maskz_cvtepu8_epi64(0xFF, low));
    return;
#elif defined(__AVX2__)
    if constexpr (lanes == 8) {
      n[0] = reinterpret_cast<Number>(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
      return;
    }
#elif defined(__SSE2__)
    if constexpr (lanes == 4) {
      int all;
      __builtin_memcpy(&all, p, 4);
      const __m128i pairs = _mm_unpacklo_epi8(_mm_cvtsi32_si128(all), _mm_setzero_si128());
      n[0] = reinterpret_cast<Number>(_mm_unpacklo_epi16(pairs, _mm_setzero_si128()));
      return;
    }
#endif
    n[0] = __builtin_convertvector(bytes, Number);
  }

  PYDISTILL_INLINE static void store(uint8_t* p, const Number (&n)[1]) {
#if defined(__AVX512F__)
    const __m512i all = reinterpret_cast<__m512i>(n[0]);
    const __m128i low = lanes == 16 ? _mm512_maskz_cvtepi32_epi8(0xFFFF, all) : _mm512_maskz_cvtepi64_epi8(0xFF, all);
    __builtin_memcpy(p, &low, lanes);
    return;
#elif defined(__AVX2__)
    if constexpr (lanes == 8) {
      const __m256i all = reinterpret_cast<__m256i>(n[0]);
      const __m128i pairs = _mm_packus_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
      return _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(pairs, pairs));
    }
#elif defined(__SSE2__)
    if constexpr (lanes == 4) {
      const __m128i pairs = _mm_packs_epi32(reinterpret_cast<__m128i>(n[0]), reinterpret_cast<__m128i>(n[0]));
      const __m128i low = _mm_packus_epi16(pairs, pairs);
      __builtin_memcpy(p, &low, 4);
      return;
    }
#endif
    const Bytes bytes = __builtin_convertvector(n[0], Bytes);
    __builtin_memcpy(p, &bytes, lanes);
  }
};

#if defined(__SSE2__)
// A register of pairs of bfloat16, split into even and odd elements: widening and narrowing move no lanes.
struct Pairs {
  static constexpr int parts = 2, lanes = 2 * Registers<float>::lanes;
  typedef Register<float> Value;
  typedef decltype(Value{} > Value{}) Number;
  typedef FloatBits Unaligned __attribute__((aligned(1)));
  typedef uint16_t Halves __attribute__((vector_size(kRegisterBytes)));

  PYDISTILL_INLINE static void load(const Bf16* p, Value (&v)[2]) { split(*reinterpret_cast<const Unaligned*>(p), v); }
  PYDISTILL_INLINE static void split(FloatBits both, Value (&v)[2]) {
    v[0] = reinterpret_cast<Value>(both << 16);
    v[1] = reinterpret_cast<Value>(both & 0xFFFF0000u);
  }
  PYDISTILL_INLINE static void store(Bf16* p, const Value (&v)[2]) {
    *reinterpret_cast<Unaligned*>(p) = rounded(v[0]) >> 16 | (rounded(v[1]) & 0xFFFF0000u);
  }
  PYDISTILL_INLINE static FloatBits rounded(Value v) {  // in the upper half; the lower one is arbitrary
    const FloatBits bits = reinterpret_cast<FloatBits>(v);
    return v == v ? bits + 0x7FFFu + ((bits >> 16) & 1u) : FloatBits{} + 0x7FC00000u;
  }

  PYDISTILL_INLINE static Halves halves(const uint8_t* p) {
#if defined(__AVX512F__)
    return reinterpret_cast<Halves>(
        _mm512_maskz_cvtepu8_epi16(~__mmask32{}, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif defined(__AVX2__)
    return reinterpret_cast<Halves>(_mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#else
    return reinterpret_cast<Halves>(
        _mm_unpacklo_epi8(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)), _mm_setzero_si128()));
#endif
  }
  PYDISTILL_INLINE static void load(const uint8_t* p, Number (&n)[2]) {
    const FloatBits both = reinterpret_cast<FloatBits>(halves(p));
    n[0] = reinterpret_cast<Number>(both & 0xFFFFu);
    n[1] = reinterpret_cast<Number>(both >> 16);
  }
  PYDISTILL_INLINE static void load_named(const Bf16* p, const uint8_t* which, int32_t number, Value (&v)[2]) {
    const Halves all = reinterpret_cast<Halves>(FloatBits(*reinterpret_cast<const Unaligned*>(p)));
    const Halves named = halves(which) == static_cast<uint16_t>(number) ? all : Halves{};
    split(reinterpret_cast<FloatBits>(named), v);
  }
  PYDISTILL_INLINE static void store(uint8_t* p, const Number (&n)[2]) {
    const Number both = n[0] | n[1] << 16;
#if defined(__AVX512F__)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_maskz_cvtepi16_epi8(~__mmask32{}, reinterpret_cast<__m512i>(both)));
#elif defined(__AVX2__)
    const __m256i all = reinterpret_cast<__m256i>(both);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                     _mm_packus_epi16(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1)));
#else
    const __m128i all = reinterpret_cast<__m128i>(both);
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(all, all));
#endif
  }
};
#endif

// Lanes whose number is not the wanted one become zero.
template <class Group, class S>
PYDISTILL_INLINE void load_named(const S* p, const uint8_t* which, int32_t number, typename Group::Value (&v)[1]) {
  typename Group::Number numbers[1];
  Group::load(p, v);
  Group::load(which, numbers);
  v[0] = numbers[0] == number ? v[0] : typename Group::Value{};
}
#if defined(__SSE2__)
template <class Group>
PYDISTILL_INLINE void load_named(const Bf16* p, const uint8_t* which, int32_t number, Register<float> (&v)[2]) {
  Group::load_named(p, which, number, v);
}
#endif

// The operation on a group of channels at one position.

template <class Group, class S>
PYDISTILL_INLINE void pool(const Choice* choices, int count, const S* from, S* to, uint8_t* which) {
  typename Group::Value best[Group::parts], v[Group::parts];
  typename Group::Number number[Group::parts];
  Group::load(from + choices[0].offset, best);
#pragma GCC unroll 2
  for (int part = 0; part < Group::parts; ++part) number[part] = typename Group::Number{} + choices[0].number;
#pragma GCC unroll 9
  for (int i = 1; i < count; ++i) {
    Group::load(from + choices[i].offset, v);
#pragma GCC unroll 2
    for (int part = 0; part < Group::parts; ++part) {
      const auto wins = (v[part] > best[part]) | (v[part] != v[part]);  // the first of equals, the last NaN
      best[part] = wins ? v[part] : best[part];
      number[part] = wins ? typename Group::Number{} + choices[i].number : number[part];
    }
  }
  Group::store(to, best);
  Group::store(which, number);
}

template <class Group, class S>
PYDISTILL_INLINE void pick(const Choice* choices, int count, const S* from, S* to, const uint8_t* which) {
  typename Group::Value found[Group::parts] = {}, v[Group::parts];
  typename Group::Number number[Group::parts];
  Group::load(which, number);
#pragma GCC unroll 9
  for (int i = 0; i < count; ++i) {
    Group::load(from + choices[i].offset, v);
#pragma GCC unroll 2
    for (int part = 0; part < Group::parts; ++part)
      found[part] = number[part] == choices[i].number ? v[part] : found[part];
  }
  Group::store(to, found);
}

template <class Group, class S>
PYDISTILL_INLINE void scatter(const Choice* choices, int count, const S* from, S* to, const uint8_t* which) {
  typename Group::Value sum[Group::parts] = {}, v[Group::parts];
#pragma GCC unroll 9
  for (int i = 0; i < count; ++i) {
    load_named<Group>(from + choices[i].offset, which + choices[i].offset, choices[i].number, v);
#pragma GCC unroll 2
    for (int part = 0; part < Group::parts; ++part) sum[part] += v[part];
  }
  Group::store(to, sum);
}

template <class T, class S, MaxPool2d::Pass PASS>
struct Pooling {
  using Pass = MaxPool2d::Pass;
  const MaxPool2d& call;
  const int64_t C = call.C, H = call.H, W = call.W, rows = call.rows(), columns = call.columns();
  const int64_t kernel = call.kernel, stride = call.stride, padding = call.padding;
  const int64_t apart = stride < W ? stride : W;  // columns of one phase
  Choices choices{};

  void run(int64_t begin, int64_t end) {
    const S* const from = static_cast<const S*>(call.from);
    S* const to = static_cast<S*>(call.to);
    for (int64_t unit = begin; unit < end; ++unit) {
      if constexpr (PASS == Pass::scatter) {
        const int64_t image = unit / H * rows * columns * C;
        positions(unit % H, from + image, to + (unit - call.first_row) * W * C, call.which + image);
      } else {
        const int64_t row = unit * columns * C;
        windows(unit % rows, from + unit / rows * H * W * C, to + row, call.which + row);
      }
    }
  }

  // A row of windows, in runs of those with the same set of elements: all but the outer ones.
  void windows(int64_t p, const S* image, S* to, uint8_t* which) {
    const int64_t top = p * stride - padding, i_begin = top < 0 ? -top : 0, i_end = H - top < kernel ? H - top : kernel;
    for (int64_t q = 0, run = 1; q < columns; q += run) {
      const int64_t left = q * stride - padding, j_begin = first_column(q), j_end = last_column(q);
      run = 1;
      while (q + run < columns && first_column(q + run) == j_begin && last_column(q + run) == j_end) ++run;
      choices.count = 0;
      for (int64_t i = i_begin; i < i_end; ++i)
        for (int64_t j = j_begin; j < j_end; ++j) choices.add(((i - i_begin) * W + j - j_begin) * C, i * kernel + j);
      choose(image + ((top + i_begin - call.first_row) * W + left + j_begin) * C, to + q * C, which + q * C, run);
    }
  }

  PYDISTILL_INLINE int64_t first_column(int64_t q) const {
    const int64_t left = q * stride - padding;
    return left < 0 ? -left : 0;
  }
  PYDISTILL_INLINE int64_t last_column(int64_t q) const {
    const int64_t left = q * stride - padding;
    return W - left < kernel ? W - left : kernel;
  }

  // A row of the pooling's input. Positions a stride apart are covered by the same windows, counted from their own, so
  // they are processed together. Windows come in order, and so do the terms of the sums.
  void positions(int64_t h, const S* image, S* to, uint8_t* which) {
    const int64_t p_last = (h + padding) / stride, p_first = p_last - covering(h) + 1;
    const int64_t p_begin = p_first < 0 ? 0 : p_first, p_end = p_last < rows ? p_last + 1 : rows;
    for (int64_t phase = 0; phase < apart; ++phase) {
      int64_t last = (phase + padding) / stride;  // window that covers w, if there were that many
      const int64_t count = covering(phase);
      for (int64_t w = phase, run = 1; w < W; w += run * apart, last += run) {
        const int64_t q_begin = first_window(last, count), q_end = end_of_windows(last);
        run = 1;
        while (w + run * apart < W && first_window(last + run, count) == q_begin + run &&
               end_of_windows(last + run) == q_end + run)
          ++run;
        choices.count = 0;
        for (int64_t p = p_begin; p < p_end; ++p)
          for (int64_t q = q_begin; q < q_end; ++q)
            choices.add(((p - p_begin) * columns + q - q_begin) * C,
                        (h + padding - p * stride) * kernel + w + padding - q * stride);
        const int64_t corner = choices.count ? (p_begin * columns + q_begin) * C : 0;
        choose(image + corner, to + w * C, which + corner, run);
      }
    }
  }

  // How many windows cover a row or column, if windows went beyond every edge.
  PYDISTILL_INLINE int64_t covering(int64_t at) const {
    const int64_t number = (at + padding) % stride;  // in the last of them
    return number < kernel ? (kernel - 1 - number) / stride + 1 : 0;
  }
  PYDISTILL_INLINE int64_t first_window(int64_t last, int64_t count) const {
    return last - count + 1 < 0 ? 0 : last - count + 1;
  }
  PYDISTILL_INLINE int64_t end_of_windows(int64_t last) const { return last < columns ? last + 1 : columns; }

  PYDISTILL_INLINE void choose(const S* from, S* to, uint8_t* which, int64_t run) const {
    if (choices.count == 1) return choose_of<1>(from, to, which, run);
    if (choices.count == 2) return choose_of<2>(from, to, which, run);
    if (choices.count == 4) return choose_of<4>(from, to, which, run);
    if (choices.count == 9) return choose_of<9>(from, to, which, run);
    choose_of<0>(from, to, which, run);
  }

  template <int K>
  __attribute__((noinline)) void choose_of(const S* from, S* to, uint8_t* which, int64_t run) const {
    Choice own[K ? K : 1];  // for all the compiler knows, written bytes might alias the others
    for (int i = 0; i < K; ++i) own[i] = choices.at[i];
    const Choice* const all = K ? own : choices.at;
    const int count = K ? K : choices.count;
    for (; run > 0; --run) {
      int64_t c = 0;
#if defined(__SSE2__)
      if constexpr (__is_same(S, Bf16)) groups<Pairs>(c, all, count, from, to, which);
#endif
      groups<Whole<T, S>>(c, all, count, from, to, which);
      groups<One<T, S>>(c, all, count, from, to, which);
      from += PASS == Pass::scatter ? C : stride * C;
      to += PASS == Pass::scatter ? apart * C : C;
      which += C;
    }
  }

  template <class Group>
  PYDISTILL_INLINE void groups(int64_t& c, const Choice* choices, int count, const S* from, S* to,
                               uint8_t* which) const {
    for (; c + Group::lanes <= C; c += Group::lanes) {
      if constexpr (PASS == Pass::pool) pool<Group>(choices, count, from + c, to + c, which + c);
      if constexpr (PASS == Pass::pick) pick<Group>(choices, count, from + c, to + c, which + c);
      if constexpr (PASS == Pass::scatter) scatter<Group>(choices, count, from + c, to + c, which + c);
    }
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
  with_types(call.scalar, [&](auto t, auto s) PYDISTILL_LAMBDA { run<decltype(t), decltype(s)>(call, begin, end); });
}

}  // namespace pydistill
