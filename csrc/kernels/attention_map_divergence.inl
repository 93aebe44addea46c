// CPU body: see attention_map_divergence.h for what is computed and how it is divided.
//
// Sums over a row run in the order of the sixteen (eight in double) lanes of a 64-byte vector, whatever the width of a
// register: AVX2 and AVX-512 give the same bits. The baseline, which has no fused multiply-add, differs in rounding.
#include "attention_map_divergence.h"
#include "vocabulary/matrix_product.h"

namespace pydistill {
namespace {

using Call = AttentionMapDivergence;
using Kind = Call::Kind;
using Heads = Call::Heads;

template <class T>
using Reg = typename Registers<T>::Type;
template <class T>
struct Bits;
template <>
struct Bits<float> {
  typedef int32_t Lane;
  typedef int32_t Type __attribute__((vector_size(kRegisterBytes)));
};
template <>
struct Bits<double> {
  typedef int64_t Lane;
  typedef int64_t Type __attribute__((vector_size(kRegisterBytes)));
};

template <class T>
PYDISTILL_INLINE Reg<T> read(const T* p) {
  return *reinterpret_cast<const Reg<T>*>(p);
}
template <class T>
PYDISTILL_INLINE void write(T* p, Reg<T> v) {
  *reinterpret_cast<Reg<T>*>(p) = v;
}
template <class T>
PYDISTILL_INLINE Reg<T> all(T value) {
  return Reg<T>{} + value;
}
template <class T>
PYDISTILL_INLINE Reg<T> where(typename Bits<T>::Type live, Reg<T> v) {
  return (Reg<T>)((typename Bits<T>::Type)v & live);
}

// e^x for x <= 0, flushed to 0 below the normal numbers; NaN stays NaN. x = n ln 2 + r, and e^r by the polynomial of
// Cephes' expf.
PYDISTILL_INLINE Reg<float> exp_of(Reg<float> x) {
  using Int = Bits<float>::Type;
  const Reg<float> magic = all(12582912.0f);  // 1.5 * 2^23: adding to it rounds to an integer
  const Int normal = ~(x < all(-87.0f));
  const Reg<float> shifted = multiply_add(x, all(1.44269504f), magic), n = shifted - magic;
  const Reg<float> r = multiply_add(n, all(2.12194440e-4f), multiply_add(n, all(-0.693359375f), x));
  Reg<float> y = multiply_add(all(1.9875691500e-4f), r, all(1.3981999507e-3f));
  y = multiply_add(y, r, all(8.3334519073e-3f));
  y = multiply_add(y, r, all(4.1665795894e-2f));
  y = multiply_add(y, r, all(1.6666665459e-1f));
  y = multiply_add(y, r, all(5.0000001201e-1f));
  y = multiply_add(y, r * r, r) + all(1.0f);
  const Int power = (((Int)shifted - (Int)magic) + 127) << 23;
  return where<float>(normal, y * (Reg<float>)power);
}
PYDISTILL_INLINE Reg<double> exp_of(Reg<double> x) {
  for (int i = 0; i < Registers<double>::lanes; ++i) x[i] = exp_lane(x[i]);
  return x;
}
template <class T>
PYDISTILL_INLINE Reg<T> log_of(Reg<T> x) {
  for (int i = 0; i < Registers<T>::lanes; ++i) x[i] = log_lane(x[i]);
  return x;
}

// A 64-byte vector of running sums (or maxima) in as many registers as it takes, and their total.
template <class T>
struct Running {
  static constexpr int per = Registers<T>::per_vector, lanes = Registers<T>::lanes;
  Reg<T> part[per];

