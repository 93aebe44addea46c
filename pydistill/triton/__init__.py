"""Triton kernels, for NVIDIA and AMD GPUs: a module per operator, imported on demand if Triton is installed."""
