// The body in kd_divergence.inl, compiled with this instruction set's flags (see CMakeLists.txt).
#define PYDISTILL_KERNEL kd_divergence_avx2
#include "kd_divergence.inl"
