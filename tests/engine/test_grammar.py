"""Constrained answers: what comes out fits, whatever the company; what cannot be followed is refused and holds up nobody."""

from __future__ import annotations

import json
import random
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from PIL import Image, ImageDraw
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import decoders, models

from tests.checkpoints import SPECIAL
from tests.engine.reference import add, engine, prompt, run, tokens
from vlserve import RequestError, SamplingParams, StructuredOutput, VLPipeline
from vlserve.engine import grammar
from vlserve.engine.engine import Engine
from vlserve.engine.grammar import pack_bits, read_vocabulary
from vlserve.engine.messages import TokenEvent
from vlserve.models.checkpoint import DEMO, read_checkpoint
from vlserve.prompt.build import PromptBuilder
from vlserve.prompt.tokenizer import Tokenizer

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 6}, "age": {"type": "integer", "minimum": 0, "maximum": 120}},
    "required": ["name", "age"],
}
CALL = {
    "type": "structural_tag",
    "format": {
        "type": "triggered_tags",
        "triggers": ["<call>"],
        "tags": [{"begin": "<call>", "content": {"type": "json_schema", "json_schema": PERSON}, "end": "</call>"}],
        "at_least_one": True,
        "stop_after_first": True,
    },
}


@pytest.fixture
def folder(checkpoint: Callable[..., Path]) -> Path:
    return checkpoint("qwen2")


@pytest.fixture(scope="module")
def pipe(checkpoint: Callable[..., Path]) -> Iterator[VLPipeline]:
    with VLPipeline(str(checkpoint("qwen2")), dtype="float32", kv_cache_gib=0.05) as pipe:
        yield pipe


def tokenizer(folder: Path) -> Tokenizer:
    return PromptBuilder(read_checkpoint(folder)).tokenizer


def ask(ours: Engine, wanted: list[StructuredOutput | None], max_tokens: int = 120, **sampling: Any) -> list[list[TokenEvent]]:
    """One request for each, drawn at temperature 1 from its own seed unless told otherwise."""
    p = prompt(ours.grammars.folder, "What is it?")
    for i, structured in enumerate(wanted):
        params = SamplingParams(**{"temperature": 1.0, "seed": i, "structured": structured, **sampling})
        add(ours, i, p, params, max_tokens)
    events = run(ours)
    return [events[i] for i in range(len(wanted))]


def text(folder: Path, events: list[TokenEvent]) -> str:
    assert events[-1].finish_reason == "stop", events[-1]
    return tokenizer(folder).decode(tokens(events)[:-1], skip_special_tokens=False)


def random_schema(rng: random.Random, depth: int = 0) -> dict[str, Any]:
    """Short values only: a random model ends an open string or list when it draws the right one of 340 tokens."""
    kinds = ["integer", "number", "string", "pattern", "enum", "boolean", "null"]
    kind = rng.choice(kinds + ["array", "object", "anyOf"] * (depth < 3))
    if kind in ("integer", "number"):
        low = rng.choice([0, -1, -999, rng.randint(-50, 50), rng.randint(-(10**9), 10**9)])
        bounds = {rng.choice(["minimum", "exclusiveMinimum"]): low, "maximum": low + rng.choice([2, 100, 12345])}
        return {"type": kind, **(bounds if rng.random() < 0.7 else {})}
    if kind == "string":
        least = rng.randint(0, 3)
        return {"type": "string", "minLength": least, "maxLength": least + rng.randint(0, 8)}
    if kind == "pattern":
        return {"type": "string", "pattern": rng.choice([r"^[A-Z]{2}-\d{3}$", "^.{1,4}$", "^(?:ab|é)+$", r"^[^\s\\]{2}$"])}
    if kind == "enum":
        return {"enum": rng.sample([1, 2.5, "a", 'say "é"\n', None, True, [1, "x"], {"a": 1}], rng.randint(1, 4))}
    if kind == "array":
        least = rng.randint(0, 2)
        items = random_schema(rng, depth + 1)
        return {"type": "array", "items": items, "minItems": least, "maxItems": least + rng.randint(0, 3)}
    if kind == "object":
        names = rng.sample(["a", "b", "long name", "é", 'q"'], rng.randint(1, 4))
        properties = {name: random_schema(rng, depth + 1) for name in names}
        return {"type": "object", "properties": properties, "required": [n for n in names if rng.random() < 0.6]}
    if kind == "anyOf":
        return {"anyOf": [random_schema(rng, depth + 1) for _ in range(2)]}
    return {"type": kind}


