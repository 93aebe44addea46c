// The body in soft_cross_entropy.inl, compiled with this instruction set's flags (see CMakeLists.txt).
#define PYDISTILL_KERNEL soft_cross_entropy_avx512
#include "soft_cross_entropy.inl"
