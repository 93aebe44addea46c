// Checks, allocation and form of the two operators; a Backend runs the call on its device:
//   static void run(MultiCrop& call, const Tensor& from);
#pragma once

#include <optional>
#include <tuple>

#include "../common/tensor.h"
#include "../kernels/multi_crop.h"

namespace pydistill {

template <class Backend>
struct MultiCropOps {
  using Form = MultiCrop::Form;

  static Tensor forward(const Tensor& images, const std::optional<Tensor>& base, const Tensor& record,
                        const std::optional<Tensor>& norm, int64_t height, int64_t width, bool linear) {
    check(images.dim() == 4, "images: expected [N, C, H, W], got ", images.dim(), " dimensions");
    MultiCrop call;
    call.form = Form::forward;
    call.linear = linear;
    call.N = images.sizes()[0], call.C = images.sizes()[1], call.H = images.sizes()[2], call.W = images.sizes()[3];
    describe(call, images, "images", record, norm);
    check_size(height, width), call.height_out = height, call.width_out = width;
    check_size(call.H, call.W);
    if (base) {
      check_image(*base, "base", {1, call.C, call.H, call.W}, images);
      call.base = map_of(*base);
    }
    call.in_place = !base && call.from.w == 1 && (call.scalar == Scalar::f32 || call.scalar == Scalar::f64);
    return run(call, images, call.B, height, width);
  }

  static std::tuple<Tensor, Tensor> backward(const Tensor& grad, const Tensor& record,
                                             const std::optional<Tensor>& norm, int64_t images, int64_t height,
                                             int64_t width, bool with_images, bool with_base) {
    check(grad.dim() == 4, "grad: expected [B, C, H, W], got ", grad.dim(), " dimensions");
    MultiCrop call;
    call.form = Form::backward;
    call.N = images, call.C = grad.sizes()[1], call.H = height, call.W = width;
    describe(call, grad, "grad", record, norm);
    call.height_out = grad.sizes()[2], call.width_out = grad.sizes()[3];
    check(images >= 0, "images: expected a count, got ", images);
    check(grad.sizes()[0] == call.B, "record: expected ", grad.sizes()[0], " rows, got ", call.B);
    check_size(call.height_out, call.width_out), check_size(height, width);
    Tensor to_images = empty_vector(grad, grad.scalar_type(), 0), to_base = to_images;
    if (with_images) to_images = run(call, grad, images, height, width);
    if (with_base) {
      call.shared = true;
      to_base = run(call, grad, 1, height, width);
    }
    if (!with_base) to_base = empty_vector(grad, grad.scalar_type(), 0);  // a separate output
    return {to_images, to_base};
  }

 private:
  static void check_size(int64_t height, int64_t width) {
    constexpr int64_t most = MultiCrop::max_size;
    check(height > 0 && width > 0 && height <= most && width <= most, "expected sides of 1 to ", most, ", got ", height,
          " and ", width);
  }

  static void describe(MultiCrop& call, const Tensor& from, const char* name, const Tensor& record,
                       const std::optional<Tensor>& norm) {
    call.scalar = scalar_of(from, name);
    check(call.C > 0, name, ": expected images with channels");
    check(record.dim() == 3 && record.sizes()[1] > 0 && record.sizes()[1] <= MultiCrop::max_parts &&
              record.sizes()[2] == MultiCrop::columns,
          "record: expected [B, 1 to ", MultiCrop::max_parts, ", ", int{MultiCrop::columns}, "]");
    check(record.scalar_type() == ScalarType::Float, "record: expected float32");
    check(record.device() == from.device(), "record: expected the device of ", name);
    call.B = record.sizes()[0], call.parts = record.sizes()[1];
    call.record = static_cast<const float*>(record.const_data_ptr());
    call.record_row = record.strides()[0], call.record_part = record.strides()[1];
    call.record_column = record.strides()[2];
    if (norm) {
      check(norm->dim() == 2 && norm->sizes()[0] == 2 && norm->sizes()[1] == call.C, "norm: expected [2, ", call.C,
            "]");
      check(norm->scalar_type() == ScalarType::Double && norm->is_contiguous() && norm->device() == from.device(),
            "norm: expected contiguous float64 on the device of ", name);
      call.norm = static_cast<const double*>(norm->const_data_ptr());
    }
    call.from = map_of(from);
  }

  static Tensor run(MultiCrop& call, const Tensor& from, int64_t rows, int64_t height, int64_t width) {
    Tensor to = empty_planes(from, rows, call.C, height, width);
    call.to = map_of(to);
    call.to.data = to.mutable_data_ptr();
    Backend::run(call, from);
    return to;
  }
};

}  // namespace pydistill
