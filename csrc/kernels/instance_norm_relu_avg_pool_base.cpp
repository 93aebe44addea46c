// The body in instance_norm_relu_avg_pool.inl, compiled with this instruction set's flags (see CMakeLists.txt).
#define PYDISTILL_KERNEL instance_norm_relu_avg_pool_base
#include "instance_norm_relu_avg_pool.inl"
