// The body in attention_map_divergence.inl, compiled with this instruction set's flags (see CMakeLists.txt).
#define PYDISTILL_KERNEL attention_map_divergence_avx512
#include "attention_map_divergence.inl"
