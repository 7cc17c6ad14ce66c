"""Plain PyTorch implementations of every operator: the CPU backend and, in fp64, the oracle.

One file an operator family, named as in ops/ and kernels/; a function has its operator's name and signature.
Arguments are taken as checked. ``backward.py`` holds the gradients of those that have some, for every device.
"""
