// CPU body: see multi_crop.h for what is computed. The filter is separable: rows first, on adjacent elements, then
// columns, for which as many rows as a register has lanes are transposed, so that a tap is a register there too and
// nothing is gathered. Flip, roll and the part's place are all in the two axes' tables of taps. The adjoint goes the
// same way back; the owner of an image's rows adds to them in the order of records, parts and rows, so that neither
// threads nor instruction sets affect the bits.
#include "multi_crop.h"
#include "vocabulary/cpu_vocabulary.h"

namespace pydistill {
namespace {

using Call = MultiCrop;
using Form = Call::Form;

// Scratch memory, allocated piece by piece.
struct Memory {
  unsigned char* next;
  template <class T>
  T* take(int64_t count) {
    T* const taken = reinterpret_cast<T*>(next);
    next += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    return taken;
  }
};

// A part's row of the record, in the words of the loops below.
struct Part {
  int64_t source, top, left, height, width;
  bool flip;
  int64_t roll_y, roll_x;
  int64_t to_top, to_left, to_bottom, to_right;
  int64_t rows, columns, origin_y, origin_x;  // of the resized crop, and where it begins in the result
  double alpha;
  bool seen;
};

// Whether the part names an image, a box in it and a place in the result.
bool read_part(const Call& call, int64_t b, int64_t p, Part& part) {
  const auto value = [&](Call::Column column) PYDISTILL_LAMBDA {
    return call.record[b * call.record_row + p * call.record_part + column * call.record_column];
  };
  const auto whole = [&](Call::Column column) PYDISTILL_LAMBDA {
    const float v = value(column), limit = 1e9f;
    return static_cast<int64_t>(v > -limit ? (v < limit ? v : limit) : -limit);  // a NaN comes out as -limit
  };
  part.source = whole(Call::source);
  part.top = whole(Call::top), part.left = whole(Call::left);
  part.height = whole(Call::height), part.width = whole(Call::width);
  part.flip = value(Call::flip) != 0;
  part.roll_y = whole(Call::roll_y), part.roll_x = whole(Call::roll_x);
  part.to_top = whole(Call::to_top), part.to_left = whole(Call::to_left);
  part.to_bottom = part.to_top + whole(Call::to_height), part.to_right = part.to_left + whole(Call::to_width);
  const bool fit = value(Call::fit) != 0;
  part.rows = fit ? part.to_bottom - part.to_top : call.height_out;
  part.columns = fit ? part.to_right - part.to_left : call.width_out;
  part.origin_y = fit ? part.to_top : 0, part.origin_x = fit ? part.to_left : 0;
  part.alpha = value(Call::alpha);
  bool finite = true;
  for (int k = 0; k < Call::alpha; ++k) {
    const float v = value(static_cast<Call::Column>(k));
    finite &= v < 1e9f && v > -1e9f;
  }
  part.seen = part.to_top < part.to_bottom && part.to_left < part.to_right;
  const auto within = [](int64_t begin, int64_t end, int64_t size)
                          PYDISTILL_LAMBDA { return begin >= 0 && begin <= end && end <= size; };
  return finite && part.source >= 0 && part.source < call.N && part.height > 0 && part.width > 0 &&
         within(part.top, part.top + part.height, call.H) && within(part.left, part.left + part.width, call.W) &&
         within(part.to_top, part.to_bottom, call.height_out) && within(part.to_left, part.to_right, call.width_out);
}

bool read_parts(const Call& call, int64_t b, Part* parts) {
  bool valid = true;
  for (int64_t p = 0; p < call.parts; ++p) valid &= read_part(call, b, p, parts[p]);
  return valid;
}

// For every place on one axis of the result: the first pixel of the crop that it is made from, how many, and their
// weights.
template <class T>
struct Axis {
  int32_t *start, *count, *first;
  T* weight;

  static int64_t taps(int64_t in, int64_t out) { return 2 * in + 4 * out; }

  static Axis take(Memory& memory, int64_t in, int64_t out) {
    return {memory.take<int32_t>(out), memory.take<int32_t>(out), memory.take<int32_t>(out),
            memory.take<T>(taps(in, out))};
  }

