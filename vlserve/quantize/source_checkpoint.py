"""The checkpoint that is read: which of its tensors belong to which decoder layer, and its parts one at a time.

Names are of two kinds: those in the files (`stored names`), and those that the model gives them (`targets`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from vlserve.engine.loading import build_model
from vlserve.errors import ConfigError, ModelError
from vlserve.llm.attention import Attention
from vlserve.llm.config import DecoderConfig
from vlserve.llm.decoder import Decoder
from vlserve.llm.experts import Experts
from vlserve.llm.layer import DecoderLayer
from vlserve.llm.mlp import DenseMLP
from vlserve.llm.shards import LIST, read_shards
from vlserve.llm.sliding_attention import SlidingAttention
from vlserve.llm.stored_files import checkpoint_files
from vlserve.llm.stored_names import ExpertPart, Part, Ranges, expanded
from vlserve.llm.tensor_parallel import Split
from vlserve.llm.weights import Target, fill, match_tensors
from vlserve.models.base import Model
from vlserve.models.checkpoint import Checkpoint
from vlserve.quantize.quantization_config import HEAD

PACKED = (".qweight", ".weight_packed", ".weight_scale", ".weight_scale_inv")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a target is in the files: a stored tensor, or a part of one that holds several."""

    path: Path
    name: str
    part: Part | ExpertPart | None = None


@dataclass(frozen=True, slots=True)
class Within:
    """A layer's own tensor, and its outputs among those of the stored one; () for all."""

    own: str
    ranges: Ranges


