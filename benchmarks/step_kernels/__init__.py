"""Kernels of a decoding step: what `decode_kernels.py` checks and times."""
