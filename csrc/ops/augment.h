// Checks, allocation and form of the two operators; a Backend runs the call on its device:
//   static void run(const Augment& call, const Tensor& images);
#pragma once

#include "../common/tensor.h"
#include "../kernels/augment.h"

namespace pydistill {

template <class Backend>
struct AugmentOps {
  using Form = Augment::Form;

  static Tensor forward(const Tensor& images, const Tensor& record, bool flip_batch, bool align_corners, bool linear) {
    check(images.dim() == 4, "images: expected [B, C, H, W], got ", images.dim(), " dimensions");
    Augment call = describe(Form::forward, images, "images", images.sizes()[0], record, flip_batch, align_corners);
    call.linear = linear;
    return run(call, images, call.copies * call.N);
  }

  static Tensor backward(const Tensor& grad, const Tensor& record, bool flip_batch, bool align_corners) {
    check(grad.dim() == 4, "grad: expected [B, C, H, W], got ", grad.dim(), " dimensions");
    const int64_t rows = grad.sizes()[0];
    check(!flip_batch || rows % 2 == 0, "grad: expected an even number of images for flip_batch, got ", rows);
    const int64_t N = flip_batch ? rows / 2 : rows;
    Augment call = describe(Form::backward, grad, "grad", N, record, flip_batch, align_corners);
    return run(call, grad, N);
  }

 private:
  static Augment describe(Form form, const Tensor& from, const char* name, int64_t N, const Tensor& record,
                          bool flip_batch, bool align_corners) {
    Augment call;
    call.form = form;
    call.scalar = scalar_of(from, name);
    call.N = N, call.C = from.sizes()[1], call.H = from.sizes()[2], call.W = from.sizes()[3];
    check(call.C > 0 && call.H > 0 && call.W > 0, name, ": expected images with channels and pixels");
    check(call.H <= 16384 && call.W <= 16384, name, ": expected images of at most 16384 x 16384");
    call.copies = flip_batch ? 2 : 1;
    call.align_corners = align_corners;
    check(record.dim() == 2 && record.sizes()[0] == call.copies * N && record.sizes()[1] == Augment::columns,
          "record: expected [", call.copies * N, ", ", int{Augment::columns}, "]");
    check(record.scalar_type() == ScalarType::Float, "record: expected float32");
    check(record.device() == from.device(), "record: expected the device of ", name);
    call.record = static_cast<const float*>(record.const_data_ptr());
    call.record_row = record.strides()[0], call.record_column = record.strides()[1];
    call.from = map_of(from);
    return call;
  }

  static Tensor run(Augment& call, const Tensor& from, int64_t rows) {
    Tensor to = empty_planes(from, rows, call.C, call.H, call.W);
    call.to = map_of(to);
    call.to.data = to.mutable_data_ptr();
    Backend::run(call, from);
    return to;
  }
};

}  // namespace pydistill
