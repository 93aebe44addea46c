// The body in conv2d_filters.inl, compiled with this instruction set's flags (see CMakeLists.txt).
#define PYDISTILL_KERNEL conv2d_filters_base
#include "conv2d_filters.inl"
