"""Asks transformers and the engine the same thing, and compares greedy tokens with their gaps at hand."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tests import compatibility
from vlserve.config import EngineConfig, SamplingParams
from vlserve.engine.engine import Engine
from vlserve.engine.messages import Add, MediaRef, TokenEvent
from vlserve.models.checkpoint import read_checkpoint
from vlserve.prompt.build import Prompt, PromptBuilder
from vlserve.prompt.conversation import Message, Picture, Text
from vlserve.ranks.client import pack_positions

TIE = 1e-4  # two best logits nearer than this may change places with the order of a sum


def engine(folder: Path, **options: Any) -> Engine:
    config = EngineConfig(**{"model": str(folder), "dtype": "float32", "kv_cache_gib": 0.05, **options})
    made_engine = Engine(config)
    compatibility.made(made_engine, config)
    return made_engine


def prompt(folder: Path, text: str, images: list[Any] = ()) -> Prompt:  # type: ignore[assignment]
    checkpoint = read_checkpoint(folder)
    parts = [Picture(checkpoint.preprocessor.prepare(image, "auto")) for image in images]
    return PromptBuilder(checkpoint).build([Message("user", [*parts, Text(text)])])


def add(engine: Engine, id: int, prompt: Prompt, sampling: SamplingParams, max_tokens: int) -> None:
    media = [MediaRef(digest=s.pixels.digest, units=list(s.pixels.units), runs=s.runs, start=s.start) for s in prompt.spans]
    request = Add(
        id=id,
        token_ids=prompt.token_ids,
        media=media,
        sampling=sampling,
        max_tokens=max_tokens,
        positions=None if prompt.positions is None else pack_positions(prompt.positions),
    )
    engine.add(request, [torch.from_numpy(s.pixels.data) for s in prompt.spans])


def run(engine: Engine) -> dict[int, list[TokenEvent]]:
    """Step until nothing is left; events by request."""
    events: dict[int, list[TokenEvent]] = {}
    while engine.has_work:
        for event in engine.step():
            events.setdefault(event.id, []).append(event)
    compatibility.answered(engine)
    engine.scheduler.pool.check()
    assert engine.scheduler.pool.num_free == engine.scheduler.pool.num_blocks
    for id, of_one in events.items():
        assert [e.finish_reason is not None for e in of_one] == [False] * (len(of_one) - 1) + [True], f"request {id}"
    return events


def tokens(events: list[TokenEvent]) -> list[int]:
    return [e.token_id for e in events if e.token_id is not None]


def ask(engine: Engine, prompts: list[Prompt], max_tokens: int = 12, **sampling: Any) -> list[list[int]]:
    for i, p in enumerate(prompts):
        add(engine, i, p, SamplingParams(**sampling), max_tokens)
    events = run(engine)
    return [tokens(events[i]) for i in range(len(prompts))]


@dataclass
class Comparison:
    """Counts answers that are equal, that part at a tie, and that differ; and the largest top-5 logprob difference."""

    equal: int = 0
    ties: int = 0
    different: list[str] = field(default_factory=list)
    largest_logprob_difference: float = 0.0

    def take(self, got: list[TokenEvent], want_ids: list[int], want_logits: list[torch.Tensor]) -> None:
        got_ids = tokens(got)
        for step, event in enumerate(got):
            if step >= len(want_ids):
                break
            logprobs = want_logits[step].double().log_softmax(-1)
            if event.logprob is not None:
                for id, value in event.logprob.top:
                    self.largest_logprob_difference = max(self.largest_logprob_difference, abs(value - float(logprobs[id])))
            if event.token_id != want_ids[step]:
                best = logprobs.topk(2).values
                gap = float(best[0] - best[1])
                if gap < TIE:
                    self.ties += 1
                else:
                    self.different.append(f"step {step}: {event.token_id} for {want_ids[step]}, gap of the two best {gap:.2e}")
                return
        if got_ids == want_ids:
            self.equal += 1
        else:
            self.different.append(f"lengths {len(got_ids)} and {len(want_ids)}")

    def __str__(self) -> str:
        different = f", {len(self.different)} different" if self.different else ""
        return f"{self.equal} equal, {self.ties} ties{different}; top-5 logprobs within {self.largest_logprob_difference:.1e}"

    def check(self) -> None:
        total = self.equal + self.ties + len(self.different)
        assert not self.different, f"{len(self.different)} of {total} differ: {self.different[:5]}"
        assert self.ties <= max(1, total // 200), f"{self.ties} ties in {total}"


class Ties:
    """Where two runs part, the gap of the two best logprobs decides: under TIE it counts as a tie."""

    def __init__(self) -> None:
        self.compared = self.ties = 0
        self.largest_logprob_difference = 0.0  # of the tokens up to there

    def same(self, got: list[TokenEvent], want: list[TokenEvent]) -> None:
        self.compared += 1
        for step, (a, b) in enumerate(zip(got, want, strict=False)):
            if a.token_id == b.token_id:
                if a.logprob is not None and b.logprob is not None:
                    difference = abs(a.logprob.logprob - b.logprob.logprob)
                    self.largest_logprob_difference = max(self.largest_logprob_difference, difference)
            else:
                assert b.logprob is not None
                gap = b.logprob.top[0][1] - b.logprob.top[1][1]
                assert gap < TIE, f"step {step}: {a.token_id} for {b.token_id}; gap of the two best {gap:.2e}"
                self.ties += 1
                return
        assert tokens(got) == tokens(want)

    def __str__(self) -> str:
        return f"{self.compared} compared, {self.ties} ties; logprobs within {self.largest_logprob_difference:.1e}"

    def check(self) -> None:
        assert self.ties <= max(1, self.compared // 200), f"{self.ties} ties in {self.compared}"


class Transformers:
    """The reference model, in float32 on the CPU."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self.processor = AutoProcessor.from_pretrained(folder)
        self.model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()

    def inputs(self, text: str, images: list[Any] = ()) -> Any:  # type: ignore[assignment]
        content = [*({"type": "image"} for _ in images), {"type": "text", "text": text}]
        rendered = self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        return self.processor(text=[rendered], images=list(images) or None, return_tensors="pt")

    def generate(self, text: str, images: list[Any], max_tokens: int) -> tuple[list[int], list[int], list[torch.Tensor]]:
        """(prompt ids, answer ids, logits at each step)."""
        inputs = self.inputs(text, images)
        with torch.inference_mode():
            out = self.model.generate(
                **inputs, max_new_tokens=max_tokens, do_sample=False, return_dict_in_generate=True, output_logits=True
            )
        length = inputs["input_ids"].shape[1]
        return inputs["input_ids"][0].tolist(), out.sequences[0, length:].tolist(), [step[0] for step in out.logits]
