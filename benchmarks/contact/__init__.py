"""The parts of benchmarks/gpu_contact.py: what is tried on a GPU that was never met, each in a process of its own."""
