"""What can be set: the engine, the server, the sampling of one request. Frozen, complete, checked here once.

The command line is made from these fields (`metadata["help"]`), so a flag, its default and its help
exist once. This file imports neither torch nor a web framework.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

from vlserve.errors import ConfigError, RequestError

DTYPES = ("auto", "float32", "bfloat16", "float16")
DEVICES = ("auto", "cpu", "cuda")

T = TypeVar("T")


def _option(default: T, help: str, **metadata: Any) -> T:
    value: T = field(default=default, metadata={"help": help, **metadata})
    return value


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Everything the engine needs to know; `VLPipeline` and the command line take these fields."""

    model: str = _option("demo", "demo (in the box), a local folder, or a Hugging Face name such as org/name")
    revision: str | None = _option(None, "branch, tag or commit of a Hugging Face model")
    tp: int = _option(1, "tensor-parallel degree: how many devices share the language model")
    dtype: str = _option("auto", "computation type; auto takes the checkpoint's", choices=DTYPES)
    device: str = _option("auto", "where to run; auto takes a GPU where there is one", choices=DEVICES)
    threads: int | None = _option(None, "CPU threads of a rank; default: all cores")
    max_model_len: int | None = _option(None, "tokens of prompt and answer together; default: the checkpoint's limit")
    max_num_seqs: int = _option(64, "requests in one step")
    max_num_batched_tokens: int = _option(1024, "tokens in one step; longer prompts are computed in chunks")
    block_size: int = _option(16, "tokens in one block of the KV cache")
    kv_cache_gib: float | None = _option(None, "size of the KV cache in GiB, on any device; default: measured")
    gpu_memory_utilization: float = _option(0.9, "share of a CUDA device's memory to use (no meaning on the CPU)")
    vision_cache_gib: float = _option(0.25, "memory for image features kept across requests, in GiB")
    prefix_caching: bool = _option(True, "reuse the KV cache of a beginning that was seen before")
    load_timeout_s: float = _option(600.0, "seconds that one stage of start-up may take before it is given up")
    step_timeout_s: float = _option(300.0, "seconds that one engine step may take before the engine counts as hung")

    def __post_init__(self) -> None:
        if self.tp != 1:
            raise ConfigError(f"tp is {self.tp}: this version runs on one device; use tp=1")
        for name, allowed in (("dtype", DTYPES), ("device", DEVICES)):
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name} is {getattr(self, name)!r}; expected one of {', '.join(allowed)}")
        for name in ("threads", "max_model_len", "max_num_seqs", "max_num_batched_tokens", "block_size"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ConfigError(f"{name} is {value!r}; expected a whole number of 1 or more")
        for name in ("kv_cache_gib", "load_timeout_s", "step_timeout_s"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise ConfigError(f"{name} is {value!r}; expected a number above 0")
        if not (self.vision_cache_gib >= 0 and math.isfinite(self.vision_cache_gib)):
            raise ConfigError(f"vision_cache_gib is {self.vision_cache_gib!r}; expected 0 or more")
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ConfigError(f"gpu_memory_utilization is {self.gpu_memory_utilization!r}; expected above 0, at most 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """The HTTP side."""

    host: str = _option("127.0.0.1", "address to listen on")
    port: int = _option(8000, "port to listen on")
    served_model_name: str | None = _option(None, "the model's id in the API; default: MODEL as typed")

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port is {self.port!r}; expected 0 to 65535")


MAX_STOPS, MAX_LOGPROBS, MAX_INTEGER = 16, 20, 2**31 - 1
MAX_GRAMMAR_CHARACTERS, MAX_REGEX_CHARACTERS, MAX_CHOICES = 65536, 4096, 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class StructuredOutput:
    """What an answer must look like; exactly one field is given.

    Raises RequestError for a field of the wrong kind or size. Whether a schema, regex or grammar can be used is
    found out when it is: before the request reaches the engine.
    """

    json: str | Mapping[str, Any] | bool | None = _option(None, "a JSON schema, as text or as a dictionary; kept as text")
    json_object: bool = _option(False, "any JSON object")
    regex: str | None = _option(None, "a regular expression for the whole answer")
    choice: tuple[str, ...] = _option((), "one of these texts")
    grammar: str | None = _option(None, "a grammar in GBNF, whose first rule is root")
    structural_tag: str | Mapping[str, Any] | None = _option(None, "tags with content between free text, as xgrammar's format")

    def __post_init__(self) -> None:
        if isinstance(self.choice, str) or not isinstance(self.choice, (list, tuple)):
            raise RequestError("structured.choice must be a list of texts", param="structured.choice")
        object.__setattr__(self, "choice", tuple(self.choice))
        for name in ("json", "structural_tag"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                object.__setattr__(self, name, _to_json(value, f"structured.{name}"))
        if not isinstance(self.json_object, bool):
            raise RequestError(
                f"structured.json_object is {self.json_object!r}; expected true or false", param="structured.json_object"
            )
        given = [name for name in self.__dataclass_fields__ if getattr(self, name) not in (None, False, ())]
        if len(given) != 1:
            names = ", ".join(self.__dataclass_fields__)
            raise RequestError(f"structured takes exactly one of {names}; got {', '.join(given) or 'none'}", param="structured")
        for name, most in (
            ("json", MAX_GRAMMAR_CHARACTERS),
            ("regex", MAX_REGEX_CHARACTERS),
            ("grammar", MAX_GRAMMAR_CHARACTERS),
            ("structural_tag", MAX_GRAMMAR_CHARACTERS),
        ):
            value = getattr(self, name)
            if value is not None and (not _is_text(value) or len(value) > most):
                raise RequestError(
                    f"structured.{name} must be a text of 1 to {most} characters, without half characters",
                    param=f"structured.{name}",
                )
        too_long = sum(map(len, self.choice)) > MAX_GRAMMAR_CHARACTERS if all(map(_is_text, self.choice)) else True
        if too_long or len(self.choice) > MAX_CHOICES:
            raise RequestError(
                f"structured.choice must hold at most {MAX_CHOICES} texts, none of them empty, "
                f"and {MAX_GRAMMAR_CHARACTERS} characters in all",
                param="structured.choice",
            )

    @property
    def kind(self) -> str:
        """The name of the field that is given."""
        return next(name for name in self.__dataclass_fields__ if getattr(self, name) not in (None, False, ()))


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How one answer is drawn. Raises RequestError naming the field that is wrong."""

    max_tokens: int | None = _option(None, "tokens of the answer at most; default: what is left of the context")
    temperature: float = _option(0.0, "0 takes the likeliest token, more gives variety")
    top_p: float = _option(1.0, "draw among the likeliest tokens that have this probability together")
    top_k: int = _option(0, "draw among this many likeliest tokens; 0: all")
    min_p: float = _option(0.0, "leave out tokens less likely than this share of the likeliest one")
    repetition_penalty: float = _option(1.0, "above 1 makes tokens of prompt and answer less likely")
    presence_penalty: float = _option(0.0, "subtracted once from tokens already in the answer")
    frequency_penalty: float = _option(0.0, "subtracted for each time a token is already in the answer")
    seed: int | None = _option(None, "makes the draws repeatable")
    stop: tuple[str, ...] = _option((), "texts that end the answer")
    stop_token_ids: tuple[int, ...] = _option((), "token ids that end the answer")
    ignore_eos: bool = _option(False, "go on after the end-of-text token")
    min_tokens: int = _option(0, "tokens of the answer at least")
    logit_bias: Mapping[int, float] = field(default_factory=dict, metadata={"help": "added to the logits, by token id"})
    logprobs: int | None = _option(None, "log-probabilities of this many likeliest tokens at each step")
    skip_special_tokens: bool = _option(True, "leave special tokens out of the text")
    include_stop_str_in_output: bool = _option(False, "keep the stop text at the answer's end")
    structured: StructuredOutput | None = field(
        default=None, metadata={"help": "what the answer must look like; also as a dictionary"}
    )

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        object.__setattr__(self, "stop", tuple(self.stop))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        for name in ("ignore_eos", "skip_special_tokens", "include_stop_str_in_output"):
            if not isinstance(getattr(self, name), bool):
                raise RequestError(f"{name} is {getattr(self, name)!r}; expected true or false", param=name)
        self._number("temperature", 0, 100)
        self._number("top_p", 0, 1, above=True)
        self._number("min_p", 0, 1)
        self._number("repetition_penalty", 0, 100, above=True)
        self._number("presence_penalty", -100, 100)
        self._number("frequency_penalty", -100, 100)
        self._integer("max_tokens", 1, optional=True)
        self._integer("top_k", -1)
        self._integer("min_tokens", 0)
        self._integer("seed", -(2**63), 2**63 - 1, optional=True)
        self._integer("logprobs", 0, MAX_LOGPROBS, optional=True)
        if len(self.stop) > MAX_STOPS or not all(_is_text(s) for s in self.stop):
            raise RequestError(f"stop must hold at most {MAX_STOPS} texts, none of them empty", param="stop")
        if len(self.stop_token_ids) > 256 or not all(_is_integer(i) and 0 <= i <= MAX_INTEGER for i in self.stop_token_ids):
            raise RequestError("stop_token_ids must hold at most 256 token ids of 0 or more", param="stop_token_ids")
        bias = self.logit_bias
        if len(bias) > 1024 or not all(_is_integer(i) and abs(i) <= MAX_INTEGER and _is_number(v) for i, v in bias.items()):
            raise RequestError("logit_bias must hold at most 1024 finite numbers by token id", param="logit_bias")
        object.__setattr__(self, "logit_bias", {id: float(value) for id, value in bias.items()})
        object.__setattr__(self, "structured", _structured(self.structured))
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(f"min_tokens {self.min_tokens} is more than max_tokens {self.max_tokens}", param="min_tokens")

    def _number(self, name: str, low: float, high: float, *, above: bool = False) -> None:
        value = getattr(self, name)
        if not _is_number(value) or not low <= value <= high or (above and value == low):
            wanted = f"{'above' if above else 'from'} {low} to {high}"
            raise RequestError(f"{name} is {value!r}; expected a number {wanted}", param=name)
        object.__setattr__(self, name, float(value))  # numpy's numbers too

    def _integer(self, name: str, low: int, high: int = MAX_INTEGER, *, optional: bool = False) -> None:
        value = getattr(self, name)
        if value is None and optional:
            return
        if not _is_integer(value) or not low <= value <= high:
            wanted = f"of {low} or more" if not _is_integer(value) or value < low else f"from {low} to {high}"
            raise RequestError(f"{name} is {value!r}; expected a whole number {wanted}", param=name)


def _structured(given: Any) -> StructuredOutput | None:
    if given is None or isinstance(given, StructuredOutput):
        return given
    known = StructuredOutput.__dataclass_fields__
    if not isinstance(given, Mapping) or not set(given) <= set(known):
        raise RequestError(f"structured must be a StructuredOutput or a dictionary of {', '.join(known)}", param="structured")
    return StructuredOutput(**given)


def _to_json(value: Any, param: str) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        raise RequestError(f"{param} must be JSON: a text, or dictionaries, lists, texts, numbers", param=param) from None


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_text(value: Any) -> bool:
    """A text that is not empty and has no half characters."""
    return isinstance(value, str) and bool(value) and not any("\ud800" <= c <= "\udfff" for c in value)


def engine_config(values: Mapping[str, Any]) -> EngineConfig:
    """EngineConfig from keywords; raises ConfigError for one that does not exist."""
    known = {f.name for f in fields(EngineConfig)}
    unknown = sorted(set(values) - known)
    if unknown:
        raise ConfigError(f"unknown option {unknown[0]!r}; options: {', '.join(sorted(known))}")
    return EngineConfig(**values)
