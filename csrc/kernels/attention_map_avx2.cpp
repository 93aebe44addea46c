// The body in attention_map.inl, compiled with this instruction set's flags (see CMakeLists.txt).
#define PYDISTILL_KERNEL attention_map_avx2
#include "attention_map.inl"
