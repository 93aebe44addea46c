// CPU body: see augment.h for what is computed. One image at a time goes through its stages in scratch memory that
// stays in the nearest caches. Up to cutout and flip its channels are planes of [H, W]; for the resamplings four
// adjacent channels are interleaved into pixels, so that a tap is one short vector, within a ring of zeros two pixels
// wide, so that no tap needs a bounds check. Coordinates are in double; sums run in a fixed order of sixteen partial
// sums, so that instruction sets of any width give the same bits.
#include "augment_planes.h"

namespace pydistill {
namespace {

// L adjacent channels of a pixel.
template <class T, int L>
struct Pixel {
  typedef T Type __attribute__((vector_size(L * sizeof(T)), aligned(sizeof(T))));
};
template <class T>
struct Pixel<T, 1> {
  typedef T Type;
};

template <class T, int L>
PYDISTILL_INLINE typename Pixel<T, L>::Type pixel(const T* at) {
  return *reinterpret_cast<const typename Pixel<T, L>::Type*>(at);
}

template <class T, int L>
PYDISTILL_INLINE void set_pixel(T* at, typename Pixel<T, L>::Type v) {
  *reinterpret_cast<typename Pixel<T, L>::Type*>(at) = v;
}

// From four vectors, the four that hold their first, second, third and fourth elements.
template <class P>
PYDISTILL_INLINE void transpose_four(P (&v)[4]) {
  const P low = __builtin_shufflevector(v[0], v[1], 0, 4, 1, 5), high = __builtin_shufflevector(v[0], v[1], 2, 6, 3, 7);
  const P low_2 = __builtin_shufflevector(v[2], v[3], 0, 4, 1, 5);
  const P high_2 = __builtin_shufflevector(v[2], v[3], 2, 6, 3, 7);
  v[0] = __builtin_shufflevector(low, low_2, 0, 1, 4, 5), v[1] = __builtin_shufflevector(low, low_2, 2, 3, 6, 7);
  v[2] = __builtin_shufflevector(high, high_2, 0, 1, 4, 5), v[3] = __builtin_shufflevector(high, high_2, 2, 3, 6, 7);
}

// W positions of L planes into pixels, and back into the first `lanes` of them.
template <class T, int L>
PYDISTILL_INLINE void weave(const T* const* planes, int64_t offset, int64_t W, T* pixels) {
  int64_t j = 0;
  if constexpr (L == 4) {
    for (; j + 4 <= W; j += 4) {
      typename Pixel<T, 4>::Type v[4];
      for (int l = 0; l < 4; ++l) v[l] = pixel<T, 4>(planes[l] + offset + j);
      transpose_four(v);
      for (int k = 0; k < 4; ++k) set_pixel<T, 4>(pixels + (j + k) * 4, v[k]);
    }
  }
  for (; j < W; ++j)
    for (int l = 0; l < L; ++l) pixels[L * j + l] = planes[l][offset + j];
}

template <class T, int L>
PYDISTILL_INLINE void unweave(const T* pixels, int64_t offset, int64_t W, int64_t lanes, T* const* planes) {
  int64_t j = 0;
  if constexpr (L == 4) {
    for (; j + 4 <= W; j += 4) {
      typename Pixel<T, 4>::Type v[4];
      for (int k = 0; k < 4; ++k) v[k] = pixel<T, 4>(pixels + (j + k) * 4);
      transpose_four(v);
      for (int l = 0; l < 4; ++l)
        if (l < lanes) set_pixel<T, 4>(planes[l] + offset + j, v[l]);
    }
  }
  for (; j < W; ++j)
    for (int64_t l = 0; l < lanes; ++l) planes[l][offset + j] = pixels[L * j + l];
}

// Where results of one axis come from: a source index in the ring's frame, and the weights of it and of the next.
template <class T>
struct Axis {
  int32_t* index;
  T *near, *far;

  static Axis take(Memory& memory, int64_t size) {
    return {memory.take<int32_t>(size), memory.take<T>(size), memory.take<T>(size)};
  }

  void set(double scale, int64_t size) {
    const double centre = static_cast<double>(size - 1) / 2, limit = static_cast<double>(size + ring);
    for (int64_t k = 0; k < size; ++k) {
      const double at =
          between(0, scale * (static_cast<double>(static_cast<int32_t>(k)) - centre) + centre + ring, limit);
      index[k] = static_cast<int32_t>(at);
      far[k] = static_cast<T>(at - index[k]);
      near[k] = 1 - far[k];
    }
  }
};

// The taps of one row of the rotation: offsets of pixels in the ring's frame, and four weights each.
template <class T>
struct Taps {
  int32_t* offset;
  T* weight[4];

  static Taps take(Memory& memory, int64_t W) {
    return {memory.take<int32_t>(W), {memory.take<T>(W), memory.take<T>(W), memory.take<T>(W), memory.take<T>(W)}};
  }

