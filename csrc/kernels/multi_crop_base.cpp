// The body in multi_crop.inl, compiled with this instruction set's flags (see CMakeLists.txt).
#define PYDISTILL_KERNEL multi_crop_base
#include "multi_crop.inl"
