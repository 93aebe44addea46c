// The body in sparse_label_loss.inl, compiled with this instruction set's flags (see CMakeLists.txt).
#define PYDISTILL_KERNEL sparse_label_loss_base
#include "sparse_label_loss.inl"
