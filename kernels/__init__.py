"""The operations that decide speed, a folder each, with files of the same names.

* `reference.py`: the torch definition (`op_ref`), and the checks that several share
* `types.py`: operands that are no plain tensors
* `cpu.py`: torch's operators in an order that is fast on a CPU
* `triton.py`: kernels and what launches them, imported when first launched, on CUDA only
* `__init__.py`: the operation (`op`), which checks and chooses

What several operations need, and the tuner, stands beside the folders. The package knows torch and nothing of models, requests or
checkpoints.
"""