  void set(int64_t in, int64_t size, int64_t origin, int64_t begin, int64_t end, int64_t roll, bool mirrored) {
    const int32_t n = static_cast<int32_t>(in), s = static_cast<int32_t>(size), m = n > s ? n : s;
    int64_t r = (begin - origin - roll) % size;
    r = r < 0 ? r + size : r;
    int32_t used = 0;
    for (int64_t k = begin; k < end; ++k, r = r + 1 == size ? 0 : r + 1) {
      const int32_t centre = (2 * static_cast<int32_t>(mirrored ? size - 1 - r : r) + 1) * n;
      const int32_t below = centre - 2 * m + s, above = centre + 2 * m + s - 1;
      const int32_t low = below > 0 ? below / (2 * s) : 0;
      const int32_t high = above / (2 * s) < n ? above / (2 * s) : n;
      start[k] = low, count[k] = high - low, first[k] = used;
      T* const w = weight + used;
      used += high - low;
      int64_t total = 0;
      for (int32_t x = low; x < high; ++x) {
        const int32_t off = (2 * x + 1) * s - centre, q = 2 * m - (off < 0 ? -off : off);
        total += q;
        w[x - low] = static_cast<T>(q);
      }
      // not times an inverse, which may not be exactly one where the whole weight is one pixel's
      for (int32_t t = 0; t < high - low; ++t)
        w[t] = static_cast<T>(static_cast<double>(w[t]) / static_cast<double>(total));
    }
  }
};

// Rows of T in scratch memory become columns: to[x * lanes + l] = from[l * pitch + x]; and back. `pitch` and `width`
// are multiples of four.
template <class T>
struct Columns {
  static constexpr int lanes = Registers<T>::lanes;
  static constexpr int block = 16 / sizeof(T);
  typedef T V __attribute__((vector_size(16)));

  static PYDISTILL_INLINE V get(const T* p) { return *reinterpret_cast<const V*>(p); }
  static PYDISTILL_INLINE void put(T* p, V v) { *reinterpret_cast<V*>(p) = v; }

  static PYDISTILL_INLINE void turn(V (&v)[block]) {
    if constexpr (block == 2) {
      const V first = __builtin_shufflevector(v[0], v[1], 0, 2);
      v[1] = __builtin_shufflevector(v[0], v[1], 1, 3);
      v[0] = first;
    } else {
      const V a = __builtin_shufflevector(v[0], v[1], 0, 4, 1, 5), b = __builtin_shufflevector(v[0], v[1], 2, 6, 3, 7);
      const V c = __builtin_shufflevector(v[2], v[3], 0, 4, 1, 5), d = __builtin_shufflevector(v[2], v[3], 2, 6, 3, 7);
      v[0] = __builtin_shufflevector(a, c, 0, 1, 4, 5), v[1] = __builtin_shufflevector(a, c, 2, 3, 6, 7);
      v[2] = __builtin_shufflevector(b, d, 0, 1, 4, 5), v[3] = __builtin_shufflevector(b, d, 2, 3, 6, 7);
    }
  }

  static void of_rows(const T* from, int64_t pitch, int64_t width, T* to) {
    for (int64_t x = 0; x < width; x += block)
      for (int l = 0; l < lanes; l += block) {
        V v[block];
        for (int i = 0; i < block; ++i) v[i] = get(from + (l + i) * pitch + x);
        turn(v);
        for (int i = 0; i < block; ++i) put(to + (x + i) * lanes + l, v[i]);
      }
  }