def test_what_200_random_schemas_ask_for_is_what_comes(folder: Path) -> None:
    rng = random.Random(1)
    schemas = [random_schema(rng) for _ in range(200)]
    wanted = [StructuredOutput(json=schema) for schema in schemas]
    ours = engine(folder, max_num_seqs=200, max_num_batched_tokens=4096)
    answers = ask(ours, list(wanted), max_tokens=250)
    decode, stopped = tokenizer(folder), 0
    for schema, structured, events in zip(schemas, wanted, answers, strict=True):
        matcher = ours.grammars.compile(structured).matcher
        assert all(matcher.accept_token(token) for token in tokens(events)), schema
        assert events[-1].finish_reason in ("stop", "length"), events[-1]
        if events[-1].finish_reason == "stop":
            stopped += 1
            value = json.loads(decode.decode(tokens(events)[:-1], skip_special_tokens=False))
            jsonschema.Draft202012Validator(schema).validate(value)
    assert stopped >= 190, f"{stopped} of 200 came to their end"


@pytest.mark.parametrize("temperature", (0.0, 1.0))
def test_every_kind_comes_out_as_asked(folder: Path, temperature: float) -> None:
    wanted = [
        StructuredOutput(regex=r"(?:ab|cd){2}-\d{3}"),
        StructuredOutput(choice=("circle", "square", 'a "quoted" é\\')),
        StructuredOutput(grammar='root ::= "x" item "y"\nitem ::= [0-9] | "(" item ")"'),
        StructuredOutput(structural_tag=CALL),
    ]
    got = ask(engine(folder), list(wanted), max_tokens=300, temperature=temperature, repetition_penalty=1.3)
    texts = [text(folder, events) for events in got[:3]]
    assert re.fullmatch(r"(ab|cd){2}-\d{3}", texts[0])
    assert texts[1] in wanted[1].choice
    assert re.fullmatch(r"x\(*\d\)*y", texts[2]) and texts[2].count("(") == texts[2].count(")")
    called = re.fullmatch(r"<call>(.*)</call>", text(folder, got[3]), re.DOTALL)
    assert called is not None
    jsonschema.validate(json.loads(called[1]), PERSON)


def test_json_object_is_any_object(folder: Path) -> None:
    ours = engine(folder)
    wanted = StructuredOutput(json_object=True)
    # a random model needs some pushing to close what it opened
    closing = {tokenizer(folder).token_id(c): 6.0 for c in ('"', "}", "]")}
    answers = ask(ours, [wanted] * 8, max_tokens=200, logit_bias=closing)
    ended = [json.loads(text(folder, events)) for events in answers if events[-1].finish_reason == "stop"]
    assert ended and all(isinstance(value, dict) for value in ended)


def test_a_complete_answer_ends_whatever_else_is_asked(folder: Path) -> None:
    forbidden = {tokenizer(folder).token_id(c): 100.0 for c in ("Z", "<|im_start|>", "<|endoftext|>")}
    ours = engine(folder)
    for settings in ({"min_tokens": 40}, {"ignore_eos": True}, {"logit_bias": forbidden}, {"top_k": 1}, {"min_p": 0.9}):
        (events,) = ask(ours, [StructuredOutput(choice=("yes", "no"))], **settings)
        assert text(folder, events) in ("yes", "no"), settings
        assert not events[-1].error


def test_min_tokens_is_kept_while_there_is_something_to_say(folder: Path) -> None:
    (events,) = ask(engine(folder), [StructuredOutput(regex="[ab]*")], max_tokens=60, min_tokens=50, temperature=1.0)
    assert len(tokens(events)) >= 50


def test_special_tokens_never_come_inside(folder: Path) -> None:
    ids = [tokenizer(folder).token_id(name) for name in SPECIAL]
    pushed = {id: 100.0 for id in ids if id != tokenizer(folder).token_id("<|im_end|>")}
    (events,) = ask(engine(folder), [StructuredOutput(regex=r"(?:.|\n){20,}")], max_tokens=60, logit_bias=pushed)
    assert not set(ids) & set(tokens(events)[:-1])


def test_preempted_equals_undisturbed(folder: Path) -> None:
    wanted: list[StructuredOutput | None] = [StructuredOutput(json=PERSON), StructuredOutput(regex="[a-z ]{30,40}"), None] * 4
    settings: dict[str, Any] = {"block_size": 4, "max_model_len": 100, "prefix_caching": False}
    small = engine(folder, kv_cache_gib=80 * 4 * 2 * 3 * 2 * 8 * 4 / 2**30, **settings)
    got = ask(small, wanted, max_tokens=60)
    assert small.scheduler.num_preemptions > 0, "the cache was meant to be too small for all"
    want = ask(engine(folder, **settings), wanted, max_tokens=60)
    assert [tokens(events) for events in got] == [tokens(events) for events in want]


