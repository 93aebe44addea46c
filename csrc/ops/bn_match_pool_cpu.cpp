#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>

#include "../common/isa.h"
#include "../common/scratch.h"
#include "bn_stat_match.h"
#include "max_pool2d.h"

namespace pydistill {

BnStatMatchKernel bn_stat_match_base, bn_stat_match_avx2, bn_stat_match_avx512;
MaxPool2dKernel max_pool2d_base, max_pool2d_avx2, max_pool2d_avx512;

namespace {

using Pass = BnStatMatch::Pass;

// Two kernels in alternation, on a band of image rows at a time: the tensor between them, as large as x, stays in a
// thread's cache. The results are those of one kernel after the other.
class BnMatchPool {
 public:
  BnMatchPool(const Tensor& x, const Tensor& scale, const Tensor& shift, bool relu, MaxPool2d::Pass pass,
              int64_t kernel, int64_t stride, int64_t padding)
      : pool(max_pool2d_call(pass, x, "x", x.sizes()[2], x.sizes()[3], kernel, stride, padding)),
        element(static_cast<int64_t>(x.element_size())),
        image_row(pool.W * pool.C * element),
        // the rows above a band that its windows see are normalised twice
        band(std::min(pool.H, std::max(kernel, kBandBytes / image_row))) {
    check(pool.N > 0, "x: expected at least one image");
    bn.scalar = pool.scalar, bn.relu = relu;
    bn.N = pool.N, bn.C = pool.C, bn.P = pool.H * pool.W, bn.M = bn.N * bn.P, bn.tile = band * pool.W;
    bn.scale = per_channel(bn, scale, 0, "scale", x);
    bn.shift = per_channel(bn, shift, 0, "shift", x);
  }

  BnStatMatch bn;  // the caller's part of both calls: all but the tensor in between
  MaxPool2d pool;

  void forward() {
    bn.pass = Pass::tiles;
    const int64_t tile_bytes = 3 * bn.C * (bn.scalar == Scalar::f64 ? 8 : 4);
    over_bands([&](int64_t n, int64_t begin, int64_t end) {
      const int64_t first = windows_within(begin), last = windows_within(end);
      const int64_t seen = first * pool.stride - pool.padding;  // the first row of it
      const int64_t top = first < last ? std::clamp<int64_t>(seen, 0, begin) : begin;
      const int64_t sums_bytes = (tile_bytes + 63) / 64 * 64;
      char* const sums = static_cast<char*>(scratch(sums_bytes + (end - top) * image_row));
      char* const rows = sums + sums_bytes;
      if (top < begin) normalise(n, top, begin, rows, sums);  // another band counts these
      normalise(n, begin, end, rows + (begin - top) * image_row,
                static_cast<char*>(bn.partial) + (n * bn.tiles_of_sample() + begin / band) * tile_bytes);
      MaxPool2d part = image_of_pool(n);
      part.from = rows, part.to = static_cast<char*>(pool.to) + n * pooled() * element;
      part.first_row = top;
      pool_kernel(part, first, last);
    });
    bn.pass = Pass::merge;
    bn_kernel(bn, 0, panels());
  }

  void backward() {
    bn.pass = Pass::backward;
    over_bands([&](int64_t n, int64_t begin, int64_t end) {
      MaxPool2d scattered = image_of_pool(n);
      scattered.from = static_cast<const char*>(pool.from) + n * pooled() * element;
      scattered.to = scratch((end - begin) * image_row);
      scattered.first_row = begin;
      pool_kernel(scattered, begin, end);
      BnStatMatch part = rows_of_bn(n, begin, end);
      part.grad_y = positions(scattered.to);
      part.grad_x = positions(static_cast<char*>(bn.grad_x.data) + (n * pool.H + begin) * image_row);
      bn_kernel(part, 0, panels());
    });
  }

  BnStatMatch::Planes positions(const void* data) const { return {const_cast<void*>(data), 0, 1, pool.C}; }

 private:
  static constexpr int64_t kBandBytes = 192 << 10;  // together with x, in the second-level cache

  const int64_t element, image_row, band;  // bytes, bytes, rows
  BnStatMatchKernel* const bn_kernel = [this] {
    static constexpr BnStatMatchKernel* kernels[] = {bn_stat_match_base, bn_stat_match_avx2, bn_stat_match_avx512};
    return best_of(kernels, pool.scalar);
  }();
  MaxPool2dKernel* const pool_kernel = [this] {
    static constexpr MaxPool2dKernel* kernels[] = {max_pool2d_base, max_pool2d_avx2, max_pool2d_avx512};
    return best_of(kernels, pool.scalar);
  }();

  int64_t panels() const { return (bn.C + BnStatMatch::kPanel - 1) / BnStatMatch::kPanel; }
  int64_t pooled() const { return pool.rows() * pool.columns() * pool.C; }  // elements of an image

