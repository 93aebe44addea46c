// CPU body: see frozen_conv2d.h for what is computed and winograd.h for the transforms. A chunk of tiles is transformed
// to [36][tiles][C]; then, for some output channels at a time, 36 matrix products and the transform back.
#include "frozen_conv2d.h"
#include "frozen_conv2d_inputs.h"
#include "vocabulary/matrix_product.h"

namespace pydistill {
namespace {

template <class T, class S, class P, int SIDE>
class Convolution : Inputs<T, S, P> {
  using Base = Inputs<T, S, P>;
  using Base::below, Base::C, Base::call, Base::count, Base::ends, Base::factors, Base::first, Base::H, Base::inputs,
      Base::K, Base::order, Base::points_across, Base::points_down, Base::product_plane, Base::products, Base::right,
      Base::row, Base::tile, Base::W, Base::input_plane, Base::filter_plane, Base::kFactors, Base::kLanes,
      Base::kPaired, Base::L;
  using typename Base::R;
  using typename Base::Tile;
  // Terms of one sum: of sums of sums less is lost in rounding than of a long one. Integers lose nothing.
  static constexpr int64_t kDepth = kPaired ? int64_t{1} << 30 : 64;

 public:
  Convolution(const FrozenConv2d& call, void* scratch) : Base(call, scratch) {}

  void run(int64_t begin, int64_t end) {
    const int64_t parts = call.parts();
    int64_t transformed = -1;
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t chunk = unit / parts, group = unit % parts * call.part, outputs = call.outputs();
      first = chunk * call.chunk;
      count = call.tiles() - first < call.chunk ? call.tiles() - first : call.chunk;
      if (chunk != transformed) {
        Base::sort_tiles();
        Base::whole() ? Base::template transform_inputs<false>() : Base::template transform_inputs<true>();
      }
      transformed = chunk;
      const int64_t groups = outputs - group < call.part ? outputs - group : call.part;
      for (int64_t p = 0; p < kPoints; ++p) multiply_point(p, group, groups);
      Base::whole() ? transform_outputs<false>(group, groups) : transform_outputs<true>(group, groups);
    }
  }

 private:
  // A stride of two leaves one of three taps to every other row of pixels and two to those between. Of one tap, the
  // transform is zero at one point: nothing is multiplied there. Channels, or pairs or vectors of them, come by phases:
  // even rows' even columns and odd ones, odd rows' even ones and odd ones.
  static bool is_zero(int64_t p, int64_t phase, int64_t point) {
    return (p / 6 == point && phase < 2) || (p % 6 == point && phase % 2 == 0);
  }
  int64_t depth_of_phase() const {  // 0: not of these
    return SIDE == 5 && call.of_cells() && C % (kPaired ? 8 : 4) == 0 ? call.depth() / 4 : 0;
  }
  int64_t vectors_of_phase() const { return SIDE == 5 && call.to_cells() && K % (4 * L) == 0 ? K / (4 * L) : 0; }

  void multiply_point(int64_t p, int64_t group, int64_t groups) {
    const bool of_rows = is_left_out(below, p / 6), of_columns = is_left_out(right, p % 6);
    const int64_t from = of_rows ? ends[0] : 0, to = of_columns ? ends[1] : of_rows ? ends[2] : count;
    P* const out = products + p * product_plane + from * call.part * L;
    if (const int64_t phase = vectors_of_phase()) {
      for (int64_t v = 0, end; v < groups; v = end) {
        const bool zero = is_zero(p, (group + v) / phase, 5);
        end = v;
        do end = ((group + end) / phase + 1) * phase - group;
        while (end < groups && is_zero(p, (group + end) / phase, 5) == zero);
        if (end > groups) end = groups;
        if (!zero) multiply_depths(p, group + v, end - v, from, to, 0, call.depth(), out + v * L, false);
        for (int64_t t = 0; t < to - from && zero; ++t)
          for (int64_t i = v * L; i < end * L; i += Registers<P>::lanes)
            *reinterpret_cast<Register<P>*>(out + t * call.part * L + i) = Register<P>{};
      }
    } else if (const int64_t phase = depth_of_phase()) {
      bool add = false;
      for (int64_t d = 0, end; d < call.depth(); d = end) {
        const bool zero = is_zero(p, d / phase, 0);
        end = d;
        do end += phase;
        while (end < call.depth() && is_zero(p, end / phase, 0) == zero);
        if (zero) continue;
        multiply_depths(p, group, groups, from, to, d, end, out, add);
        add = true;
      }
    } else {
      multiply_depths(p, group, groups, from, to, 0, call.depth(), out, false);
    }
  }

  // At point p: of tiles [from, to), vectors [first_vector, + vectors) of output channels, of input channels [d, end).
  void multiply_depths(int64_t p, int64_t first_vector, int64_t vectors, int64_t from, int64_t to, int64_t d,
                       int64_t end, P* out, bool add) const {
    const P* const factors_of_point = filter(p, first_vector) + (kPaired ? L : 0);
    for (; d < end; d += kDepth, add = true)
      multiply<P>(to - from, end - d < kDepth ? end - d : kDepth, vectors,
                  {inputs + p * input_plane + from * row + d, row, 1},
                  {factors_of_point + d * L, L, call.filter_rows() * L, false}, {out, call.part * L, L, add});
  }

  const P* filter(int64_t point, int64_t vector) const {
    return static_cast<const P*>(call.filters) + (point * call.outputs() + vector) * call.filter_rows() * L;
  }