def test_results_do_not_depend_on_company(folder: Path) -> None:
    wanted: list[StructuredOutput | None] = [
        StructuredOutput(json=PERSON),
        None,
        StructuredOutput(choice=("left", "right")),
        StructuredOutput(regex=r"\w{5,9}"),
        None,
    ]
    crowded, single = engine(folder, max_num_batched_tokens=11), engine(folder)
    for temperature in (0.0, 1.0):
        together = ask(crowded, wanted, max_tokens=40, temperature=temperature, seed=3)
        for structured, events in zip(wanted, together, strict=True):
            (alone,) = ask(single, [structured], max_tokens=40, temperature=temperature, seed=3)
            assert tokens(events) == tokens(alone)


def test_logprobs_are_the_models_own(folder: Path) -> None:
    ours = engine(folder)
    (events,) = ask(ours, [StructuredOutput(choice=("yes",))], logprobs=2, temperature=0.0)
    (free,) = ask(ours, [None], logprobs=2, temperature=0.0)
    assert events[0].logprob and free[0].logprob and events[0].logprob.top == free[0].logprob.top


class SlowCompiler:
    """Holds compilations of one choice until it is told to go on; `begun` once there is one."""

    def __init__(self, ours: Engine, slow: StructuredOutput) -> None:
        self.begun, self.go = threading.Event(), threading.Event()
        whole = ours.grammars.compile

        def compile(structured: StructuredOutput) -> Any:
            if structured == slow:
                self.begun.set()
                assert self.go.wait(60)
            return whole(structured)

        ours.grammars.compile = compile  # type: ignore[method-assign]


def test_a_slow_compilation_delays_nobody(folder: Path) -> None:
    p, slow = prompt(folder, "What?"), StructuredOutput(choice=("slow",))
    quick = SamplingParams(structured=StructuredOutput(regex="[a-z]{20}"))

    def steps(ours: Engine) -> int:
        """Until the plain and the quick request are done."""
        ours.grammars.compile(quick.structured)  # type: ignore[arg-type]
        add(ours, 1, p, SamplingParams(ignore_eos=True), 30)
        add(ours, 2, p, quick, 30)
        while not ours.scheduler.waiting[-1].is_ready:
            pass
        number = 0
        open_requests = {1, 2}
        while open_requests:
            open_requests -= {event.id for event in ours.step() if event.finish_reason}
            number += 1
        return number

    alone = steps(engine(folder))
    ours = engine(folder)
    compiler = SlowCompiler(ours, slow)
    add(ours, 0, p, SamplingParams(structured=slow), 30)
    assert compiler.begun.wait(60)
    assert steps(ours) == alone
    assert [s.id for s in ours.scheduler.waiting] == [0] and ours.has_work and ours.step() == []
    compiler.go.set()
    assert text(folder, run(ours)[0]) == "slow"


