"""Triton kernels, for NVIDIA and AMD GPUs: a module per operator, imported where Triton is installed and asked for."""
