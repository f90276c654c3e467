"""Questions to a checkpoint, its answers on a device, and how they compare with the CPU's, which are computed once and kept."""

from __future__ import annotations

import hashlib
import io
import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from benchmarks.contact.isolated import CheckError
from benchmarks.contact.setting import ROOT, Setting
from benchmarks.contact.sources import ENGINE, digest_of
from vlserve.config import EngineConfig, SamplingParams
from vlserve.engine.engine import Engine
from vlserve.engine.messages import Add, MediaRef
from vlserve.models.checkpoint import read_checkpoint
from vlserve.prompt.build import Prompt, PromptBuilder
from vlserve.prompt.conversation import Message, Picture, Text

Token = tuple[int, float, list[tuple[int, float]]]  # id, log-probability, and the likeliest ones
Answers = list[list[Token]]
SAMPLED, MOST = 65536, 16  # bytes of a checkpoint's file, at so many places, by which it is known again


def make_prompts(folder: Path, number: int) -> list[Prompt]:
    """The demo's held-out questions with their pictures; the same for every checkpoint with its tokenizer."""
    sys.path.append(str(ROOT / "examples/demo_model"))
    from held_out import make_items

    checkpoint = read_checkpoint(folder)
    builder, prompts = PromptBuilder(checkpoint), []
    for item in make_items(number, seed=7):
        pictures = [Image.open(io.BytesIO(image)).convert("RGB") for image in item.images]
        parts = [Picture(checkpoint.preprocessor.prepare(picture, "auto")) for picture in pictures]
        prompts.append(builder.build([Message("user", [*parts, Text(item.turns[0])])]))
    return prompts


def make_engine(folder: Path, device: str, **options: Any) -> Engine:
    return Engine(EngineConfig(**{"model": str(folder), "device": device, "kv_cache_gib": 0.05, **options}))


def answer(engine: Engine, prompts: list[Prompt], max_tokens: int, logprobs: int = 2) -> Answers:
    """All at once, greedily. Raises CheckError for a request that ends in an error."""
    for id, prompt in enumerate(prompts):
        media = [MediaRef(digest=s.pixels.digest, units=list(s.pixels.units), runs=s.runs, start=s.start) for s in prompt.spans]
        sampling = SamplingParams(logprobs=logprobs)
        request = Add(id=id, token_ids=prompt.token_ids, media=media, sampling=sampling, max_tokens=max_tokens)
        engine.add(request, [torch.from_numpy(s.pixels.data) for s in prompt.spans])
    answers: Answers = [[] for _ in prompts]
    while engine.has_work:
        for event in engine.step():
            if event.error is not None:
                raise CheckError(f"request {event.id}: {event.error}")
            if event.token_id is not None:
                assert event.logprob is not None
                answers[event.id].append((event.token_id, event.logprob.logprob, event.logprob.top))
    engine.scheduler.pool.check()
    return answers


def kept_answers(
    setting: Setting, folder: Path, prompts: list[Prompt], max_tokens: int, *, logprobs: int = 2, **options: Any
) -> Answers:
    """The CPU's, computed where they are not kept: by checkpoint, questions, options and the engine's files but for Triton's."""
    asked = json.dumps([[p.token_ids for p in prompts], max_tokens, logprobs, sorted(options.items())])
    key = hashlib.sha256((asked + fingerprint(folder) + digest_of(ENGINE, without="triton")).encode()).hexdigest()[:24]
    path = setting.kept / "references" / f"{key}.json"
    if not path.exists():
        torch.set_num_threads(os.cpu_count() or 1)
        answers = answer(make_engine(folder, "cpu", **options), prompts, max_tokens, logprobs)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".new").write_text(json.dumps(answers))
        path.with_suffix(".new").replace(path)
    answers = json.loads(path.read_text())
    return answers


def fingerprint(folder: Path) -> str:
    """Of configuration and weights, of which some places are read."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.json")):
        digest.update(path.read_bytes())
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        with path.open("rb") as file:
            for place in range(0, size, max(SAMPLED, size // MOST)):
                file.seek(place)
                digest.update(file.read(SAMPLED))
    return digest.hexdigest()


@dataclass
class Comparison:
    """Answers that are equal, that part where the reference's two best are nearer than `tie`, and that differ."""

    tie: float
    equal: int = 0
    ties: int = 0
    different: list[str] = field(default_factory=list)
    tokens: int = 0
    largest: float = 0.0  # difference of log-probabilities, of the tokens up to where answers part

    def take(self, index: int, got: list[Token], want: list[Token]) -> None:
        for step, (a, b) in enumerate(zip(got, want, strict=False)):
            if a[0] != b[0]:
                gap = b[2][0][1] - b[2][1][1]
                if gap < self.tie:
                    self.ties += 1
                else:
                    self.different.append(f"answer {index}, token {step}: {a[0]} for {b[0]}, gap of the two best {gap:.2e}")
                return
            self.tokens += 1
            self.largest = max(self.largest, abs(a[1] - b[1]))
        if len(got) == len(want):
            self.equal += 1
        else:
            self.different.append(f"answer {index}: {len(got)} tokens for {len(want)}")

    def row(self) -> dict[str, Any]:
        return {
            "equal": self.equal,
            "ties": self.ties,
            "different": len(self.different),
            "tokens": self.tokens,
            "largest_logprob_difference": self.largest,
        }


def compare(setting: Setting, what: str, got: Answers, want: Answers, *, tie: float, within: float) -> None:
    """Notes how they compare; raises CheckError where they differ, or log-probabilities do by more than `within`."""
    found = Comparison(tie)
    for index, (a, b) in enumerate(zip(got, want, strict=True)):
        found.take(index, a, b)
    setting.found(what=what, **found.row(), tolerated=within)
    if found.different:
        raise CheckError(f"{what}: {len(found.different)} of {len(want)} answers differ: {found.different[0]}")
    if not found.largest <= within:  # NaN too
        raise CheckError(f"{what}: log-probabilities differ by {found.largest:.1e}; tolerated are {within:g}")
