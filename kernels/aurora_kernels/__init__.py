"""Triton kernels for speculative decoding and drafter training, each beside an eager twin of the same name.

This package imports nothing of `aurora_rl` and is optional at run time.
"""