  static void to_rows(const T* from, int64_t width, T* to, int64_t pitch) {
    for (int64_t x = 0; x < width; x += block)
      for (int l = 0; l < lanes; l += block) {
        V v[block];
        for (int i = 0; i < block; ++i) v[i] = get(from + (x + i) * lanes + l);
        turn(v);
        for (int i = 0; i < block; ++i) put(to + (l + i) * pitch + x, v[i]);
      }
  }
};

PYDISTILL_INLINE int64_t padded(int64_t width) { return (width + 15) / 16 * 16; }

// to = sum over the rows of a tap.
template <class T>
PYDISTILL_INLINE void mix_rows(const T* __restrict from, int64_t pitch, int64_t count, const T* weight, int64_t width,
                               T* __restrict to) {
  const T w0 = weight[0];
  if (count == 1) {
    for (int64_t x = 0; x < width; ++x) to[x] = w0 * from[x];
    return;
  }
  const T w1 = weight[1];
  for (int64_t x = 0; x < width; ++x) to[x] = w0 * from[x] + w1 * from[pitch + x];
  for (int64_t t = 2; t < count; ++t) {
    const T w = weight[t];
    const T* __restrict row = from + t * pitch;
    for (int64_t x = 0; x < width; ++x) to[x] += w * row[x];
  }
}

template <class T>
PYDISTILL_INLINE void add_row(const T* __restrict from, T weight, int64_t width, T* __restrict to) {
  for (int64_t x = 0; x < width; ++x) to[x] += weight * from[x];
}

// How much of part p is seen in row i of the result, for columns [part.to_left, part.to_right).
template <class T>
void visible(const Part* parts, int64_t count, int64_t p, int64_t i, T* weight) {
  const Part& part = parts[p];
  for (int64_t j = part.to_left; j < part.to_right; ++j) weight[j] = static_cast<T>(part.alpha);
  for (int64_t q = p + 1; q < count; ++q) {
    const Part& over = parts[q];
    if (i < over.to_top || i >= over.to_bottom) continue;
    const int64_t begin = part.to_left > over.to_left ? part.to_left : over.to_left;
    const int64_t end = part.to_right < over.to_right ? part.to_right : over.to_right;
    const T left = static_cast<T>(1 - over.alpha);
    for (int64_t j = begin; j < end; ++j) weight[j] *= left;
  }
}

// Pixels of [T]: where a row of a plane begins.
template <class T>
struct Plane {
  const T* data;
  int64_t pitch;
};

// A part's crop of one channel, base included: in place if possible, else in `copy`.
template <class S, class T>
Plane<T> plane_of(const Call& call, const Part& part, int64_t c, T* copy) {
  const Map& from = call.from;
  const S* const image =
      static_cast<const S*>(from.data) + part.source * from.n + c * from.c + part.top * from.h + part.left * from.w;
  if constexpr (sizeof(S) == sizeof(T)) {
    if (call.in_place) return {image, from.h};
  }
  const Map& base = call.base;
  const S* const added =
      base.data ? static_cast<const S*>(base.data) + c * base.c + part.top * base.h + part.left * base.w : nullptr;
  for (int64_t y = 0; y < part.height; ++y) {
    T* const to = copy + y * part.width;
    const S* const row = image + y * from.h;
    if (from.w == 1)
      for (int64_t x = 0; x < part.width; ++x) to[x] = widen(row[x]);
    else
      for (int64_t x = 0; x < part.width; ++x) to[x] = widen(row[x * from.w]);
    if (!added) continue;
    const S* const base_row = added + y * base.h;
    for (int64_t x = 0; x < part.width; ++x) to[x] += widen(base_row[x * base.w]);
  }
  return {copy, part.width};
}

template <class S, class T>
void forward_rows(const Call& call, int64_t begin, int64_t end, Memory memory) {
  constexpr int lanes = Columns<T>::lanes;
  const int64_t P = call.parts, rows_out = call.height_out, columns_out = call.width_out;
  const int64_t pitch_in = padded(call.W), pitch_out = padded(columns_out);
  Part parts[Call::max_parts];
  Axis<T> down[Call::max_parts], across[Call::max_parts];
  Plane<T> planes[Call::max_parts];
  T* copies[Call::max_parts];
  for (int64_t p = 0; p < P; ++p) {
    down[p] = Axis<T>::take(memory, call.H, rows_out), across[p] = Axis<T>::take(memory, call.W, columns_out);
    copies[p] = memory.take<T>(call.in_place ? 0 : call.H * call.W);
  }
  T* const in = memory.take<T>(lanes * pitch_in);
  T* const in_columns = memory.take<T>(lanes * pitch_in);
  T* const out_columns = memory.take<T>(lanes * pitch_out);
  T* const crop = memory.take<T>(lanes * pitch_out);
  T* const out = memory.take<T>(lanes * pitch_out);
  T* const weight = memory.take<T>(columns_out);
  for (int64_t k = 0; k < lanes * pitch_in; ++k) in[k] = 0;

  const int64_t rows_of_image = call.C * rows_out;
  S* const to = static_cast<S*>(call.to.data);
  for (int64_t next = begin; next < end;) {
    const int64_t b = next / rows_of_image;
    const int64_t last = (b + 1) * rows_of_image < end ? (b + 1) * rows_of_image : end;
    if (!read_parts(call, b, parts)) {
      for (int64_t k = next * columns_out; k < last * columns_out; ++k) narrow(T(__builtin_nanf("")), to[k]);
      next = last;
      continue;
    }
    for (int64_t p = 0; p < P; ++p) {
      const Part& part = parts[p];
      if (!part.seen) continue;
      down[p].set(part.height, part.rows, part.origin_y, part.to_top, part.to_bottom, part.roll_y, false);
      across[p].set(part.width, part.columns, part.origin_x, part.to_left, part.to_right, part.roll_x, part.flip);
    }
    const bool alone = P == 1 && parts[0].alpha == 1;
    while (next < last) {
      const int64_t c = next / rows_out % call.C, i0 = next % rows_out;
      const int64_t i1 = rows_out - i0 < last - next ? rows_out : i0 + last - next;
      const T mean = static_cast<T>(call.norm && !call.linear ? call.norm[c] : 0);
      const T factor = static_cast<T>(call.norm ? 1 / call.norm[call.C + c] : 1);
      for (int64_t p = 0; p < P; ++p)
        if (parts[p].seen) planes[p] = plane_of<S>(call, parts[p], c, copies[p]);
      for (int64_t i = i0; i < i1; i += lanes) {
        const int64_t stop = i + lanes < i1 ? i + lanes : i1;
        for (int64_t k = 0; k < lanes * pitch_out; ++k) out[k] = 0;
        for (int64_t p = 0; p < P; ++p) {
          const Part& part = parts[p];
          const int64_t top = part.to_top > i ? part.to_top : i, bottom = part.to_bottom < stop ? part.to_bottom : stop;
          if (!part.seen || top >= bottom) continue;
          for (int64_t k = top; k < bottom; ++k)
            mix_rows(planes[p].data + down[p].start[k] * planes[p].pitch, planes[p].pitch, down[p].count[k],
                     down[p].weight + down[p].first[k], part.width, in + (k - i) * pitch_in);
          Columns<T>::of_rows(in, pitch_in, padded(part.width), in_columns);
          for (int64_t j = part.to_left; j < part.to_right; ++j) {
            const T* const w = across[p].weight + across[p].first[j];
            const T* const from = in_columns + across[p].start[j] * lanes;
            Register<T> sum = load_register(from) * w[0];
            for (int64_t t = 1; t < across[p].count[j]; ++t) sum += load_register(from + t * lanes) * w[t];
            *reinterpret_cast<Register<T>*>(out_columns + (j - part.to_left) * lanes) = sum;
          }
          const int64_t width = part.to_right - part.to_left;
          Columns<T>::to_rows(out_columns, padded(width), crop, pitch_out);
          for (int64_t k = top; k < bottom; ++k) {
            const T* __restrict const from = crop + (k - i) * pitch_out;
            T* __restrict const row = out + (k - i) * pitch_out + part.to_left;
            if (alone) {
              for (int64_t j = 0; j < width; ++j) row[j] = from[j];
              continue;
            }
            visible(parts, P, p, k, weight);
            const T* __restrict const w = weight + part.to_left;
            for (int64_t j = 0; j < width; ++j) row[j] += w[j] == 0 ? T(0) : w[j] * from[j];
          }
        }
        for (int64_t k = i; k < stop; ++k) {
          S* const row = to + (next - i0 + k) * columns_out;
          const T* const from = out + (k - i) * pitch_out;
          if (call.norm)
            for (int64_t j = 0; j < columns_out; ++j) narrow((from[j] - mean) * factor, row[j]);
          else
            for (int64_t j = 0; j < columns_out; ++j) narrow(from[j], row[j]);
        }
      }
      next += i1 - i0;
    }
  }
}

// Adds the contribution of part p of record b to rows [y0, y1) of channel c of its image.
template <class S, class T>
struct Adjoint {
  static constexpr int lanes = Columns<T>::lanes;
  const Call& call;
  const int64_t pitch_in, pitch_out;
  Axis<T> down, across;
  T *out, *out_columns, *in_columns, *in, *weight;

