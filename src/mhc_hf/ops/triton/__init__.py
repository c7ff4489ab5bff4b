"""Triton kernels, one file an op, and their launchers. Imported on first use only: `launch` is what the ops call."""
