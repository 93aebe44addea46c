// The order of a step's work if a block is run in stages: see convnet_step.h. Part of convnet_step.inl.
#pragma once

#include "convnet_step.h"

namespace pydistill {
namespace {

// What a step does, in order, and where it waits for all slots.
struct Program {
  enum class Do : uint8_t {
    convolve,    // the layer's convolution, and the sums for its statistics
    again,       // the first layer's convolution again, as it is not kept
    block,       // norm, activation, pool
    head,        // from the last block's output to the loss's gradient in the logits, or to the form's results
    head_back,   // to the gradient of the last block's output
    sums,        // over the gradient of a norm's output
    back,        // to the gradient of the layer's input, or for the first layer to the weights' or the images'
    convolve_t,  // and likewise along the direction
    again_t,
    block_t,
    head_t,
    head_back_t,
    sums_t,
    back_t,
    wait,
  };
  struct Part {
    Do what;
    uint8_t layer;
  };
  Part parts[16 * ConvNetStep::kMaxDepth + 16];
  int count = 0;
  int64_t passes = 1;

  explicit Program(const ConvNetStep& step) {
    using Form = ConvNetStep::Form;
    const int last = static_cast<int>(step.depth) - 1;
    const bool batch = step.over_batch(), read = step.tape_use == ConvNetStep::Tape::read;
    const auto add = [&](Do what, int layer) { parts[count++] = {what, static_cast<uint8_t>(layer)}; };
    const auto wait = [&] {
      if (!batch) return;
      add(Do::wait, 0);
      ++passes;
    };
    const auto backwards = [&](Do again, Do sums, Do back, int to, bool kept) {
      for (int l = last; l >= to; --l) {
        if (l == 0 && !kept) add(again, 0);
        add(sums, l);
        wait();
        if (l == 0 && batch) add(again, 0);
        add(back, l);
      }
    };
    if (!read) {
      for (int l = 0; l <= last; ++l) {
        add(Do::convolve, l);
        wait();
        if (l == 0 && batch) add(Do::again, 0);
        add(Do::block, l);
      }
      add(Do::head, 0);
    }
    if (step.form == Form::gradient || step.form == Form::features_backward || (step.form == Form::tangent && !read)) {
      add(Do::head_back, 0);
      backwards(Do::again, Do::sums, Do::back, step.form == Form::tangent ? 1 : 0, !batch && !read);
    }
    if (step.form == Form::tangent) {
      for (int l = 0; l <= last; ++l) {
        add(Do::convolve_t, l);
        wait();
        if (l == 0 && batch) add(Do::again_t, 0);
        add(Do::block_t, l);
      }
      add(Do::head_t, 0);
      add(Do::head_back_t, 0);
      backwards(Do::again_t, Do::sums_t, Do::back_t, 0, !batch);
    }
  }
};

}  // namespace
}  // namespace pydistill