class Source:
    """Reads the files' headers, strictly. Raises ModelError for a checkpoint that is damaged, ConfigError for one that is
    sharded or quantised already."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        try:
            if read_shards(checkpoint.folder) is not None:
                raise ConfigError(
                    f"{checkpoint.folder} is sharded ({LIST}); quantise the original checkpoint, which is then served whole"
                )
            files = checkpoint_files(checkpoint.folder)
            self._refuse_quantised(files)
            self._model = build_model(checkpoint, Split())
            _refuse_other_kinds(self._model.decoder)
            targets = self._model.targets()
            for _ in match_tensors(checkpoint.folder, targets, rename=self._model.rename):
                pass
        except (ValueError, FileNotFoundError) as error:
            raise ModelError(str(error)) from error
        self.config: DecoderConfig = self._model.decoder.config
        self.stored: dict[str, Place] = {}  # by target
        self.passed_over: list[tuple[Path, str]] = []
        for path in files:
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118  (safe_open is no mapping)
                    target = self._model.rename(name)
                    if target is None:
                        self.passed_over.append((path, name))
                    elif isinstance(target, str):
                        self.stored[target] = Place(path, name)
                    else:
                        self.stored |= {part.name: Place(path, name, part) for part in target}
        layers, self._model.decoder.layers = self._model.decoder.layers, torch.nn.ModuleList()
        self._outer = set(self._model.targets())
        self._layers = layers
        inner = [name for name in targets if name not in self._outer]
        self._names = []  # of each layer: the layer's own name for a tensor, and the target
        for index, layer in enumerate(layers):
            assert isinstance(layer, DecoderLayer)
            place = f".layers.{index}."
            self._names.append({own: next(t for t in inner if t.endswith(place + own)) for own, _ in layer.targets("")})

    def _refuse_quantised(self, files: Iterable[Path]) -> None:
        config = self.checkpoint.config
        for key, place in (("", config), *((f"{key}.", config.get(key) or {}) for key in ("text_config", "llm_config"))):
            if place.get("quantization_config"):
                raise ConfigError(
                    f"{self.checkpoint.folder}/config.json has a {key}quantization_config: it is quantised already; "
                    "quantise the original checkpoint"
                )
        for path in files:
            with safe_open(path, "pt") as file:
                packed = next((name for name in file.keys() if name.endswith(PACKED)), None)  # noqa: SIM118
            if packed is not None:
                raise ConfigError(f"{path} has {packed}: it is quantised already; quantise the original checkpoint")

    @property
    def num_layers(self) -> int:
        return len(self._layers)

    @property
    def files(self) -> list[Path]:
        return sorted({place.path for place in self.stored.values()} | {path for path, _ in self.passed_over})

    @property
    def sees(self) -> bool:
        """Whether there are pictures for it."""
        return bool(self.checkpoint.preprocessor.placeholders())

    @property
    def head(self) -> str:
        """The head's module, as the files call it within the language model."""
        target = next((name for name in self._outer if name.endswith(f"{HEAD}.weight")), None)
        return HEAD if target is None else self.stored[target].name.removesuffix(".weight").rpartition(".")[2]

    def shapes(self, index: int) -> dict[str, tuple[int, int]]:
        """Of the linear layers of one decoder layer, (outputs, inputs) by their names within it."""
        layer = self._layers[index]
        assert isinstance(layer, DecoderLayer)
        return {
            names + name: (size, linear.format.in_features)
            for names, linear in layer.linears("")
            for name, (_, size) in linear.format.outputs.items()
        }

    @property
    def routers(self) -> list[str]:
        """Names, or the part that is enough, of the modules that choose experts."""
        layers = [] if self.config.experts is None else self.config.experts.layers
        return ["mlp.gate"] if len(layers) == self.num_layers else [f"layers.{index}.mlp.gate" for index in layers]

    def outer_model(self, dtype: torch.dtype, device: torch.device) -> Model:
        """Everything but the decoder's layers, with weights: the encoder, the embeddings, the last norm and the head."""
        model = build_model(self.checkpoint, Split())
        model.decoder.layers = torch.nn.ModuleList()
        model = model.to(dtype).to_empty(device=device).eval().requires_grad_(False)
        for name, target in model.targets().items():
            self._fill(name, target)
        return model

    def layer(
        self,
        index: int,
        dtype: torch.dtype,
        device: torch.device,
        changed: Callable[[str], torch.Tensor | None] = lambda own: None,
    ) -> DecoderLayer:
        """One decoder layer with its weights, in memory of its own; `changed`: what comes in the place of its own tensors."""
        with torch.device("meta"):
            layer = DecoderLayer(self.config, Split(), self._model.decoder.layer_kind(index))
        layer = layer.to(dtype).to_empty(device=device).eval().requires_grad_(False)
        for own, target in layer.targets(""):
            other = changed(own)
            if other is None:
                self._fill(self._names[index][own], target)
            else:
                fill(target, other)
        layer.mixer.finish()
        layer.feed_forward.finish()
        return layer

    def layer_tensors(self, index: int) -> dict[str, torch.Tensor]:
        """A layer's tensors as they are stored, by the layer's own names."""
        found = {}
        for own, target in self._names[index].items():
            with safe_open(self.stored[target].path, "pt") as file:
                found[own] = _handle(file, self.stored[target])[...]
        return found

    def stored_names(self, index: int) -> dict[str, list[Within]]:
        """A layer's tensors by their names in the files, each with what it holds."""
        found: dict[str, list[Within]] = {}
        for own, target in self._names[index].items():
            place = self.stored[target]
            found.setdefault(place.name, []).append(Within(own, place.part.ranges if isinstance(place.part, Part) else ()))
        return found

    def outer_tensors(self) -> list[tuple[Path, str]]:
        """(file, stored name) of everything but the decoder's layers, in the files' order."""
        inner = {(self.stored[target].path, self.stored[target].name) for names in self._names for target in names.values()}
        return sorted(({(place.path, place.name) for place in self.stored.values()} | {*self.passed_over}) - inner)

    def outer_modules(self) -> list[str]:
        """First names of the modules beside the language model, e.g. vision_tower."""
        own = next(iter(self._names[0].items()))
        prefix = own[1].removesuffix(own[0])  # language_model.model.layers.0.
        language = prefix.split(".")[0]
        return sorted({name.split(".")[0] for name in self._outer} - {language, HEAD})

    def _fill(self, name: str, target: Target) -> None:
        place = self.stored[name]
        with safe_open(place.path, "pt") as file:
            fill(target, _handle(file, place))


def _handle(file: Any, place: Place) -> Any:
    stored = file.get_slice(place.name)
    return stored if place.part is None else next(part for _, part in expanded([place.part], stored))


def _refuse_other_kinds(decoder: Decoder) -> None:
    """What calibration cannot run yet: other layers than attention with a dense MLP or plain experts, positions of several
    parts, and features that enter deeper layers."""
    halves = [half for layer in decoder.decoder_layers for half in (layer.mixer, layer.feed_forward)]
    others = {type(half).__name__ for half in halves if type(half) not in (Attention, SlidingAttention, DenseMLP, Experts)}
    experts = decoder.config.experts
    if experts is not None and (experts.bias or experts.router_bias):  # GPT-OSS's, whose activation is another one too
        others.add("experts with biases")
    if type(decoder) is not Decoder:
        others.add(f"the decoder {type(decoder).__name__}")
    if len(set(decoder.cache_kinds)) > 1:
        others.add("layers that keep different things of a token")
    if decoder.num_position_axes > 1:
        others.add(f"positions of {decoder.num_position_axes} parts")
    if decoder.num_feature_levels > 1:
        others.add(f"pictures' features of {decoder.num_feature_levels} levels")
    if others:
        raise ConfigError(f"this model has {', '.join(sorted(others))}, with which vlserve quantize cannot calibrate yet")