  void set(const Parameters& p, int64_t i, int64_t H, int64_t W) {
    const double centre_x = static_cast<double>(W - 1) / 2, centre_y = static_cast<double>(H - 1) / 2;
    const double v = static_cast<double>(i) - centre_y;
    const double x0 = p.xy * v + (centre_x + ring), y0 = p.yy * v + (centre_y + ring);
    const double limit_x = static_cast<double>(W + ring), limit_y = static_cast<double>(H + ring);
    const int32_t pitch = static_cast<int32_t>(W + 2 * ring);
    for (int64_t j = 0; j < W; ++j) {
      const double u = static_cast<double>(static_cast<int32_t>(j)) - centre_x;
      const double x = between(0, p.xx * u + x0, limit_x), y = between(0, p.yx * u + y0, limit_y);
      const int32_t column = static_cast<int32_t>(x), row = static_cast<int32_t>(y);
      const T right = static_cast<T>(x - column), below = static_cast<T>(y - row), left = 1 - right, above = 1 - below;
      offset[j] = row * pitch + column;
      weight[0][j] = above * left;
      weight[1][j] = above * right;
      weight[2][j] = below * left;
      weight[3][j] = below * right;
    }
  }
};

// Both resamplings of up to L channels at a time.
template <class T, int L>
struct Resampling {
  using P = typename Pixel<T, L>::Type;

  const int64_t C, H, W, pitch = W + 2 * ring;  // of pixels in the ring's frame
  T *zeros, *first, *second, *row;
  Axis<T> across, down;
  Taps<T> taps;

  Resampling(int64_t C, int64_t H, int64_t W, Memory& memory) : C(C), H(H), W(W) {
    zeros = memory.take<T>(H * W);  // stands in for the channels that the last group lacks
    first = memory.take<T>(framed()), second = memory.take<T>(framed());
    row = memory.take<T>(pitch * L);
    across = Axis<T>::take(memory, W), down = Axis<T>::take(memory, H);
    taps = Taps<T>::take(memory, W);
    clear(zeros, H * W), clear(first, framed()), clear(second, framed());
  }

  int64_t framed() const { return (H + 2 * ring) * pitch * L; }
  T* inside(T* frame, int64_t i) const { return frame + ((i + ring) * pitch + ring) * L; }
  static void clear(T* memory, int64_t count) {
    for (int64_t k = 0; k < count; ++k) memory[k] = 0;
  }

  // Channels [c, c + lanes) of [C, H, W] planes.
  int64_t group(T* planes, int64_t c, T* (&own)[4]) const {
    const int64_t lanes = C - c < L ? C - c : L;
    for (int64_t l = 0; l < 4; ++l) own[l] = l < lanes ? planes + (c + l) * H * W : zeros;
    return lanes;
  }

  void forward(const Parameters& p, T* x, T* y) {
    if (p.scales) across.set(p.scale_x, W), down.set(p.scale_y, H);
    for (int64_t c = 0; c < C; c += L) {
      T *from[4], *to[4];
      group(x, c, from);
      const int64_t lanes = group(y, c, to);
      for (int64_t i = 0; i < H; ++i) weave<T, L>(from, i * W, W, inside(first, i));
      if (p.scales) scale(first, second);
      const T* const source = p.scales ? second : first;
      for (int64_t i = 0; i < H; ++i) {
        if (p.rotates) {
          taps.set(p, i, H, W);
          for (int64_t j = 0; j < W; ++j) {
            const T *const above = source + taps.offset[j] * int64_t{L}, *const below = above + pitch * L;
            set_pixel<T, L>(row + j * L,
                            (taps.weight[0][j] * pixel<T, L>(above) + taps.weight[1][j] * pixel<T, L>(above + L)) +
                                (taps.weight[2][j] * pixel<T, L>(below) + taps.weight[3][j] * pixel<T, L>(below + L)));
          }
        }
        unweave<T, L>(p.rotates ? row : inside(second, i), i * W, W, lanes, to);
      }
    }
  }

  void scale(const T* from, T* to) {
    for (int64_t i = 0; i < H; ++i) {
      const T *const above = from + down.index[i] * pitch * L, *const below = above + pitch * L;
      const T near = down.near[i], far = down.far[i];
      for (int64_t k = 0; k < pitch * L; ++k) row[k] = near * above[k] + far * below[k];
      T* const own = inside(to, i);
      for (int64_t j = 0; j < W; ++j) {
        const T* const at = row + across.index[j] * int64_t{L};
        set_pixel<T, L>(own + j * L, across.near[j] * pixel<T, L>(at) + across.far[j] * pixel<T, L>(at + L));
      }
    }
  }

