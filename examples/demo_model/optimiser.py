"""Steps of the demo's training: Muon and AdamW together, the encoder at a rate of its own, and their state as tensors by name."""

from __future__ import annotations

from typing import Any

import torch

KEPT = ("momentum_buffer", "step", "exp_avg", "exp_avg_sq")  # by the optimisers, of each weight


class Optimiser:
    """Muon for matrices inside the layers, AdamW for the rest, on float32 copies of the model's bfloat16 weights."""

    def __init__(self, model: torch.nn.Module, lr: float) -> None:
        self.parameters = dict(model.named_parameters())
        self.masters = {name: p.detach().float().clone() for name, p in self.parameters.items()}
        inner = [n for n, p in self.parameters.items() if p.ndim == 2 and "layer" in n and "embed" not in n]
        outer = [n for n in self.parameters if n not in inner]
        self.parts = (
            torch.optim.Muon(self._groups(inner), lr=lr, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(self._groups(outer), lr=lr / 4, betas=(0.9, 0.98), weight_decay=0.0),
        )
        self.rates = (lr, lr / 4)

    def _groups(self, names: list[str]) -> list[dict[str, Any]]:
        """The encoder's weights first, then the others."""
        encoder = [n for n in names if n.startswith("model.vision_tower.")]
        return [{"params": [self.masters[n] for n in part]} for part in (encoder, [n for n in names if n not in encoder])]

    def step(self, *shares: float) -> None:
        """One step, the encoder's weights and the others each at their share of the full rate."""
        for name, p in self.parameters.items():
            self.masters[name].grad = None if p.grad is None else p.grad.float()
            p.grad = None
        torch.nn.utils.clip_grad_norm_([m for m in self.masters.values() if m.grad is not None], 1.0)
        for part, rate in zip(self.parts, self.rates, strict=True):
            for group, share in zip(part.param_groups, shares, strict=True):
                group["lr"] = rate * share
            part.step()
        with torch.no_grad():
            torch._foreach_copy_(list(self.parameters.values()), [self.masters[n] for n in self.parameters])

    def state(self) -> dict[str, torch.Tensor]:
        """Tensors by name: the weights, and what the optimisers keep of each."""
        names = {id(master): name for name, master in self.masters.items()}
        kept = {f"weight.{name}": master for name, master in self.masters.items()}
        for part in self.parts:
            for master, values in part.state.items():
                kept |= {f"{key}.{names[id(master)]}": value for key, value in values.items()}
        return kept

    def load(self, kept: dict[str, torch.Tensor]) -> None:
        """Take over what `state` gave, on the weights' device."""
        with torch.no_grad():
            for name, master in self.masters.items():
                master.copy_(kept[f"weight.{name}"])
                self.parameters[name].copy_(master)
        names = {id(master): name for name, master in self.masters.items()}
        for part in self.parts:
            for master in (p for group in part.param_groups for p in group["params"]):
                name = names[id(master)]
                part.state[master] = {key: kept[f"{key}.{name}"] for key in KEPT if f"{key}.{name}" in kept}
