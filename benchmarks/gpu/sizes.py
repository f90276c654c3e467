"""Widths of InternVL3 and, by arithmetic, what a run of an operation or of a model reads, writes and computes.

Widths: the checkpoints' config.json. Bytes count each number that must pass once between memory and the chip.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

GROUP = 128  # inputs that share a scale and a zero point of 4-bit weights
TILES = 13  # of a picture: twelve and the thumbnail
KINDS = ("auto", "int8", "fp8")  # of KV cache


@dataclass(frozen=True, slots=True)
class Work:
    """What must be done at least: bytes between memory and chip, operations of tensor cores."""

    bytes: int
    flops: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoder:
    hidden: int = 1024
    heads: int = 16
    ffn: int = 4096
    layers: int = 24
    is_6b: bool = False  # root-mean-square norms, also of queries and keys; no bias there
    image: int = 448  # pixels
    patch: int = 14

    @property
    def tokens(self) -> int:
        """Of a tile, within the encoder."""
        return (self.image // self.patch) ** 2 + 1

    def flops(self, out: int) -> int:
        """Of a tile, with the projector to the decoder's `out` channels."""
        width, tokens = self.hidden, self.tokens
        layer = 2 * tokens * (4 * width**2 + 2 * width * self.ffn) + 4 * tokens**2 * width
        patches = 2 * (tokens - 1) * 3 * self.patch**2 * width
        return self.layers * layer + patches + 2 * (tokens - 1) // 4 * (4 * width * out + out**2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """A decoder of Qwen2's shape and its encoder."""

    name: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    ffn: int
    dim: int = 128  # of a head
    vocab: int = 151_674
    encoder: Encoder = Encoder()

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """(outputs, inputs) of a layer's products."""
        return {
            "qkv_proj": ((self.heads + 2 * self.kv_heads) * self.dim, self.hidden),
            "o_proj": (self.hidden, self.heads * self.dim),
            "gate_up_proj": (2 * self.ffn, self.hidden),
            "down_proj": (self.hidden, self.ffn),
        }

    @property
    def weights(self) -> int:
        """Numbers in the products of all layers."""
        return self.layers * sum(outputs * inputs for outputs, inputs in self.linears.values())

    def step_bytes(self, weights: str) -> int:
        """Weights that a step reads: layers, norms, biases and the head, which is 16-bit in both ("bf16", "awq")."""
        layers = int4_bytes(self.weights) if weights == "awq" else 2 * self.weights
        norms = (2 * self.layers + 1) * self.hidden * 2
        biases = self.layers * self.linears["qkv_proj"][0] * 2
        return layers + norms + biases + 2 * self.vocab * self.hidden

    def token_bytes(self) -> int:
        """Keys and values of a token in 16 bits, all layers."""
        return self.layers * cache_bytes(self.kv_heads, self.dim, "auto")

    def decode(self, weights: str, batch: int, context: int) -> Work:
        """A step of `batch` sequences with `context` tokens each."""
        attention = 4 * batch * context * self.heads * self.dim * self.layers
        return Work(
            self.step_bytes(weights) + batch * context * self.token_bytes(),
            2 * batch * (self.weights + self.vocab * self.hidden) + attention,
        )

    def prefill(self, weights: str, batch: int, tokens: int) -> Work:
        """`batch` prompts of `tokens` each; the logits of the last ones."""
        attention = 4 * batch * tokens * (tokens + 1) // 2 * self.heads * self.dim * self.layers
        return Work(
            self.step_bytes(weights) + 2 * batch * tokens * self.token_bytes(),
            2 * batch * (tokens * self.weights + self.vocab * self.hidden) + attention,
        )

    def config(self) -> dict[str, Any]:
        """What config.json would say."""
        sight = self.encoder
        return {
            "model_type": "internvl",
            "downsample_ratio": 0.5,
            "text_config": {
                "model_type": "qwen2",
                "hidden_size": self.hidden,
                "intermediate_size": self.ffn,
                "num_hidden_layers": self.layers,
                "num_attention_heads": self.heads,
                "num_key_value_heads": self.kv_heads,
                "head_dim": self.dim,
                "vocab_size": self.vocab,
                "max_position_embeddings": 32768,
                "rms_norm_eps": 1e-6,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
                "tie_word_embeddings": False,
            },
            "vision_config": {
                "image_size": sight.image,
                "patch_size": sight.patch,
                "hidden_size": sight.hidden,
                "intermediate_size": sight.ffn,
                "num_hidden_layers": sight.layers,
                "num_attention_heads": sight.heads,
                "attention_bias": not sight.is_6b,
                "use_qk_norm": sight.is_6b,
                "norm_type": "rms_norm" if sight.is_6b else "layer_norm",
            },
        }


INTERN_VIT_6B = Encoder(hidden=3200, heads=25, ffn=12800, layers=45, is_6b=True)
MODELS = {
    "1b": Sizes(name="1b", hidden=896, layers=24, heads=14, kv_heads=2, ffn=4864, dim=64),
    "8b": Sizes(name="8b", hidden=3584, layers=28, heads=28, kv_heads=4, ffn=18944),
    "38b": Sizes(name="38b", hidden=5120, layers=64, heads=40, kv_heads=8, ffn=27648, encoder=INTERN_VIT_6B),
}
# nothing of anyone's: for running on a CPU what is timed on a GPU
TINY = Sizes(
    name="tiny",
    hidden=128,
    layers=2,
    heads=4,
    kv_heads=2,
    ffn=256,
    dim=32,
    vocab=200,
    encoder=Encoder(hidden=32, heads=2, ffn=64, layers=1, image=56),
)


def int4_bytes(weights: int) -> int:
    """Of 4-bit weights with a 16-bit scale and an 8-bit zero point a group."""
    return weights // 2 + weights // GROUP * 3


def cache_bytes(kv_heads: int, dim: int, kind: str) -> int:
    """Keys and values of a token in one layer; a kind of eight bits has a 16-bit scale a head."""
    return 2 * kv_heads * (2 * dim if kind == "auto" else dim + 2)
