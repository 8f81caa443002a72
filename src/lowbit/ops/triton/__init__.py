"""Triton backends of the operators, for CUDA, ROCm and XPU. Triton is imported by the modules in here only."""