  PYDISTILL_INLINE explicit Running(T start) {
    for (int c = 0; c < per; ++c) part[c] = all(start);
  }
  template <class Combine>
  PYDISTILL_INLINE T total(Combine combine) const {
    T lane[Lanes<T>::count];
    for (int c = 0; c < per; ++c)
      for (int i = 0; i < lanes; ++i) lane[c * lanes + i] = part[c][i];
    for (int half = Lanes<T>::count / 2; half; half /= 2)
      for (int i = 0; i < half; ++i) lane[i] = combine(lane[i], lane[i + half]);
    return lane[0];
  }
  PYDISTILL_INLINE T sum() const {
    return total([](T a, T b) PYDISTILL_LAMBDA { return a + b; });
  }
  PYDISTILL_INLINE T max() const {
    return total([](T a, T b) PYDISTILL_LAMBDA { return b > a ? b : a; });
  }
};

// `body(offset, c)` for every register of a row of `size` elements, with c its position in its vector.
template <class T, class Body>
PYDISTILL_INLINE void over_row(int64_t size, Body body) {
  constexpr int per = Registers<T>::per_vector, lanes = Registers<T>::lanes;
  for (int64_t at = 0; at < size; at += Lanes<T>::count) {
#pragma GCC unroll 4
    for (int c = 0; c < per; ++c) body(at + c * lanes, c);
  }
}

// One row: its loss, and in place of s the loss's gradient times g. `size` counts whole vectors; `live` has all bits
// set where a key takes part. Other keys are excluded from every sum, as even zero times their score need not be zero.
template <class T, Kind kind>
__attribute__((noinline)) T finish_row(T* s, T* t, const typename Bits<T>::Lane* live, int64_t size, bool gradient, T g,
                                       T beta) {
  using Int = typename Bits<T>::Type;
  const T infinity = __builtin_inff();
  const auto alive = [&](int64_t at) PYDISTILL_LAMBDA { return *reinterpret_cast<const Int*>(live + at); };

  Running<T> top_s(-infinity), top_t(-infinity);
  over_row<T>(size, [&](int64_t at, int c) PYDISTILL_LAMBDA {
    const Int on = alive(at);
    const Reg<T> x = on ? read(s + at) : all(-infinity), y = on ? read(t + at) : all(-infinity);
    top_s.part[c] = x > top_s.part[c] ? x : top_s.part[c];  // NaN is ignored here and shows in the sums
    top_t.part[c] = y > top_t.part[c] ? y : top_t.part[c];
  });
  const Reg<T> max_s = all(top_s.max()), max_t = all(top_t.max());

  Running<T> sum_s(0), sum_t(0), sum_u(0);
  over_row<T>(size, [&](int64_t at, int c) PYDISTILL_LAMBDA {
    const Int on = alive(at);
    const Reg<T> x = read(s + at) - max_s, y = read(t + at) - max_t;
    const Reg<T> e_s = where<T>(on, exp_of(x)), e_t = where<T>(on, exp_of(y));
    sum_s.part[c] += e_s;
    sum_t.part[c] += e_t;
    if constexpr (kind == Kind::jsd) {
      write(s + at, x);
      write(t + at, y);
    } else {
      const Reg<T> u = where<T>(on, kind == Kind::fkl ? y - x : kind == Kind::ce ? -x : x - y);
      sum_u.part[c] = multiply_add(kind == Kind::rkl ? e_s : e_t, u, sum_u.part[c]);
      if (gradient) {
        write(s + at, e_s);
        write(t + at, kind == Kind::rkl ? u : e_t);
      }
    }
  });
  const T total_s = sum_s.sum(), total_t = sum_t.sum();
  const T log_s = log_lane(total_s), log_t = log_lane(total_t);

  if constexpr (kind == Kind::fkl || kind == Kind::ce) {
    if (gradient) {
      const Reg<T> by_s = all(g / total_s), by_t = all(-(g / total_t));
      over_row<T>(size, [&](int64_t at, int)
                            PYDISTILL_LAMBDA { write(s + at, multiply_add(read(t + at), by_t, read(s + at) * by_s)); });
    }
    const T mean_u = sum_u.sum() / total_t;
    return kind == Kind::fkl ? mean_u + (log_s - log_t) : mean_u + log_s;
  } else if constexpr (kind == Kind::rkl) {
    const T mean_u = sum_u.sum() / total_s;
    if (gradient) {
      const Reg<T> by_s = all(g / total_s), centre = all(mean_u);
      over_row<T>(size, [&](int64_t at, int)
                            PYDISTILL_LAMBDA { write(s + at, (read(s + at) * by_s) * (read(t + at) - centre)); });
    }
    return mean_u + (log_t - log_s);
  } else {
    const T share = T(1) - beta;
    Running<T> sum_a(0), sum_b(0);
    over_row<T>(size, [&](int64_t at, int c) PYDISTILL_LAMBDA {
      const Int on = alive(at);
      const Reg<T> log_p_s = read(s + at) - all(log_s), log_p_t = read(t + at) - all(log_t);
      const Reg<T> p_s = where<T>(on, exp_of(log_p_s)), p_t = where<T>(on, exp_of(log_p_t));
      // in units of the larger probability, where the mixture is near one: by itself it may underflow
      const Reg<T> unit = p_t > p_s ? p_t : p_s, log_unit = p_t > p_s ? log_p_t : log_p_s;
      const Reg<T> log_mix = log_of<T>((p_t / unit) * all(beta) + (p_s / unit) * all(share));
      // a probability of zero does not count, whatever its logarithm
      const Reg<T> a = p_t == all(T(0)) ? all(T(0)) : (log_p_t - log_unit) - log_mix;
      const Reg<T> b = p_s == all(T(0)) ? all(T(0)) : (log_p_s - log_unit) - log_mix;
      sum_a.part[c] = multiply_add(p_t, a, sum_a.part[c]);
      sum_b.part[c] = multiply_add(p_s, b, sum_b.part[c]);
      if (gradient) {
        write(s + at, p_s);
        write(t + at, b);
      }
    });
    const T mean_a = sum_a.sum(), mean_b = sum_b.sum();
    if (gradient) {
      const Reg<T> weight = all(g * share), centre = all(mean_b);
      over_row<T>(size, [&](int64_t at, int)
                            PYDISTILL_LAMBDA { write(s + at, (read(s + at) * weight) * (read(t + at) - centre)); });
    }
    if (total_s == 0) return __builtin_nanf("");  // no key: the quotients of the other kinds
    return beta * mean_a + share * mean_b;
  }
}

template <class S>
PYDISTILL_INLINE const S* head(const Heads& heads, int64_t a, int64_t h) {
  return static_cast<const S*>(heads.data) + a * heads.a + h * heads.h;
}

// Rows [begin, begin + rows) of one head, widened, scaled and padded to whole vectors.
template <class T, class S>
PYDISTILL_INLINE void load_rows_of(const Heads& heads, int64_t a, int64_t h, int64_t begin, int64_t rows, int64_t width,
                                   int64_t padded, T scale, T* to) {
  for (int64_t n = 0; n < rows; ++n) {
    const S* const from = head<S>(heads, a, h) + (begin + n) * heads.row;
    T* const line = to + n * padded;
    if (heads.column == 1)
      for (int64_t d = 0; d < width; ++d) line[d] = scale * widen(from[d]);
    else
      for (int64_t d = 0; d < width; ++d) line[d] = scale * widen(from[d * heads.column]);
    for (int64_t d = width; d < padded; ++d) line[d] = 0;
  }
}

template <class T, class... Arguments>
void load_rows(Scalar scalar, Arguments... arguments) {
  if constexpr (sizeof(T) == 8) {
    load_rows_of<T, double>(arguments...);
  } else {
    if (scalar == Scalar::f32) load_rows_of<T, float>(arguments...);
    if (scalar == Scalar::bf16) load_rows_of<T, Bf16>(arguments...);
    if (scalar == Scalar::f16) load_rows_of<T, F16>(arguments...);
  }
}

template <class T, class S>
PYDISTILL_INLINE void store_rows_of(const T* from, int64_t rows, int64_t width, int64_t padded, T scale, void* to,
                                    int64_t first) {
  for (int64_t n = 0; n < rows; ++n) {
    S* const line = static_cast<S*>(to) + (first + n) * width;
    for (int64_t d = 0; d < width; ++d) narrow(scale * from[n * padded + d], line[d]);
  }
}

// Into a contiguous output, from row `first` on.
template <class T, class... Arguments>
void store_rows(Scalar scalar, Arguments... arguments) {
  if constexpr (sizeof(T) == 8) {
    store_rows_of<T, double>(arguments...);
  } else {
    if (scalar == Scalar::f32) store_rows_of<T, float>(arguments...);
    if (scalar == Scalar::bf16) store_rows_of<T, Bf16>(arguments...);
    if (scalar == Scalar::f16) store_rows_of<T, F16>(arguments...);
  }
}

// A head's [rows, columns] as panels of one vector's width of columns, row after row; or, transposed, of rows, column
// after column.
template <class T>
void pack_panels(Scalar scalar, const Heads& heads, int64_t a, int64_t h, int64_t rows, int64_t columns,
                 bool transposed, Vec<T>* panels) {
  constexpr int L = Lanes<T>::count;
  const int64_t size = scalar == Scalar::f64 ? 8 : scalar == Scalar::f32 ? 4 : 2;
  void* const data = static_cast<char*>(heads.data) + (a * heads.a + h * heads.h) * size;
  const int64_t positions = transposed ? columns : rows, channels = transposed ? rows : columns;
  const int64_t step = transposed ? heads.column : heads.row, stride = transposed ? heads.row : heads.column;
  const Map map{data, 0, stride, positions * step, step};
  for (int64_t c = 0; c < channels; c += L)
    pack<T>(scalar, map, 0, c, static_cast<int>(channels - c < L ? channels - c : L), 1, positions,
            panels + c / L * positions);
}

template <class T>
PYDISTILL_INLINE T row_of(Kind kind, T* s, T* t, const typename Bits<T>::Lane* live, int64_t size, bool gradient, T g,
                          T beta) {
  if (kind == Kind::fkl) return finish_row<T, Kind::fkl>(s, t, live, size, gradient, g, beta);
  if (kind == Kind::rkl) return finish_row<T, Kind::rkl>(s, t, live, size, gradient, g, beta);
  if (kind == Kind::jsd) return finish_row<T, Kind::jsd>(s, t, live, size, gradient, g, beta);
  return finish_row<T, Kind::ce>(s, t, live, size, gradient, g, beta);
}

// The rows of chunk `task % chunks` of head `task / chunks`.
template <class T>
void run_chunk(const Call& call, int64_t task, T* scratch) {
  constexpr int L = Lanes<T>::count;
  using Lane = typename Bits<T>::Lane;
  const int64_t M = call.M, group = task / call.chunks, chunk = task % call.chunks;
  const int64_t a = group / call.H, h = group % call.H;
  const int64_t begin = chunk * call.N / call.chunks, end = (chunk + 1) * call.N / call.chunks;
  const int64_t keys = attention_padded(M, sizeof(T)), stride = attention_row_stride(M, sizeof(T));
  const int64_t width_s = attention_padded(call.width_s, sizeof(T)),
                width_t = attention_padded(call.width_t, sizeof(T));
  const int64_t block = attention_block_rows(M, sizeof(T));
  const bool gradient = call.grad_q || call.grad_k;
  const T scale_s = static_cast<T>(call.scale_s);

  T* memory = scratch;
  const auto take = [&](int64_t size) {
    T* const taken = memory;
    memory += size;
    return taken;
  };
  T* const columns_s = take(keys * width_s);  // k_s transposed: the right factor of the scores
  T* const columns_t = take(keys * width_t);
  T* const rows_k = take(keys * width_s);  // k_s as it is: the right factor of grad_q
  T* const grad_k = take(keys * width_s);
  T *const s = take(block * stride), *const t = take(block * stride);
  T *const q_s = take(block * width_s), *const q_t = take(block * width_t), *const grad_q = take(block * width_s);
  Lane* const live = reinterpret_cast<Lane*>(take(keys));

  pack_panels<T>(call.scalar, call.k_s, a, h, M, call.width_s, true, reinterpret_cast<Vec<T>*>(columns_s));
  pack_panels<T>(call.scalar, call.k_t, a, h, M, call.width_t, true, reinterpret_cast<Vec<T>*>(columns_t));
  if (call.grad_q)
    pack_panels<T>(call.scalar, call.k_s, a, h, M, call.width_s, false, reinterpret_cast<Vec<T>*>(rows_k));
  T* const shares = call.chunks > 1 ? static_cast<T*>(call.parts) + task * M * width_s : grad_k;
  for (int64_t m = 0; m < keys; ++m) live[m] = m < M ? Lane(-1) : Lane(0);

  for (int64_t first = begin; first < end; first += block) {
    const int64_t rows = end - first < block ? end - first : block;
    load_rows<T>(call.scalar, call.q_s, a, h, first, rows, call.width_s, width_s, scale_s, q_s);
    load_rows<T>(call.scalar, call.q_t, a, h, first, rows, call.width_t, width_t, static_cast<T>(call.scale_t), q_t);
    multiply<T>(rows, call.width_s, keys / L, Left<T>{q_s, width_s, 1}, Right<T>{columns_s, L, call.width_s * L},
                Product<T>{s, stride, L, false});
    multiply<T>(rows, call.width_t, keys / L, Left<T>{q_t, width_t, 1}, Right<T>{columns_t, L, call.width_t * L},
                Product<T>{t, stride, L, false});
    for (int64_t n = 0; n < rows; ++n) {
      if (call.mask.data && (call.mask.row != 0 || (first == begin && n == 0))) {
        const uint8_t* const mask = head<uint8_t>(call.mask, a, h) + (first + n) * call.mask.row;
        for (int64_t m = 0; m < M; ++m) live[m] = -static_cast<Lane>(mask[m * call.mask.column] != 0);
      }
      const T g = call.grad.data ? head<T>(call.grad, a, h)[(first + n) * call.grad.row] : T(1);
      const T loss =
          row_of<T>(call.kind, s + n * stride, t + n * stride, live, keys, gradient, g, static_cast<T>(call.beta));
      if (call.loss) static_cast<T*>(call.loss)[group * call.N + first + n] = loss;
    }
    if (call.grad_q) {
      multiply<T>(rows, M, width_s / L, Left<T>{s, stride, 1}, Right<T>{rows_k, L, M * L},
                  Product<T>{grad_q, width_s, L, false});
      store_rows<T>(call.scalar, static_cast<const T*>(grad_q), rows, call.width_s, width_s, scale_s, call.grad_q,
                    group * call.N + first);
    }
    if (call.grad_k)
      multiply<T>(M, rows, width_s / L, Left<T>{s, 1, stride}, Right<T>{q_s, width_s, L},
                  Product<T>{shares, width_s, L, first > begin});
  }
  if (call.grad_k && call.chunks == 1)
    store_rows<T>(call.scalar, static_cast<const T*>(grad_k), M, call.width_s, width_s, T(1), call.grad_k, group * M);
}

// One row of grad_k: the chunks' shares, in order.
template <class T>
void add_row(const Call& call, int64_t task, T* line) {
  const int64_t width = attention_padded(call.width_s, sizeof(T)), group = task / call.M, m = task % call.M;
  const T* from = static_cast<const T*>(call.parts) + (group * call.chunks * call.M + m) * width;
  for (int64_t d = 0; d < width; ++d) line[d] = from[d];
  for (int64_t chunk = 1; chunk < call.chunks; ++chunk) {
    from += call.M * width;
    for (int64_t d = 0; d < width; ++d) line[d] += from[d];
  }
  store_rows<T>(call.scalar, static_cast<const T*>(line), int64_t{1}, call.width_s, width, T(1), call.grad_k, task);
}

template <class T>
void run_tasks(const Call& call, int64_t begin, int64_t end, T* scratch) {
  for (int64_t task = begin; task < end; ++task)
    call.add_parts ? add_row<T>(call, task, scratch) : run_chunk<T>(call, task, scratch);
}

}  // namespace

void PYDISTILL_KERNEL(const AttentionMapDivergence& call, int64_t begin, int64_t end, void* scratch) {
  with_number(call.scalar,
              [&](auto t) PYDISTILL_LAMBDA { run_tasks(call, begin, end, static_cast<decltype(t)*>(scratch)); });
}

}  // namespace pydistill
