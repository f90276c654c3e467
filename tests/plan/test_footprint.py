"""The plan's bytes are those of the real modules: weights to the byte, activations by a count of live tensors."""

from __future__ import annotations

import json
import sys
import weakref
from collections.abc import Callable
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.engine.reference import add, engine, prompt, run
from vlserve.config import KV_DTYPES, SamplingParams
from vlserve.engine.memory import weight_bytes
from vlserve.kernels.attention import plan_attention
from vlserve.kernels.kv_cache.cpu import AT_ONCE
from vlserve.llm.decoder import Decoder
from vlserve.llm.kv_cache import KVCache, block_bytes
from vlserve.llm.shard_writer import OfflineGroup
from vlserve.llm.tensor_parallel import Split
from vlserve.models import internvl, registry
from vlserve.models.base import Model
from vlserve.models.tiles import TilePreprocessor
from vlserve.plan.footprint import FLOAT32, KV_AT_ONCE
from vlserve.plan.tp_plan import make_plan

ENCODERS = {
    "layer_norm": {"norm_type": "layer_norm", "attention_bias": True, "use_qk_norm": False},
    "rms_norm": {"norm_type": "rms_norm", "attention_bias": False, "use_qk_norm": True},
}
DECODERS: dict[str, dict[str, Any]] = {
    "qwen2": {"model_type": "qwen2"},
    "qwen2 tied": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "head_dim": 24},
    "llama with biases": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "mistral": {"model_type": "mistral", "sliding_window": None, "num_key_value_heads": None},
}


WHOLE = Split()


def config(encoder: str = "layer_norm", decoder: str = "qwen2", **text: Any) -> dict[str, Any]:
    vision = {"hidden_size": 80, "intermediate_size": 320, "num_hidden_layers": 3, "num_attention_heads": 5}
    sizes = {"vocab_size": 1001, "hidden_size": 96, "intermediate_size": 250, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 4096}
    return {
        "model_type": "internvl",
        "vision_config": {**vision, **ENCODERS[encoder], "image_size": 56, "patch_size": 7},
        "text_config": {**sizes, **heads, **DECODERS[decoder], **text},
    }


def build(settings: dict[str, Any], split: Split = WHOLE) -> Model:
    return internvl.build(settings, internvl.preprocessor(settings, {}), split)


def num_bytes(module: torch.nn.Module) -> int:
    return sum(p.nbytes for p in module.parameters())


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("decoder", DECODERS)
def test_weights_are_those_of_the_modules(encoder: str, decoder: str) -> None:
    settings = config(encoder, decoder)
    with torch.device("meta"):
        model = build(settings)
    rank = make_plan(settings, tp=1).ranks[0]
    assert model.tower is not None and rank.vision_bytes == num_bytes(model.tower)
    held = weight_bytes(model)
    assert (rank.decoder_bytes, rank.embedding_bytes) == (held["decoder"], held["embedding"])


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("tp,replicate", [(2, False), (6, True)])
def test_a_rank_holds_its_rows_and_columns(decoder: str, tp: int, replicate: bool) -> None:
    settings = config(decoder=decoder)
    plan = make_plan(settings, tp=tp, replicate_kv_heads=replicate)
    for rank in plan.ranks:
        with torch.device("meta"):
            model = build(settings, Split(group=OfflineGroup(rank.rank, tp), replicate_kv_heads=replicate))
        held = weight_bytes(model)
        assert (rank.vision_bytes, rank.decoder_bytes, rank.embedding_bytes) == tuple(held.values())


def kv_cache(decoder: Decoder, num_blocks: int, kv_dtype: str, dtype: torch.dtype, device: str = "cpu") -> KVCache:
    sizes = {"num_blocks": num_blocks, "block_size": 16}
    place: dict[str, Any] = {"dtype": dtype, "device": torch.device(device), "kv_dtype": kv_dtype}
    return KVCache(decoder.cache_kinds, **sizes, **place)


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kv_bytes_are_the_caches(dtype: torch.dtype, kv_dtype: str) -> None:
    settings = config(decoder="qwen3")
    with torch.device("meta"):
        decoder = build(settings).decoder
    cache = kv_cache(decoder, 3, kv_dtype, dtype, "meta")
    held = sum(t.nbytes for layer in cache.layers for t in layer)
    assert held == 3 * block_bytes(decoder.cache_kinds, 16, dtype, kv_dtype)
    plan = make_plan(settings, tp=1, dtype=str(dtype).removeprefix("torch."), kv_cache_dtype=kv_dtype)
    assert plan.kv_cache_dtype == kv_dtype and plan.ranks[0].kv_bytes_per_token * 3 * 16 == held
    assert AT_ONCE == KV_AT_ONCE


class LiveBytes(TorchDispatchMode):
    """The bytes of all tensors born within it that are alive at once, and the most there were."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tree_leaves((args, kwargs)):
            self._see(tensor, born=False)
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            self._see(tensor, born=True)
        return out

    def _see(self, tensor: Any, *, born: bool) -> None:
        if not isinstance(tensor, torch.Tensor):
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes() if born else 0
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def planned(settings: dict[str, Any], **options: Any) -> int:
    """The first rank's activations without the rotary table, which is there before a step."""
    plan = make_plan(settings, tp=1, **options)
    text = settings["text_config"]
    head_dim = text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"]
    return plan.ranks[0].activation_bytes - plan.max_model_len * head_dim * FLOAT32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("encoder", ENCODERS)
