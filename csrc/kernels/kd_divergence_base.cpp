// The body in kd_divergence.inl, compiled with this instruction set's flags (see CMakeLists.txt).
#define PYDISTILL_KERNEL kd_divergence_base
#include "kd_divergence.inl"