  Adjoint(const Call& call, Memory& memory) : call(call), pitch_in(padded(call.W)), pitch_out(padded(call.width_out)) {
    down = Axis<T>::take(memory, call.H, call.height_out), across = Axis<T>::take(memory, call.W, call.width_out);
    out = memory.take<T>(lanes * pitch_out), out_columns = memory.take<T>(lanes * pitch_out);
    in_columns = memory.take<T>(lanes * pitch_in), in = memory.take<T>(lanes * pitch_in);
    weight = memory.take<T>(call.width_out);
    for (int64_t k = 0; k < lanes * pitch_out; ++k) out[k] = 0;
  }

  void prepare(const Part& part) {
    down.set(part.height, part.rows, part.origin_y, part.to_top, part.to_bottom, part.roll_y, false);
    across.set(part.width, part.columns, part.origin_x, part.to_left, part.to_right, part.roll_x, part.flip);
  }

  void load(const Part* parts, int64_t b, int64_t p, int64_t c, int64_t i, T factor, T* to) {
    const Map& from = call.from;
    const Part& part = parts[p];
    const int64_t width = part.to_right - part.to_left;
    const S* const row =
        static_cast<const S*>(from.data) + b * from.n + c * from.c + i * from.h + part.to_left * from.w;
    if (from.w == 1)
      for (int64_t j = 0; j < width; ++j) to[j] = factor * widen(row[j]);
    else
      for (int64_t j = 0; j < width; ++j) to[j] = factor * widen(row[j * from.w]);
    if (call.parts == 1 && part.alpha == 1) return;
    visible(parts, call.parts, p, i, weight);
    const T* const w = weight + part.to_left;
    for (int64_t j = 0; j < width; ++j) to[j] = w[j] == 0 ? T(0) : w[j] * to[j];
  }

