"""Attention over a window of the latest tokens, the token itself counted. Source: Mistral 7B (arXiv 2310.06825).

Its cache has the same blocks as full attention's: what has left the window is passed over and not freed.
"""

from __future__ import annotations

from vlserve.llm.attention import Attention
from vlserve.llm.config import DecoderConfig
from vlserve.llm.tensor_parallel import Split


class SlidingAttention(Attention):
    def __init__(self, config: DecoderConfig, split: Split) -> None:
        super().__init__(config, split)
        assert config.sliding_window is not None, "the config's reader checks that layers with a window have one"
        self.window = config.sliding_window