def test_the_encoders_peak(encoder: str, dtype: torch.dtype) -> None:
    settings = config(encoder)
    model = build(settings).to(dtype).eval()
    assert model.tower is not None
    tokens, units = 8, model.tower.heaviest()
    pixels = torch.zeros(sum(unit.num_bytes for unit in units), dtype=torch.uint8)
    with torch.no_grad(), LiveBytes() as live:  # no_grad: in inference mode an operator hides its parts
        waiting = model.decoder.embed(torch.zeros(tokens, dtype=torch.int64))
        model.tower.encode(pixels, units)
        del waiting
    plan = planned(
        settings, dtype=str(dtype).removeprefix("torch."), max_num_batched_tokens=tokens, max_model_len=tokens, max_num_seqs=1
    )
    assert live.peak <= plan <= 1.02 * live.peak


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("length", [128, 1024])
def test_a_decoders_peak(decoder: str, dtype: torch.dtype, length: int) -> None:
    check_decoders_peak(decoder, dtype, length, "auto", feed_forward=250)


@pytest.mark.parametrize("kv_dtype", ["int8", "fp8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("decoder", ["qwen2", "mistral"])
@pytest.mark.parametrize("length", [128, 1024, 8192])
def test_a_decoders_peak_with_a_quantised_cache(decoder: str, dtype: torch.dtype, length: int, kv_dtype: str) -> None:
    check_decoders_peak(decoder, dtype, length, kv_dtype, feed_forward=10)


def check_decoders_peak(decoder: str, dtype: torch.dtype, length: int, kv_dtype: str, *, feed_forward: int) -> None:
    """A chunk at the end of a context of `length`: short ones are full in the feed-forward, long ones in attention."""
    tokens = 128
    settings = config(decoder=decoder, intermediate_size=feed_forward, max_position_embeddings=8192)
    model = build(settings).to(dtype).eval().decoder
    model.prepare(length, torch.device("cpu"))
    num_blocks = length // 16
    cache = kv_cache(model, num_blocks, kv_dtype, dtype)
    cache.clear(list(range(num_blocks)))
    with torch.no_grad(), LiveBytes() as live:
        positions = torch.arange(length - tokens, length)
        tables, slots = torch.arange(num_blocks)[None], torch.arange(length - tokens, length)
        metadata = plan_attention(query_lens=(tokens,), context_lens=(length,), block_tables=tables, slots=slots, block_size=16)
        x = model.embed(torch.zeros(tokens, dtype=torch.int64))
        model.logits(model(x, positions, cache, metadata)[-1:])
    tiny_encoder = settings | {
        "vision_config": settings["vision_config"] | {"hidden_size": 8, "intermediate_size": 8, "image_size": 14}
    }
    options = {"dtype": str(dtype).removeprefix("torch."), "kv_cache_dtype": kv_dtype}
    plan = planned(tiny_encoder, **options, max_num_batched_tokens=tokens, max_model_len=length, max_num_seqs=1)
    assert live.peak <= plan <= 1.02 * live.peak


def test_the_peak_of_sampling(checkpoint: Callable[..., Path]) -> None:
    """The whole engine: many requests at once, with penalties and log-probabilities, over a large vocabulary."""
    vocab = 8000
    folder = checkpoint("qwen2", vocab_size=vocab)
    num_seqs = 8
    options = {"max_num_seqs": num_seqs, "max_num_batched_tokens": 64, "max_model_len": 96}
    ours = engine(folder, prefix_caching=False, **options)
    sampling = SamplingParams(repetition_penalty=1.1, logprobs=2, ignore_eos=True)
    for i in range(num_seqs):
        add(ours, i, prompt(folder, "a"), sampling, 3)
    with LiveBytes() as live:
        run(ours)
    plan = planned(json.loads((folder / "config.json").read_text()), dtype="float32", **options)
    assert live.peak <= plan <= 1.04 * live.peak


def test_a_packages_encoder_is_counted_by_building_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "examples/plugin_model")
    point = EntryPoint("llava", "vlserve_llava:LLAVA", registry.GROUP)
    monkeypatch.setattr(registry, "entry_points", lambda group: EntryPoints([point]))
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    settings = config() | {"model_type": "llava", "vision_feature_select_strategy": "full", "vision_feature_layer": -1}
    settings["vision_config"] = vision | {"model_type": "siglip_vision_model", "image_size": 28, "patch_size": 7}
    plan = make_plan(settings, tp=2)
    model_class = sys.modules["vlserve_llava.model"].Llava
    preprocessor = registry.find_architecture(settings).preprocessor(settings, {})
    assert isinstance(preprocessor, TilePreprocessor)
    with torch.device("meta"):
        model = model_class(settings, preprocessor.image, Split())
    assert plan.ok and plan.supported and plan.image_tokens == 16
    assert plan.ranks[1].vision_bytes == num_bytes(model.tower)
    broken = make_plan(settings | {"vision_config": settings["vision_config"] | {"num_attention_heads": 3}}, tp=2)
    assert broken.ok and not broken.supported and "cannot build it" in (broken.reason or "")