def test_a_compilation_can_be_given_up_or_take_too_long(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = StructuredOutput(choice=("slow",))
    ours = engine(folder)
    compiler = SlowCompiler(ours, slow)
    p = prompt(folder, "What?")
    add(ours, 0, p, SamplingParams(structured=slow), 5)
    assert [event.finish_reason for event in ours.abort([0])] == ["abort"] and not ours.has_work
    add(ours, 1, p, SamplingParams(structured=slow), 5)
    monkeypatch.setattr(grammar, "COMPILE_LIMIT_S", 0.0)
    (event,) = ours.step()
    assert event.finish_reason == "error" and event.error and "longer than" in event.error
    compiler.go.set()
    assert run(ours) == {}


def test_a_grammar_that_fails_ends_its_own_request_only(folder: Path) -> None:
    ours = engine(folder)
    whole = ours.grammars.compile

    def compile(structured: StructuredOutput) -> Any:
        if structured.choice == ("never",):
            raise MemoryError
        compiled = whole(structured)
        if structured.choice == ("no token",):
            return replace(compiled, allowed=torch.zeros_like(compiled.allowed))
        return compiled

    ours.grammars.compile = compile  # type: ignore[method-assign]
    wanted = [StructuredOutput(choice=(t,)) for t in ("never", "no token", "fine", "<|im_end|>")]
    got = ask(ours, [*wanted, None], max_tokens=20)
    assert got[0][-1].finish_reason == "error" and got[0][-1].error == "the grammar could not be compiled: MemoryError"
    assert got[1][-1].finish_reason == "error" and "no token" in str(got[1][-1].error)
    assert text(folder, got[2]) == "fine" and text(folder, got[3]) == "<|im_end|>", "a text, spelled with ordinary tokens"
    assert got[4][-1].finish_reason in ("stop", "length")


def test_a_grammar_that_takes_ever_longer_is_ended(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar, "BEFORE_MEAN_S", 0.02)
    monkeypatch.setattr(grammar, "MEAN_LIMIT_S", 0.001)
    ambiguous = StructuredOutput(grammar='root ::= root root | [a-z] | ""')
    got = ask(engine(folder), [ambiguous, None], max_tokens=400, ignore_eos=True, min_tokens=400)
    assert got[0][-1].finish_reason == "error" and "takes too long" in str(got[0][-1].error)
    assert got[1][-1].finish_reason == "length"


def test_the_vocabulary_of_a_byte_level_tokenizer(folder: Path) -> None:
    whole = HFTokenizer.from_file(str(folder / "tokenizer.json"))
    size = read_checkpoint(folder).config["text_config"]["vocab_size"]
    tokens = read_vocabulary(folder, size, frozenset([0]))
    assert len(tokens) == size > whole.get_vocab_size()
    for id, token in enumerate(tokens):
        name = whole.id_to_token(id)
        if name is None or name in SPECIAL:
            assert token == b"", name
        else:
            assert token.decode(errors="replace") == whole.decode([id])
    assert {bytes([byte]) for byte in range(256)} <= set(tokens)


def test_the_vocabulary_of_a_sentencepiece_tokenizer(tmp_path: Path) -> None:
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", "a", "\u2581a", "é"]
    merges = [("\u2581", "a")]
    model = models.BPE(vocab={piece: id for id, piece in enumerate(pieces)}, merges=merges, byte_fallback=True, unk_token="<unk>")
    whole = HFTokenizer(model)
    whole.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    whole.add_special_tokens(["<unk>", "</s>"])
    whole.add_tokens(["<call>", "<eos> "])
    whole.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<eos> "}')
    tokens = read_vocabulary(tmp_path, 300, frozenset([0]))
    assert tokens[0] == b"" and tokens[1 : 1 + 256] == [bytes([byte]) for byte in range(256)]
    assert tokens[257:261] == [b" ", b"a", b" a", "é".encode()]
    assert tokens[261:264] == [b"", b"<call>", b""] and set(tokens[264:]) == {b""}


@pytest.mark.parametrize("size", (1, 31, 32, 33, 129))
def test_bits_are_packed_as_xgrammar_wants_them(size: int) -> None:
    rng = random.Random(size)
    flags = [rng.random() < 0.5 for _ in range(size)]
    packed = pack_bits(flags)
    assert packed.dtype == torch.int32 and len(packed) == -(-size // 32)
    assert [bool(int(packed[i // 32]) >> (i % 32) & 1) for i in range(size)] == flags


def test_a_request_travels_as_msgpack() -> None:
    import msgspec

    for structured in (StructuredOutput(json=PERSON), StructuredOutput(choice=["a", "b"]), StructuredOutput(structural_tag=CALL)):
        params = SamplingParams(structured=structured)
        assert msgspec.msgpack.decode(msgspec.msgpack.encode(params), type=SamplingParams) == params
    assert SamplingParams(structured={"json": PERSON}).structured == StructuredOutput(json=json.dumps(PERSON))  # type: ignore[arg-type]


BAD: list[tuple[Any, str, str]] = [
    ({}, "structured", "exactly one"),
    ({"regex": "a", "choice": ["b"]}, "structured", "exactly one of .* got regex, choice"),
    ({"xml": "a"}, "structured", "dictionary of json"),
    ("json", "structured", "dictionary of json"),
    ({"choice": "ab"}, "structured.choice", "list of texts"),
    ({"choice": ["a", ""]}, "structured.choice", "none of them empty"),
    ({"choice": ["a"] * 1025}, "structured.choice", "at most 1024"),
    ({"json_object": 1}, "structured.json_object", "true or false"),
    ({"json": "{"}, "structured.json", "not valid JSON"),
    ({"json": {"type": object()}}, "structured.json", "must be JSON"),
    ({"json": {"type": "text"}}, "structured.json", "type is 'text'"),
    ({"json": "[" * 70000}, "structured.json", "65536 characters"),
    ({"json": "[" * 60000}, "structured.json", "not valid JSON"),
    ({"json": {"enum": ["\ud83d"]}}, "structured.json", "half characters"),
    ({"json": {"$ref": "#"}}, "structured.json", "nothing fits it"),
    ({"json": {"type": "integer", "minimum": 3, "maximum": 2}}, "structured.json", "minimum greater than maximum"),
    ({"regex": "(a"}, "structured.regex", "unterminated|missing"),
    ({"regex": "(?=a)b"}, "structured.regex", "no text fits"),
    ({"regex": "(?<=a)b"}, "structured.regex", "lookbehind"),
    ({"regex": "(a{1000}){1000}"}, "structured.regex", "states"),
    ({"regex": "(" * 2000 + ")" * 2000}, "structured.regex", "nested"),
    ({"grammar": "root ::= ("}, "structured.grammar", "EBNF parser error"),
    ({"grammar": 'start: "a" | "b"'}, "structured.grammar", "expected GBNF .EBNF., whose rules are root ::= .*, not Lark"),
    ({"grammar": "root ::= nobody"}, "structured.grammar", "nobody"),
    ({"grammar": 'root ::= "a"{1,1000000000}'}, "structured.grammar", "repeat"),
    ({"grammar": "root ::= " + "[^x]{0,999} " * 9}, "structured.grammar", "1152 states"),
    ({"grammar": "root ::= root"}, "structured.grammar", "nothing fits"),
    ({"structural_tag": {"type": "tag"}}, "structured.structural_tag", "must be"),
    (
        {"structural_tag": {"type": "structural_tag", "format": {"type": "token", "token": 5}}},
        "structured.structural_tag",
        "one of",
    ),
    (
        {
            "structural_tag": {
                "type": "structural_tag",
                "format": {"type": "json_schema", "json_schema": {"not": {"type": "null"}}},
            }
        },
        "structured.structural_tag",
        "'?not'? is not supported",
    ),
]


@pytest.mark.parametrize("given,param,message", BAD, ids=[str(n) for n in range(len(BAD))])
def test_what_cannot_be_followed_is_refused_and_the_next_is_answered(
    pipe: VLPipeline, given: Any, param: str, message: str
) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        pipe("hi", structured=given, max_tokens=5)
    assert caught.value.param == param and "/project/" not in str(caught.value)
    assert pipe("next", max_tokens=1).token_ids


def test_through_the_pipeline(pipe: VLPipeline) -> None:
    answer = pipe("hi", structured={"choice": ["yes", "no"]})
    assert answer.text in ("yes", "no") and answer.finish_reason == "stop"
    deltas = list(pipe.stream("hi", structured=StructuredOutput(json=PERSON), temperature=1.0, seed=1, max_tokens=150))
    jsonschema.validate(json.loads("".join(delta.text for delta in deltas)), PERSON)
    cut = pipe("hi", structured=StructuredOutput(regex="ab-cd-ef"), stop="-c")
    assert cut.text == "ab" and cut.finish_reason == "stop"
    many = pipe(["a", "b", "c"], structured=StructuredOutput(regex="[xyz]{3}"))
    assert all(re.fullmatch("[xyz]{3}", a.text) for a in many)


def test_a_check_that_takes_long_holds_up_nobody(pipe: VLPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    go = threading.Event()
    monkeypatch.setattr("vlserve.structured.grammar.check", lambda structured: go.wait(60))
    monkeypatch.setattr("vlserve.structured.grammar.COMPILE_LIMIT_S", 0.05)
    for _ in range(3):
        with pytest.raises(RequestError, match=r"longer than 0.05 s to check"):
            pipe("hi", structured={"regex": "abc"})
    assert pipe("hi", max_tokens=1).token_ids
    go.set()


SHAPES: dict[str, Callable[[ImageDraw.ImageDraw], None]] = {
    "circle": lambda draw: draw.ellipse((60, 40, 180, 160), fill="red"),
    "square": lambda draw: draw.rectangle((60, 40, 180, 160), fill="blue"),
    "triangle": lambda draw: draw.polygon([(120, 30), (50, 160), (190, 160)], fill="green"),
}


def test_the_demo_chooses_right() -> None:
    ours = engine(DEMO, kv_cache_gib=0.2)
    for id, paint in enumerate(SHAPES.values()):
        image = Image.new("RGB", (240, 200), "white")
        paint(ImageDraw.Draw(image))
        choices = tuple(f"It is a {name}." for name in ("square", "star", *SHAPES))  # as it was trained to say it
        params = SamplingParams(structured=StructuredOutput(choice=choices))
        add(ours, id, prompt(DEMO, "What shape is it?", [image]), params, 16)
    events = run(ours)
    assert [text(DEMO, events[id]) for id in range(len(SHAPES))] == [f"It is a {name}." for name in SHAPES]
