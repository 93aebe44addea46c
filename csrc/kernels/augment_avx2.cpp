// The body in augment.inl, compiled with this instruction set's flags (see CMakeLists.txt).
#define PYDISTILL_KERNEL augment_avx2
#include "augment.inl"
