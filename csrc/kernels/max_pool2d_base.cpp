// The body in max_pool2d.inl, compiled with this instruction set's flags (see CMakeLists.txt).
#define PYDISTILL_KERNEL max_pool2d_base
#include "max_pool2d.inl"
