// The body in row_products.inl, compiled with this instruction set's flags (see CMakeLists.txt).
#define PYDISTILL_KERNEL row_products_avx512
#include "row_products.inl"
