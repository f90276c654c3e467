"""A run of `vlserve quantize` from the checkpoint to the folder: one decoder layer at a time, each on disk when it is through."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from tqdm import tqdm

import vlserve
from vlserve.errors import ConfigError, ModelError
from vlserve.models.checkpoint import find_folder, read_checkpoint
from vlserve.models.companion_files import CODE, companion_files, without_missing_code
from vlserve.quantize.calibration import find_calibration, read_samples
from vlserve.quantize.experts import quantize_experts
from vlserve.quantize.hidden_states import (
    NOT_SCORED,
    LayerRunner,
    Streams,
    answers_of,
    embed_samples,
    read_streams,
    score,
    watch_inputs,
    watch_tokens,
)
from vlserve.quantize.layer import LayerResult, Recipe, quantize_layer, tensors_of
from vlserve.quantize.output_folder import REPORT, Output, read_header, read_json, write_tensors
from vlserve.quantize.quantization_config import quantization_config
from vlserve.quantize.rounding import join_rounded, join_rows
from vlserve.quantize.settings import GENERATED, TEXT, Settings
from vlserve.quantize.source_checkpoint import Source

BAR = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}, {remaining} left"
MAX_SHARD = 2 * 2**30  # bytes of what is copied as it is, in one file and so in memory


def quantize(settings: Settings) -> dict[str, Any]:
    """Write the folder `settings.out`, or go on with what an earlier run left there; returns the report.

    Raises ConfigError for options and calibration data, ModelError for a checkpoint that does not do.
    """
    calibration = find_calibration(settings)
    folder = find_folder(settings.model, settings.revision)
    source = Source(read_checkpoint(folder))
    settings = replace(settings, calibration=settings.calibration or (GENERATED if source.sees else TEXT))
    check_shapes(source, settings)
    device, dtype = _resolve(settings)
    asked = _asked(settings, source, calibration, device, dtype)
    output: Output | None = None
    try:
        output = Output(settings.out, folder, asked, force=settings.force)
        try:
            return _Run(settings, source, output, asked, device, dtype).run()
        finally:
            output.close()
    except OSError as error:
        is_kept = output is not None and output.is_begun
        way = "make room, and the same command goes on from there" if is_kept else "make room, or give another folder"
        raise ConfigError(f"{settings.out} could not be written: {error}; {way}") from error


def check_shapes(source: Source, settings: Settings) -> None:
    """Whether groups and packing divide the weights; raises ConfigError naming one that they do not."""
    if settings.method == "fp8":
        return
    shapes = {name: shape for index in range(source.num_layers) for name, shape in source.shapes(index).items()}
    for name, (outputs, inputs) in shapes.items():
        if inputs % settings.group_size:
            fits = [size for size in (128, 64, 32) if all(shape[1] % size == 0 for shape in shapes.values())]
            way = f"give --group-size {fits[0]}" if fits else "only --method fp8 can do it"
            raise ConfigError(f"{name} has {inputs} inputs, no multiple of group_size {settings.group_size}; {way}")
        if outputs % 8:
            raise ConfigError(
                f"{name} has {outputs} outputs, no multiple of 8, which 4-bit weights are packed by; use --method fp8"
            )


def _resolve(settings: Settings) -> tuple[torch.device, torch.dtype]:
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device is 'cuda', but torch sees no CUDA device; use --device cpu or check the driver (nvidia-smi)")
    device = torch.device("cpu" if settings.device == "cpu" or not torch.cuda.is_available() else "cuda")
    name = settings.dtype
    if name == "auto":
        name = "float32" if device.type == "cpu" else "bfloat16"
    return device, getattr(torch, name)


def _asked(
    settings: Settings, source: Source, calibration: Path | None, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """All that changes the result, as JSON."""
    folder = source.checkpoint.folder
    model = hashlib.blake2b(repr([(path.name, path.stat().st_size) for path in source.files]).encode(), digest_size=8)
    for path in companion_files(folder, CODE):
        model.update(str(path).encode() + (folder / path).read_bytes())
    data = settings.calibration
    if calibration is not None:
        data = f"{calibration.name} {hashlib.blake2b(calibration.read_bytes(), digest_size=8).hexdigest()}"
    return {
        "vlserve": vlserve.__version__,
        "model": f"{folder.name} {model.hexdigest()}",
        "method": settings.method,
        "format": settings.stored_format,
        "group_size": None if settings.method == "fp8" else settings.group_size,
        "calibration": data,
        "samples": settings.samples,
        "seed": settings.seed,
        "dtype": str(dtype).removeprefix("torch."),
        "device": device.type,
    }


def _interval() -> float:
    """Seconds between updates of the progress bar; in a log file now and then will do."""
    return 0.1 if sys.stderr.isatty() else 30.0


@contextmanager
def _named(index: int) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ModelError(f"layer {index}: {error}") from error


class _Run:
    def __init__(
        self,
        settings: Settings,
        source: Source,
        output: Output,
        asked: dict[str, Any],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.settings, self.source, self.output, self.asked = settings, source, output, asked
        self.device, self.dtype = device, dtype
        scale_dtype = torch.float16 if settings.stored_format == "awq" else None
        self.recipe = Recipe(method=settings.method, group_size=settings.group_size, scale_dtype=scale_dtype)

    def run(self) -> dict[str, Any]:
        if not self.output.is_done:
            streams, num_done = self._begin()
            if num_done:
                tqdm.write(f"going on after layer {num_done}, where an earlier run got to", file=sys.stderr)
            self._layers(streams, num_done)
            self._finish(streams)
        self.output.remove_work()
        return read_json(self.output.out / REPORT)

    def _begin(self) -> tuple[Streams, int]:
        """The samples before the first layer, or where an earlier run got to."""
        state = self.output.read_state()
        if state is not None:
            return read_streams(state[0]), state[1]
        samples = read_samples(self.source.checkpoint, self.settings, self.source.config.max_position_embeddings)
        model = self.source.outer_model(self.dtype, self.device)
        with tqdm(desc="samples", total=len(samples), unit="sample", mininterval=_interval()) as bar:
            streams = embed_samples(model, samples, bar.update)
        if not (streams.next_ids != NOT_SCORED).any():
            raise ConfigError(
                f"calibration {self.settings.calibration!r}: the conversations held out have no text to measure with"
            )
        self.output.write_state(streams.tensors(), 0)
        return streams, 0

    def _layers(self, streams: Streams, num_done: int) -> None:
        runner = LayerRunner(self.source.config, streams.longest, self.dtype, self.device)
        number = self.source.num_layers
        steps = [2 * len(streams.lengths) + 3 * len(streams.held_out_lengths) + self._num_rounded(i) for i in range(number)]
        with tqdm(total=sum(steps), initial=sum(steps[:num_done]), mininterval=_interval(), bar_format=BAR) as bar:
            for index in range(num_done, number):
                bar.set_description_str(f"layer {index + 1}/{number}")
                self._layer(index, streams, runner, bar.update)
                self.output.write_state(streams.tensors(), index + 1)

    def _num_rounded(self, index: int) -> int:
        """Steps of the progress bar: linear layers, or experts."""
        names = [name.split(".experts.") for name in self.source.shapes(index)]
        return len({name[1].split(".")[0] for name in names if len(name) > 1}) + sum(len(name) == 1 for name in names)

    def _layer(self, index: int, streams: Streams, runner: LayerRunner, progress: Callable[[], None]) -> None:
        layer = self.source.layer(index, self.dtype, self.device)
        with watch_inputs(layer, self.device) as inputs, watch_tokens(layer) as tokens:
            runner.run(layer, streams.calibration, streams.lengths, progress)
        original = runner.run(layer, streams.original, streams.held_out_lengths, progress)
        stored = {name: tensor.to(self.device) for name, tensor in self.source.layer_tensors(index).items()}
        del layer
        with torch.inference_mode(), _named(index):
            result = quantize_layer(stored, inputs, self.source.config, self.recipe, progress)
            if tokens:
                quantize_experts(stored, torch.cat(tokens), self.source.config, self.recipe, result, progress)
        del inputs, tokens
        layer = self.source.layer(index, self.dtype, self.device, partial(_changed, result))
        after = runner.run(layer, streams.original, streams.held_out_lengths, progress)
        report = {"error": _relative(after - original, original - streams.original)}
        streams.original = original
        streams.rounded = runner.run(layer, streams.rounded, streams.held_out_lengths, progress)
        streams.calibration = runner.run(layer, streams.calibration, streams.lengths, progress)
        report["drift"] = _relative(streams.rounded - original, original)
        if result.few_tokens:
            report["experts_with_few_tokens"] = result.few_tokens
        self.output.write_layer(index, self._written(index, stored, result), report | {"linear_errors": result.errors})

    def _written(self, index: int, stored: dict[str, torch.Tensor], result: LayerResult) -> dict[str, torch.Tensor]:
        """A layer's tensors by the names in the file."""
        tensors: dict[str, torch.Tensor] = {}
        for name, parts in self.source.stored_names(index).items():
            if parts[0].own.removesuffix(".weight") in result.rounded:
                rounded = join_rounded([(result.rounded[part.own.removesuffix(".weight")], part.ranges) for part in parts])
                written = tensors_of(rounded, self.settings.stored_format)
                tensors |= {f"{name.removesuffix('.weight')}.{part}": value for part, value in written.items()}
            else:
                tensors[name] = join_rows([(result.changed.get(part.own, stored[part.own]), part.ranges) for part in parts])
        return tensors

    def _finish(self, streams: Streams) -> None:
        model = self.source.outer_model(self.dtype, self.device)
        before, after = (score(model, x, streams.next_ids) for x in (streams.original, streams.rounded))
        del model
        shards = [*self._outer_shards(), *(self.output.layer_file(i) for i in range(self.source.num_layers))]
        checkpoint, modules = self.source.checkpoint, self.source.outer_modules()
        form = self.settings.stored_format
        described = quantization_config(
            self.settings.method, form, self.settings.group_size, modules, [self.source.head, *self.source.routers]
        )
        report = self.asked | {
            "calibration_samples": len(streams.lengths),
            "calibration_tokens": sum(streams.lengths),
            "held_out_samples": len(streams.held_out_lengths),
            "perplexity": {
                "of": "answers" if streams.scores_answers else "text",
                "tokens": int((streams.next_ids != NOT_SCORED).sum()),
                "before": before.perplexity,
                "after": after.perplexity,
            },
            "accuracy": {
                "answers": int(answers_of(streams.next_ids).max()) + 1,
                "before": before.answers_right,
                "after": after.answers_right,
                "tokens_before": before.tokens_right,
                "tokens_after": after.tokens_right,
            },
            "layers": [self.output.layer_report(index) for index in range(self.source.num_layers)],
        }
        config = without_missing_code(checkpoint.config, checkpoint.folder) | {"quantization_config": described}
        self.output.finish(shards, checkpoint.folder, companion_files(checkpoint.folder, CODE), config, report)

    def _outer_shards(self) -> list[Path]:
        """Everything but the decoder's layers, copied as it is, in the work folder."""
        shards: list[Path] = []
        sizes: dict[tuple[Path, str], int] = {}
        for path in self.source.files:
            for name, entry in read_header(path).items():
                sizes[path, name] = entry["data_offsets"][1] - entry["data_offsets"][0]
        parts: list[list[tuple[Path, str]]] = [[]]
        for key in self.source.outer_tensors():
            if parts[-1] and sum(sizes[other] for other in parts[-1]) + sizes[key] > MAX_SHARD:
                parts.append([])
            parts[-1].append(key)
        for part in parts:
            tensors = {}
            for path, name in part:
                with safe_open(path, "pt") as file:
                    tensors[name] = file.get_tensor(name)
            shards.append(self.output.work / f"outer-{len(shards):05}.safetensors")
            write_tensors(shards[-1], tensors)
        return shards


def _changed(result: LayerResult, own: str) -> torch.Tensor | None:
    """What the layer computes with afterwards, where it is not the checkpoint's."""
    rounded = result.rounded.get(own.removesuffix(".weight"))
    return result.changed.get(own) if rounded is None else rounded.dense()


def _relative(difference: torch.Tensor, whole: torch.Tensor) -> float:
    return float(difference.double().norm() / whole.double().norm())
