"""The parts of benchmarks/bench_gpu.py: what is computed, what it costs at least, and how it is checked and timed."""