  void adjoint(const Parameters& p, T* y, T* x) {
    if (p.scales) across.set(p.scale_x, W), down.set(p.scale_y, H);
    for (int64_t c = 0; c < C; c += L) {
      T *from[4], *to[4];
      group(y, c, from);
      const int64_t lanes = group(x, c, to);
      T *at = first, *other = second;
      if (p.rotates) {
        clear(at, framed());
        for (int64_t i = 0; i < H; ++i) {
          weave<T, L>(from, i * W, W, row);
          taps.set(p, i, H, W);
          for (int64_t j = 0; j < W; ++j) {
            const P g = pixel<T, L>(row + j * L);
            T *const above = at + taps.offset[j] * int64_t{L}, *const below = above + pitch * L;
            set_pixel<T, L>(above, pixel<T, L>(above) + taps.weight[0][j] * g);
            set_pixel<T, L>(above + L, pixel<T, L>(above + L) + taps.weight[1][j] * g);
            set_pixel<T, L>(below, pixel<T, L>(below) + taps.weight[2][j] * g);
            set_pixel<T, L>(below + L, pixel<T, L>(below + L) + taps.weight[3][j] * g);
          }
        }
      } else {
        for (int64_t i = 0; i < H; ++i) weave<T, L>(from, i * W, W, inside(at, i));
      }
      if (p.scales) {
        scale_adjoint(at, other);
        at = other;
      }
      for (int64_t i = 0; i < H; ++i) unweave<T, L>(inside(at, i), i * W, W, lanes, to);
    }
  }

  // Down first, whole rows at a time, then across, back into `from`'s memory and out of it.
  void scale_adjoint(T* from, T* to) {
    clear(to, framed());
    for (int64_t i = 0; i < H; ++i) {
      T *const above = to + down.index[i] * pitch * L, *const below = above + pitch * L;
      const T* const own = from + (i + ring) * pitch * L;
      const T near = down.near[i], far = down.far[i];
      for (int64_t k = 0; k < pitch * L; ++k) above[k] += near * own[k];
      for (int64_t k = 0; k < pitch * L; ++k) below[k] += far * own[k];
    }
    for (int64_t i = 0; i < H; ++i) {
      T* const own = inside(to, i);
      clear(row, pitch * L);
      for (int64_t j = 0; j < W; ++j) {
        T* const at = row + across.index[j] * int64_t{L};
        const P g = pixel<T, L>(own + j * L);
        set_pixel<T, L>(at, pixel<T, L>(at) + across.near[j] * g);
        set_pixel<T, L>(at + L, pixel<T, L>(at + L) + across.far[j] * g);
      }
      for (int64_t k = 0; k < W * L; ++k) own[k] = row[ring * L + k];
    }
  }
};

template <class T, int L>
void run_images(const Call& call, int64_t begin, int64_t end, void* scratch) {
  const int64_t C = call.C, H = call.H, W = call.W, count = H * W;
  Memory memory{static_cast<unsigned char*>(scratch)};
  T *x = memory.take<T>(C * count), *y = memory.take<T>(C * count);
  T *const means = memory.take<T>(count), *const total = memory.take<T>(C * count);
  Resampling<T, L> resampling(C, H, W, memory);

  for (int64_t n = begin; n < end; ++n) {
    if (call.form == Form::forward) {
      const Parameters p = parameters_of(call, n);
      load_planes(call, n % call.N, x);
      colour(p, C, count, x, means);
      if (moves(p)) {
        place(p, C, H, W, x, y);
        T* const swapped = x;
        x = y, y = swapped;
      }
      if (!p.finite) {
        for (int64_t k = 0; k < C * count; ++k) y[k] = __builtin_nanf("");
      } else if (p.scales || p.rotates) {
        resampling.forward(p, x, y);
      }
      store_planes(call, !p.finite || p.scales || p.rotates ? y : x, n);
    } else {
      for (int64_t k = 0; k < C * count; ++k) total[k] = 0;
      for (int64_t copy = 0; copy < call.copies; ++copy) {
        const Parameters p = parameters_of(call, n + copy * call.N);
        load_planes(call, n + copy * call.N, y);
        if (p.finite && (p.scales || p.rotates)) {
          resampling.adjoint(p, y, x);
          T* const swapped = x;
          x = y, y = swapped;
        }
        if (moves(p)) {
          place_adjoint(p, C, H, W, y, x);
          T* const swapped = x;
          x = y, y = swapped;
        }
        if (!p.finite)
          for (int64_t k = 0; k < C * count; ++k) y[k] = __builtin_nanf("");
        add_colour_adjoint(p, C, count, y, means, total);
      }
      store_planes(call, total, n);
    }
  }
}

}  // namespace

// begin and end count results, or images for the backward.
void PYDISTILL_KERNEL(const Augment& call, int64_t begin, int64_t end, void* scratch) {
  with_number(call.scalar, [&](auto t) PYDISTILL_LAMBDA {
    using T = decltype(t);
    call.C == 1 ? run_images<T, 1>(call, begin, end, scratch) : run_images<T, 4>(call, begin, end, scratch);
  });
}

}  // namespace pydistill