  // Windows that do not reach row `end` or below.
  int64_t windows_within(int64_t end) const {
    if (end == pool.H) return pool.rows();
    const int64_t room = end + pool.padding - pool.kernel;
    return room < 0 ? 0 : std::min(pool.rows(), room / pool.stride + 1);
  }

  template <class Band>
  void over_bands(Band body) const {
    const int64_t of_image = (pool.H + band - 1) / band;
    torch::stable::parallel_for(0, pool.N * of_image, 1, [&](int64_t first, int64_t last) {
      for (int64_t unit = first; unit < last; ++unit) {
        const int64_t begin = unit % of_image * band;
        body(unit / of_image, begin, std::min(begin + band, pool.H));
      }
    });
  }

  MaxPool2d image_of_pool(int64_t n) const {
    MaxPool2d part = pool;
    part.N = 1;
    part.which = pool.which + n * pooled();
    return part;
  }

  BnStatMatch rows_of_bn(int64_t n, int64_t begin, int64_t end) const {
    BnStatMatch part = bn;
    part.N = 1, part.P = part.tile = (end - begin) * pool.W;
    part.x = positions(static_cast<const char*>(bn.x.data) + (n * pool.H + begin) * image_row);
    return part;
  }

  void normalise(int64_t n, int64_t begin, int64_t end, char* y, char* partial) const {
    BnStatMatch part = rows_of_bn(n, begin, end);
    part.y = positions(y), part.partial = partial;
    bn_kernel(part, 0, panels());
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> bn_match_pool(const Tensor& x, const Tensor& scale, const Tensor& shift,
                                                         bool relu, int64_t kernel, int64_t stride, int64_t padding) {
  check(x.dim() == 4, "x: expected [N, C, H, W], got ", x.dim(), " dimensions");
  BnMatchPool call(x, scale, shift, relu, MaxPool2d::Pass::pool, kernel, stride, padding);
  BnStatMatch& bn = call.bn;
  MaxPool2d& pool = call.pool;
  const ScalarType compute = compute_type(bn.scalar);
  const Tensor from = channels_last(x);
  Tensor y = empty_channels_last(x, x.scalar_type(), pool.N, pool.C, pool.rows(), pool.columns());
  Tensor which = empty_channels_last(x, ScalarType::Byte, pool.N, pool.C, pool.rows(), pool.columns());
  Tensor statistics = empty_matrix(x, compute, 2, pool.C), mean = empty_vector(x, compute, pool.C);
  Tensor partial = empty_matrix(x, compute, bn.tiles() * 3, pool.C);
  bn.x = call.positions(from.const_data_ptr());
  bn.partial = partial.mutable_data_ptr();
  bn.statistics = statistics.mutable_data_ptr(), bn.kept_mean = mean.mutable_data_ptr();
  pool.to = on_large_pages(y).mutable_data_ptr();
  pool.which = static_cast<uint8_t*>(on_large_pages(which).mutable_data_ptr());
  call.forward();
  return {y, statistics, which, mean};
}

Tensor bn_match_pool_backward(const Tensor& grad_y, const Tensor& grad_statistics, const Tensor& x, const Tensor& which,
                              const Tensor& scale, const Tensor& shift, const Tensor& mean, bool relu, int64_t kernel,
                              int64_t stride, int64_t padding) {
  check(x.dim() == 4, "x: expected [N, C, H, W], got ", x.dim(), " dimensions");
  BnMatchPool call(x, scale, shift, relu, MaxPool2d::Pass::scatter, kernel, stride, padding);
  BnStatMatch& bn = call.bn;
  MaxPool2d& pool = call.pool;
  check_image(grad_y, "grad_y", {pool.N, pool.C, pool.rows(), pool.columns()}, x);
  check_which(which, x, pool);
  bn.grad_statistics = of_statistics(bn, grad_statistics, x);
  bn.mean = per_channel(bn, mean, 0, "mean", x);
  const Tensor from = channels_last(x), grad = channels_last(grad_y), numbers = channels_last(which);
  Tensor grad_x = empty_channels_last(x, x.scalar_type(), pool.N, pool.C, pool.H, pool.W);
  bn.x = call.positions(from.const_data_ptr());
  bn.grad_x = call.positions(on_large_pages(grad_x).mutable_data_ptr());
  pool.from = grad.const_data_ptr();
  pool.which = const_cast<uint8_t*>(numbers.const_data_ptr<uint8_t>());  // read only in this pass
  call.backward();
  return grad_x;
}

}  // namespace
}  // namespace pydistill

STABLE_TORCH_LIBRARY_IMPL(pydistill, CPU, m) {
  m.impl("bn_match_pool", TORCH_BOX(&pydistill::bn_match_pool));
  m.impl("bn_match_pool_backward", TORCH_BOX(&pydistill::bn_match_pool_backward));
}
