// The body in bn_stat_match.inl, compiled with this instruction set's flags (see CMakeLists.txt).
#define PYDISTILL_KERNEL bn_stat_match_avx512
#include "bn_stat_match.inl"
