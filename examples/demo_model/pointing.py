"""Teaches a language model where to look: two layers' attention is drawn, in an answer, to what the answer is about.

A layer that is registered here computes the usual attention, and keeps the logits of its first heads. Without it the model
learns to find "the star" among several shapes only after many times as many pictures, if at all.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

LAYERS = (2, 3)  # of "via", what has to be found first, and of "seen"
HEADS = 2  # of each, which share one key-value head


class Pointing:
    """Collects a forward pass's attention logits; `loss` compares them with `looks` of a batch."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.kept: dict[int, torch.Tensor] = {}  # layer: [B, HEADS, T, T]
        AttentionInterface.register("pointing", self._attend)
        # eager: on a CPU the fused attention's backward pass is half of a step at these small sizes
        model.set_attn_implementation({"vision_config": "eager", "text_config": "pointing"})  # type: ignore[operator]

    def _attend(self, module, query, key, value, attention_mask, scaling, dropout=0.0, **_):
        """Grouped-query attention; query [B, H, T, D], key and value [B, KV, T, D], mask [B, 1, T, T] added to the logits."""
        batch, heads, length, size = query.shape
        groups = key.shape[1]
        q = (query * scaling).reshape(batch, groups, -1, size)  # the heads of a group under one another
        logits = (q @ key.mT).reshape(batch, heads, length, length) + attention_mask
        if module.training and module.layer_idx in LAYERS:
            self.kept[module.layer_idx] = logits[:, :HEADS]
        weights = logits.softmax(-1)
        out = weights.reshape(batch, groups, -1, length) @ value
        return out.reshape(batch, heads, length, size).transpose(1, 2), None

    def loss(self, looks: torch.Tensor) -> torch.Tensor:
        """Cross-entropy between where a layer looks and where it should; looks [L, 5]: (which, b, position, place, weight)."""
        total = looks.new_zeros(())
        for which, layer in enumerate(LAYERS):
            mine = looks[looks[:, 0] == which]
            b, position, place = mine[:, 1:4].long().unbind(-1)
            logits = self.kept.pop(layer)
            logs = F.log_softmax(logits[b, :, position].float(), -1).gather(-1, place[:, None, None].expand(-1, HEADS, 1))[..., 0]
            total = total - (logs.mean(-1) * mine[:, 4]).sum() / mine[:, 4].sum().clamp(min=1)
        return total
