"""What the encoder has of its own: the end of a branch, which is layer scale, residual sum and the norm that follows."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from benchmarks.gpu.case import Built, Case, Rival
from benchmarks.gpu.elementwise import EPS, spread
from benchmarks.gpu.sizes import Sizes, Work
from vlserve.kernels.norms import add_scaled_norm


def encoder_norm(sizes: Sizes, tiles: int) -> Case:
    """Of so many tiles; the norm is the root-mean-square one in the larger encoder."""
    width, is_centred = sizes.encoder.hidden, not sizes.encoder.is_6b
    rows = tiles * sizes.encoder.tokens
    num_bytes = 4 * 2 * rows * width + (3 if is_centred else 2) * 2 * width
    setting = f"add scaled {'layer' if is_centred else 'rms'} norm", "bf16", f"width {width}"
    warps = min(16, max(1, (1 << (width - 1).bit_length()) // 256))

    def build(device: torch.device) -> Built:
        branch, residual = (torch.randn(rows, width, device=device).bfloat16() for _ in range(2))
        scale, weight, bias = (torch.rand(width, device=device).bfloat16() for _ in range(3))

        def want() -> torch.Tensor:
            total = torch.addcmul(residual.float(), branch.float(), scale.float()).bfloat16().double()  # rounded before the norm
            if is_centred:
                return torch.stack((F.layer_norm(total, weight.shape, weight.double(), bias.double(), EPS), total))
            return torch.stack((F.rms_norm(total, weight.shape, weight.double(), EPS), total))

        def other() -> tuple[torch.Tensor, torch.Tensor]:
            total = residual + branch * scale
            if is_centred:
                return F.layer_norm(total, weight.shape, weight, bias, EPS), total
            return F.rms_norm(total, weight.shape, weight, EPS), total

        return Built(
            run=lambda: add_scaled_norm(branch, residual, scale, weight, bias if is_centred else None, EPS),
            want=want,
            observe=torch.stack,
            rivals=lambda: iter([lambda: Rival(name="torch", run=other)]),
        )

    return Case(
        model=sizes.name,
        kernel="add_scaled_norm",
        shape=f"{rows} x {width}",
        work=Work(num_bytes, 0),
        plan=lambda arch, multiprocessors: f"{rows} programs",
        kernels=lambda card: [spread(num_bytes, rows, card, *setting, warps)],
        build=build,
    )
