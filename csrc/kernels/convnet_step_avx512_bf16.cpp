// The body in convnet_step.inl, compiled with this instruction set's flags (see CMakeLists.txt).
#define PYDISTILL_KERNEL convnet_step_avx512_bf16
#include "convnet_step.inl"
