// The body in frozen_conv2d.inl, compiled with this instruction set's flags (see CMakeLists.txt).
#define PYDISTILL_KERNEL frozen_conv2d_avx512_bf16
#include "frozen_conv2d.inl"