  template <bool EDGES>
  __attribute__((noinline)) void transform_outputs(int64_t group, int64_t groups) {
    for (int64_t t = 0; t < count; ++t) {
      const Tile at = tile(order[t]);
      const int down = EDGES ? points_down(at.h) : 6, across = EDGES ? points_across(at.w) : 6;
      S* const image = static_cast<S*>(call.y) + at.n * H * W * K;
      const bool inner = at.h + SIDE <= H && at.w + SIDE <= W;
      for (int64_t k = 0; k < groups * L; k += kLanes) {
        const P* const from = products + t * call.part * L + k;
        const P* const undo = filter(0, group + k / L) + k % L;
        const int64_t channel = group * L + k;
        if constexpr (SIDE % 2 == 1)  // of an even number of taps
          if (call.to_cells()) {
            put_cells<EDGES>(image, at, down, across, from, t, undo, channel);
            continue;
          }
        S* const corner = image + (at.h * W + at.w) * K + channel;
        const int64_t row_below = W * K;
        if (inner && channel + kLanes <= K)
          transform_output(down, across, from, t, undo, [&](int i, int j, R y) PYDISTILL_LAMBDA {
            store_narrowed_register<T>(corner + i * row_below + j * K, y);
          });
        else
          transform_output(down, across, from, t, undo, [&](int i, int j, R y) PYDISTILL_LAMBDA {
            if (at.h + i >= H || at.w + j >= W) return;
            if (channel + kLanes <= K)
              store_narrowed_register<T>(corner + i * row_below + j * K, y);
            else if (channel < K)
              store_narrowed_register<T>(corner + i * row_below + j * K, y, K - channel);
          });
      }
    }
  }

  template <bool EDGES>
  __attribute__((noinline)) void put_cells(S* image, Tile at, int points_down, int points_across, const P* from,
                                           int64_t t, const P* undo, int64_t channel) const {
    const int down = EDGES ? points_down : 6, across = EDGES ? points_across : 6;
    const int64_t half = K / 2, of_row = channel % half;
    S* const corner = image + at.h * W * K + at.w * half;
    if (of_row + kLanes <= half && channel < K) {
      S* const begin = corner + channel / half * W * half + of_row;
      transform_output(down, across, from, t, undo, [&](int i, int j, R y) PYDISTILL_LAMBDA {
        if (at.h + i < H && at.w + j < W) store_narrowed_register<T>(begin + i * W * K + j * half, y);
      });
    } else {
      transform_output(down, across, from, t, undo, [&](int i, int j, R y) PYDISTILL_LAMBDA {
        if (at.h + i >= H || at.w + j >= W) return;
        S* const upper = corner + i * W * K + j * half;
        store_narrowed_register_to_two<T>(upper, upper + W * half, half, channel, y);
      });
    }
  }

  template <class Put>
  PYDISTILL_INLINE void transform_output(int down, int across, const P* from, int64_t t, const P* filter_factors,
                                         Put put) const {
    R half[SIDE][6];
#pragma GCC unroll 6
    for (int j = 0; j < 6; ++j) {
      R column[6], out[SIDE];
#pragma GCC unroll 6
      for (int i = 0; i < 6; ++i) {
        const int p = 6 * i + j;
        const Register<P> product = *reinterpret_cast<const Register<P>*>(from + p * product_plane);
        if constexpr (kPaired) {
          const float* const of_filter = reinterpret_cast<const float*>(filter_factors + p * filter_plane);
          column[i] =
              __builtin_convertvector(product, R) * splat(factors + t * kFactors + p) * load_register(of_filter);
        } else {
          column[i] = product;
        }
      }
      output_of_points<T, SIDE>(down, column, out);
#pragma GCC unroll 5
      for (int i = 0; i < SIDE; ++i) half[i][j] = out[i];
      in_order();
    }
#pragma GCC unroll 5
    for (int i = 0; i < SIDE; ++i) {
      R out[SIDE];
      output_of_points<T, SIDE>(across, half[i], out);
#pragma GCC unroll 5
      for (int j = 0; j < SIDE; ++j) put(i, j, out[j]);
      in_order();
    }
  }
};

template <class T, class S, class P>
void run(const FrozenConv2d& call, int64_t begin, int64_t end, void* scratch) {
  if (call.taps == 2)
    Convolution<T, S, P, 5>(call, scratch).run(begin, end);
  else if (call.taps == 3)
    Convolution<T, S, P, 4>(call, scratch).run(begin, end);
  else if (call.taps == 5) {
    if constexpr (sizeof(S) == sizeof(T)) Convolution<T, S, P, 2>(call, scratch).run(begin, end);
  } else
    Convolution<T, S, P, 3>(call, scratch).run(begin, end);
}

}  // namespace

void PYDISTILL_KERNEL(const FrozenConv2d& call, int64_t begin, int64_t end, void* scratch) {
  if constexpr (kFloat64)
    if (call.scalar == Scalar::f64) return run<double, double, double>(call, begin, end, scratch);
#if !defined(__AVX512BF16__)  // which has nothing for float32 that AVX-512 lacks
  if (call.scalar == Scalar::f32) return run<float, float, float>(call, begin, end, scratch);
#endif
  if (call.paired()) run<float, Bf16, int32_t>(call, begin, end, scratch);
}

}  // namespace pydistill
