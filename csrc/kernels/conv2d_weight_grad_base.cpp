// The body in conv2d_weight_grad.inl, compiled with this instruction set's flags (see CMakeLists.txt).
#define PYDISTILL_KERNEL conv2d_weight_grad_base
#include "conv2d_weight_grad.inl"
