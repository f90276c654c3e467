"""Times the engine's tokens with and without a grammar on this machine, and how long a grammar takes to compile.

Checks first that constrained answers fit and that plain ones do not change beside them. The kinds take turns, round
after round, and the figures are medians of rounds, since machines are noisy. The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import statistics
import time

from vlserve.config import EngineConfig, SamplingParams, StructuredOutput
from vlserve.engine.engine import Engine
from vlserve.engine.messages import Add
from vlserve.models.checkpoint import find_folder, read_checkpoint
from vlserve.prompt.build import PromptBuilder
from vlserve.prompt.conversation import Message, Text

ITEM = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "sizes": {"type": "array", "items": {"type": "integer"}, "minItems": 400}},
    "required": ["name", "sizes"],
}
KINDS: dict[str, StructuredOutput | None] = {
    "none": None,
    "regex": StructuredOutput(regex=r"[\w ,]{2000,}"),
    "json_object": StructuredOutput(json_object=True),
    "json": StructuredOutput(json=ITEM),
}


class Bench:
    def __init__(self, model: str) -> None:
        self.engine = Engine(EngineConfig(model=model, kv_cache_gib=0.5))
        builder = PromptBuilder(read_checkpoint(find_folder(model)))
        self.tokenizer = builder.tokenizer
        self.prompt = builder.build([Message("user", [Text("Describe the picture.")])])
        self.number = 0

    def run(self, kinds: list[str], tokens: int) -> tuple[list[list[int]], float]:
        """Answers of one request for each kind, and the median seconds of a step in which all of them decode."""
        first = self.number
        for kind in kinds:
            sampling = SamplingParams(temperature=1.0, seed=self.number - first, structured=KINDS[kind], ignore_eos=True)
            request = Add(id=self.number, token_ids=self.prompt.token_ids, images=[], sampling=sampling, max_tokens=tokens)
            self.engine.add(request, [])
            self.number += 1
        answers: list[list[int]] = [[] for _ in kinds]
        seconds = []
        while self.engine.has_work:
            begun = time.perf_counter()
            events = self.engine.step()
            if len(events) == len(kinds) and all(answers):
                seconds.append(time.perf_counter() - begun)
            for event in events:
                assert event.error is None, event.error
                if event.token_id is not None:
                    answers[event.id - first].append(event.token_id)
        return answers, statistics.median(seconds)

    def check(self) -> None:
        texts = [self.tokenizer.decode(ids) for ids in self.run(["regex", "json", "none"], 40)[0]]
        assert re.fullmatch(r"[\w ,]+", texts[0], re.ASCII) and texts[1].startswith("{"), "answers do not fit: no figures"
        plain = self.run(["none", "none"], 40)[0]
        beside = self.run(["none", "json"], 40)[0]
        assert plain[0] == beside[0], "a grammar changed the answer beside it: no figures"

    def compile_seconds(self) -> dict[str, float]:
        """Each kind anew, without the compiler's cache; xgrammar's import comes first."""
        compiler = self.engine.grammars
        begun = time.perf_counter()
        compiler.compile(StructuredOutput(choice=("warm-up",)))
        seconds = {"first_request": time.perf_counter() - begun}
        for kind, structured in KINDS.items():
            if structured is not None:
                begun = time.perf_counter()
                compiler.compile(structured)
                seconds[kind] = time.perf_counter() - begun
        return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 16], help="at once")
    parser.add_argument("--tokens", type=int, default=64, help="of each answer")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()

    bench = Bench(args.model)
    compiling = bench.compile_seconds()
    bench.check()
    rows = []
    for number in args.requests:
        times: dict[str, list[float]] = {kind: [] for kind in KINDS}
        for _ in range(args.rounds):
            for kind in KINDS:
                times[kind].append(bench.run([kind] * number, args.tokens)[1])
        for kind, seconds in times.items():
            ratio = statistics.median(s / plain for s, plain in zip(seconds, times["none"], strict=True))
            rows.append(
                {
                    "requests": number,
                    "kind": kind,
                    "step_ms": round(1000 * statistics.median(seconds), 3),
                    "ratio": round(ratio, 3),
                }
            )
    for row in rows:
        print(f"{row['requests']:4d} requests   {row['kind']:12s} {row['step_ms']:9.3f} ms a step   {row['ratio']:.2f} times")
    for kind, seconds in compiling.items():
        print(f"compile {kind:19s} {seconds:9.3f} s")
    result = {
        "machine": f"{platform.machine()}, {platform.processor() or platform.system()}",
        "model": args.model,
        "tokens": args.tokens,
        "steps": rows,
        "compile_s": {kind: round(seconds, 3) for kind, seconds in compiling.items()},
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
