// The body in conv2d_weight_grad.inl, compiled with this instruction set's flags (see CMakeLists.txt).
#define PYDISTILL_KERNEL conv2d_weight_grad_avx2
#include "conv2d_weight_grad.inl"
