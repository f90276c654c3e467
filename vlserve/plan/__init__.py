"""Tensor-parallel degrees and bytes, before anything is loaded. No torch."""