  // `plane` [H, W] of channel c.
  void add(const Part* parts, int64_t b, int64_t p, int64_t c, int64_t y0, int64_t y1, T factor, T* plane) {
    const Part& part = parts[p];
    const int64_t width = part.to_right - part.to_left;
    int64_t row[lanes];
    for (int64_t i = part.to_top; i < part.to_bottom;) {
      int used = 0;
      for (; i < part.to_bottom && used < lanes; ++i) {
        const int64_t first = part.top + down.start[i];
        if (first >= y1 || first + down.count[i] <= y0) continue;
        load(parts, b, p, c, i, factor, out + used * pitch_out);
        row[used++] = i;
      }
      if (!used) continue;
      Columns<T>::of_rows(out, pitch_out, padded(width), out_columns);
      for (int64_t k = 0; k < lanes * padded(part.width); ++k) in_columns[k] = 0;
      for (int64_t j = part.to_left; j < part.to_right; ++j) {
        const T* const w = across.weight + across.first[j];
        T* const to = in_columns + across.start[j] * lanes;
        const Register<T> g = load_register(out_columns + (j - part.to_left) * lanes);
        for (int64_t t = 0; t < across.count[j]; ++t) *reinterpret_cast<Register<T>*>(to + t * lanes) += g * w[t];
      }
      Columns<T>::to_rows(in_columns, padded(part.width), in, pitch_in);
      for (int l = 0; l < used; ++l)
        for (int64_t t = 0; t < down.count[row[l]]; ++t) {
          const int64_t y = part.top + down.start[row[l]] + t;
          if (y < y0 || y >= y1) continue;
          add_row(in + l * pitch_in, down.weight[down.first[row[l]] + t], part.width, plane + y * call.W + part.left);
        }
    }
  }
};

template <class S, class T>
void backward_rows(const Call& call, int64_t begin, int64_t end, Memory memory) {
  const int64_t C = call.C, H = call.H, W = call.W;
  Adjoint<S, T> adjoint(call, memory);
  T* const planes = memory.take<T>(C * H * W);
  S* const to = static_cast<S*>(call.to.data);
  Part parts[Call::max_parts];
  for (int64_t next = begin; next < end;) {
    const int64_t n = next / (C * H), start = n * C * H;
    const int64_t last = start + C * H < end ? start + C * H : end;
    for (int64_t k = (next - start) * W; k < (last - start) * W; ++k) planes[k] = 0;
    for (int64_t k = call.first[n]; k < call.first[n + 1]; ++k) {
      const int64_t b = call.parts_of[k] / call.parts, p = call.parts_of[k] % call.parts;
      if (!read_parts(call, b, parts) || !parts[p].seen) continue;
      adjoint.prepare(parts[p]);
      for (int64_t c = (next - start) / H; c * H < last - start; ++c) {
        const int64_t y0 = next - start - c * H, y1 = last - start - c * H;
        const T factor = static_cast<T>(call.norm ? 1 / call.norm[C + c] : 1);
        adjoint.add(parts, b, p, c, y0 > 0 ? y0 : 0, y1 < H ? y1 : H, factor, planes + c * H * W);
      }
    }
    for (int64_t k = (next - start) * W; k < (last - start) * W; ++k) narrow(planes[k], to[start * W + k]);
    next = last;
  }
}

template <class S, class T>
void run(const Call& call, int64_t begin, int64_t end, void* scratch) {
  const Memory memory{static_cast<unsigned char*>(scratch)};
  if (call.form == Form::forward)
    forward_rows<S, T>(call, begin, end, memory);
  else
    backward_rows<S, T>(call, begin, end, memory);
}

}  // namespace

// Rows [begin, end) of all channels' planes of the results, one after the other, or of the images in the backward.
void PYDISTILL_KERNEL(const MultiCrop& call, int64_t begin, int64_t end, void* scratch) {
  with_types(call.scalar,
             [&](auto t, auto s) PYDISTILL_LAMBDA { run<decltype(s), decltype(t)>(call, begin, end, scratch); });
}

}  // namespace pydistill
