"""Tensors of 2^31 numbers and more, into which kernels reach: by kernel, those that test_far.py has seen it reach."""

FAR: dict[str, tuple[str, ...]] = {}
