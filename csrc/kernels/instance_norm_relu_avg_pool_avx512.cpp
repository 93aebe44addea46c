// The body in instance_norm_relu_avg_pool.inl, compiled with this instruction set's flags (see CMakeLists.txt).
#define PYDISTILL_KERNEL instance_norm_relu_avg_pool_avx512
#include "instance_norm_relu_avg_pool.inl"
