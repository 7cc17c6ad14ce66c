"""Triton kernels and their launch functions, one file an operator family; imported on the first GPU call."""
