// The body in graph_cut_greedy.inl, compiled with this instruction set's flags (see CMakeLists.txt).
#define PYDISTILL_KERNEL graph_cut_greedy_avx512
#include "graph_cut_greedy.inl"
