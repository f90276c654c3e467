"""How far kernels reach into their tensors: by kernel, those that may have 2^31 numbers and more, as test_far.py has seen.

What others are given at full size has fewer: of the largest model that is served (78B: 8192 wide, 29568 in its feed-forward,
151674 tokens), 16384 rows and 1024 sequences, 4-bit codes are 2^27 at most, the head's weights 2^30.3, logits 2^27.3, sums 2^23
and parts of attention 2^25. A tensor that reaches further is refused in the rehearsal (rehearsal/launches.py) until a test is
here."""

FAR: dict[str, tuple[str, ...]] = {
    "attention.triton._attention_kernel": ("keys", "values"),  # a layer's cache, of which a small model's fills a card
    "experts.triton._matmul": ("codes", "out", "x"),  # of all experts of a layer; and a row for each choice
    "experts.triton._combine": ("out", "result"),
    "experts.triton_pairs._pairs_matmul": ("words",),
    "gate.triton._kernel": ("out", "gate_up"),
    "head.triton._matmul": ("weight",),
    "norms.triton._layer_kernel": ("out", "total", "x", "residual"),
    "norms.triton._rms_kernel": ("out", "total", "x", "residual"),
    "rotary.triton._kernel": ("key_cache", "value_cache"),
}
