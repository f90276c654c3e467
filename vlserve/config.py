"""What can be set: the engine, the server, the sampling of one request. Frozen, complete, checked here once.

The command line is made from these fields (`metadata["help"]`), so a flag, its default and its help
exist once. This file imports neither torch nor a web framework.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from vlserve.errors import ConfigError, RequestError
from vlserve.migrating import explain_option, explain_sampling

DTYPES = ("auto", "float32", "bfloat16", "float16")
LM_HEAD_BITS = (16, 8)
KV_DTYPES = ("auto", "int8", "fp8")
DEVICES = ("auto", "cpu", "cuda")
FAILURE_POLICIES = ("exit", "restart")
LOG_FORMATS, LOG_LEVELS = ("text", "json"), ("debug", "info", "warning", "error")

_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/?#,\s*A-Z]+")

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
    replicate_kv_heads: bool = _option(
        False, "allow a tp above the number of KV heads, of which ranks then keep copies, where it is a multiple"
    )
    expert_parallel: bool = _option(
        False, "of a mixture of experts, give each rank some experts whole; without it each has a part of every expert"
    )
    nnodes: int = _option(
        1, "machines that share the tp ranks; start vlserve on each. torchrun and Slurm's srun say it themselves"
    )
    node_rank: int = _option(0, "which of the machines this is; machine 0 has the HTTP server")
    rdzv_endpoint: str | None = _option(
        None,
        "HOST:PORT of machine 0 where the ranks of several machines meet; firewall it, since whoever reaches it can interfere",
    )
    dtype: str = _option("auto", "computation type; auto takes the checkpoint's", choices=DTYPES)
    lm_head_bits: int = _option(
        16,
        "bits of a weight in the language model's head; 8 halves what a token reads of it; a tied embedding stays beside it",
        choices=LM_HEAD_BITS,
    )
    device: str = _option("auto", "where to run; auto takes a GPU where there is one", choices=DEVICES)
    threads: int | None = _option(None, "CPU threads of a rank; default: all cores")
    max_model_len: int | None = _option(
        None,
        "tokens of prompt and answer together; default: the checkpoint's limit, with its rope scaling unless that is dynamic",
    )
    max_num_seqs: int = _option(64, "requests in one step")
    max_num_batched_tokens: int = _option(1024, "tokens in one step; longer prompts are computed in chunks")
    block_size: int = _option(16, "tokens in one block of the KV cache")
    kv_cache_gib: float | None = _option(None, "size of each rank's KV cache in GiB, on any device; default: measured")
    kv_cache_dtype: str = _option(
        "auto",
        "type of keys and values in the KV cache: auto is the computation type; int8 and fp8 (E4M3), with a scale a token and "
        "head, make room for about twice the tokens of a 16-bit type",
        choices=KV_DTYPES,
    )
    gpu_memory_utilization: float = _option(0.9, "share of a CUDA device's memory to use (no meaning on the CPU)")
    enforce_eager: bool = _option(
        False,
        "launch kernels one by one on CUDA, without CUDA graphs of decode steps and of pictures with few tiles; saves the "
        "memory that is set aside for graphs",
    )
    overlap: bool = _option(True, "on CUDA, prepare and start a step while the one before it computes")
    vision_cache_gib: float = _option(0.25, "memory for image features kept across requests, in GiB")
    prefix_caching: bool = _option(True, "reuse the KV cache of a beginning that was seen before")
    on_rank_failure: str = _option(
        "exit", "when a rank fails: end with an error, or start all ranks again and go on", choices=FAILURE_POLICIES
    )
    rendezvous_timeout_s: float = _option(120.0, "seconds for all ranks to find one another at start-up")
    load_timeout_s: float = _option(600.0, "seconds that one stage of start-up may take before it is given up")
    step_timeout_s: float = _option(300.0, "seconds that one engine step may take before the engine counts as hung")

    def __post_init__(self) -> None:
        for name, allowed in (
            ("dtype", DTYPES),
            ("kv_cache_dtype", KV_DTYPES),
            ("device", DEVICES),
            ("on_rank_failure", FAILURE_POLICIES),
        ):
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name} is {getattr(self, name)!r}; expected one of {', '.join(allowed)}")
        for name in ("tp", "nnodes", "threads", "max_model_len", "max_num_seqs", "max_num_batched_tokens", "block_size"):
            value = getattr(self, name)
            if value is not None and (not _is_integer(value) or value < 1):
                raise ConfigError(f"{name} is {value!r}; expected a whole number of 1 or more")
        if self.lm_head_bits not in LM_HEAD_BITS:
            raise ConfigError(f"lm_head_bits is {self.lm_head_bits!r}; expected {' or '.join(map(str, LM_HEAD_BITS))}")
        self._check_machines()
        for name in ("kv_cache_gib", "rendezvous_timeout_s", "load_timeout_s", "step_timeout_s"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise ConfigError(f"{name} is {value!r}; expected a number above 0")
        if not (self.vision_cache_gib >= 0 and math.isfinite(self.vision_cache_gib)):
            raise ConfigError(f"vision_cache_gib is {self.vision_cache_gib!r}; expected 0 or more")
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ConfigError(f"gpu_memory_utilization is {self.gpu_memory_utilization!r}; expected above 0, at most 1")

    @property
    def ranks_per_node(self) -> int:
        """Ranks of one machine."""
        return self.tp // self.nnodes

    def _check_machines(self) -> None:
        if self.tp % self.nnodes:
            raise ConfigError(f"tp {self.tp} ranks cannot be shared evenly by {self.nnodes} machines (nnodes)")
        if not _is_integer(self.node_rank) or not 0 <= self.node_rank < self.nnodes:
            raise ConfigError(f"node_rank is {self.node_rank!r}; expected 0 to {self.nnodes - 1} for nnodes={self.nnodes}")
        if self.nnodes == 1:
            return
        host, _, port = (self.rdzv_endpoint or "").rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 65536:
            raise ConfigError(
                f"rdzv_endpoint is {self.rdzv_endpoint!r}; several machines need HOST:PORT, reachable from all of them"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """The HTTP side."""

    host: str = _option("127.0.0.1", "address to listen on")
    port: int = _option(8000, "port to listen on")
    served_model_name: str | None = _option(None, "the model's id in the API; default: MODEL as typed")
    api_key_file: str | None = _option(None, "file with one API key a line; the variable VLSERVE_API_KEYS has them with commas")
    api_keys: tuple[str, ...] = _option((), "accepted keys; on every route but /health and /live", flag=False)
    max_queue: int = _option(512, "answers that may wait beside the max_num_seqs that run; more requests get status 429")
    request_timeout_s: float | None = _option(None, "seconds that one request may take; default: no limit")
    drain_seconds: float = _option(30.0, "on SIGTERM, seconds for open requests to end; a second signal ends at once")
    keep_alive: float = _option(
        75.0,
        "seconds that an idle connection stays open; more than a proxy in front keeps its own (nginx: 60), or requests get lost",
    )
    max_body_mib: int = _option(64, "size of one request's body, pictures included, in MiB")
    store_responses: bool = _option(
        False,
        "keep responses of /v1/responses in memory, each for its API key: for previous_response_id, for GET and DELETE, and for "
        "background; they end with the server",
    )
    max_stored_responses: int = _option(1000, "responses kept at once; the least recently used make room")
    max_stored_mib: int = _option(256, "memory of kept responses with their conversations, in MiB")
    cors_origins: tuple[str, ...] = _option(
        (), "web origins that may call from a browser, e.g. https://app.example; default: none"
    )
    ssl_certfile: str | None = _option(None, "certificate chain (PEM), for HTTPS")
    ssl_keyfile: str | None = _option(None, "private key (PEM) of ssl_certfile")
    log_format: str = _option("text", "lines for people, or one JSON document a line", choices=LOG_FORMATS)
    log_level: str = _option("info", "what is logged; info has a line for each request", choices=LOG_LEVELS)

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port is {self.port!r}; expected 0 to 65535")
        if self.max_queue < 0:
            raise ConfigError(f"max_queue is {self.max_queue!r}; expected 0 or more")
        if self.max_body_mib < 1:
            raise ConfigError(f"max_body_mib is {self.max_body_mib!r}; expected 1 or more")
        known = type(self).__dataclass_fields__
        for name in ("max_stored_responses", "max_stored_mib"):
            value = getattr(self, name)
            if value < 1:
                raise ConfigError(f"{name} is {value!r}; expected 1 or more")
            if value != known[name].default and not self.store_responses:
                raise ConfigError(f"{name} is {value!r}, and no responses are kept; give store_responses (--store-responses) too")
        for origin in self.cors_origins:
            if origin not in ("*", "null") and not _ORIGIN.fullmatch(origin):
                raise ConfigError(
                    f"cors_origins has {origin!r}; expected what browsers send, a scheme and a host in lower case, such as "
                    "https://app.example or http://localhost:3000, without a path or an ending /; or * for all"
                )
        if self.request_timeout_s is not None and not (self.request_timeout_s > 0 and math.isfinite(self.request_timeout_s)):
            raise ConfigError(f"request_timeout_s is {self.request_timeout_s!r}; expected a number above 0")
        if not (self.drain_seconds >= 0 and math.isfinite(self.drain_seconds)):
            raise ConfigError(f"drain_seconds is {self.drain_seconds!r}; expected 0 or more")
        if not (self.keep_alive > 0 and math.isfinite(self.keep_alive)):
            raise ConfigError(f"keep_alive is {self.keep_alive!r}; expected a number above 0")
        if (self.ssl_certfile is None) != (self.ssl_keyfile is None):
            raise ConfigError("ssl_certfile and ssl_keyfile belong together; give both or none")
        for key in self.api_keys:
            if not key.isascii() or not key.isprintable() or " " in key or not key:
                where = "in api_key_file or VLSERVE_API_KEYS"
                raise ConfigError(f"an API key {where} must be printable ASCII characters, one or more, without a space")
        for name, allowed in (("log_format", LOG_FORMATS), ("log_level", LOG_LEVELS)):
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name} is {getattr(self, name)!r}; expected one of {', '.join(allowed)}")


PILLOW_MAX_PIXELS = 178_956_970  # above it, Pillow itself refuses
_HOST = re.compile(r"(\*\.)?[a-z0-9_:]([a-z0-9_.:-]*[a-z0-9_:])?")


@dataclass(frozen=True, slots=True, kw_only=True)
class MediaConfig:
    """What pictures may cost and where they may come from; `VLPipeline` and the command line take these fields too."""

    limit_images_per_prompt: int = _option(64, "pictures in one request")
    max_image_pixels: int = _option(64_000_000, "pixels of one picture, as its header says, before it is decoded")
    max_image_mib: int = _option(32, "size of one encoded picture in MiB")
    max_request_image_pixels: int = _option(256_000_000, "pixels of all pictures of one request together")
    max_request_image_mib: int = _option(64, "size of all encoded pictures of one request together in MiB")
    max_fetched_mib: int = _option(
        1024, "pictures fetched for all requests together and not decoded yet, in MiB; a request beyond is told to come back"
    )
    media_timeout_s: float = _option(20.0, "seconds that fetching all pictures of one request may take together")
    media_workers: int | None = _option(
        None, "pictures decoded at once; default: one per core, 8 at most. One takes up to 0.5 GiB, large ones (one at a time) 2"
    )
    allowed_media_hosts: tuple[str, ...] = _option((), "fetch pictures from these hosts only: a name, or *.name for all below it")
    denied_media_hosts: tuple[str, ...] = _option((), "never fetch pictures from these hosts; written as allowed_media_hosts")
    allow_private_media: bool = _option(
        False,
        "also fetch pictures from private and loopback addresses. Whoever can ask the model then reaches what this machine "
        "reaches: for closed networks only. Link-local and cloud metadata addresses stay refused",
    )
    allowed_local_media_path: str | None = _option(
        None, "folder whose pictures HTTP requests may name by file:// URLs; default: none (paths from Python are always allowed)"
    )

    def __post_init__(self) -> None:
        for name in (
            *("limit_images_per_prompt", "max_image_pixels", "max_image_mib", "max_request_image_pixels"),
            *("max_request_image_mib", "max_fetched_mib", "media_workers"),
        ):
            value = getattr(self, name)
            if not (value is None and name == "media_workers") and (not _is_integer(value) or value < 1):
                raise ConfigError(f"{name} is {value!r}; expected a whole number of 1 or more")
        if self.max_image_pixels > PILLOW_MAX_PIXELS:
            raise ConfigError(f"max_image_pixels is {self.max_image_pixels}; the decoders go up to {PILLOW_MAX_PIXELS}")
        if not _is_number(self.media_timeout_s) or self.media_timeout_s <= 0:
            raise ConfigError(f"media_timeout_s is {self.media_timeout_s!r}; expected a number above 0")
        if not isinstance(self.allow_private_media, bool):
            raise ConfigError(f"allow_private_media is {self.allow_private_media!r}; expected true or false")
        for name in ("allowed_media_hosts", "denied_media_hosts"):
            hosts = getattr(self, name)
            hosts = [hosts] if isinstance(hosts, str) else hosts
            object.__setattr__(self, name, tuple(_read_host(host, name) for host in hosts))
        path = self.allowed_local_media_path
        if path is not None and not Path(path).is_dir():
            raise ConfigError(f"allowed_local_media_path is {path!r}; expected an existing folder")


def _read_host(host: Any, name: str) -> str:
    plain = host.lower().rstrip(".") if isinstance(host, str) else ""
    if not _HOST.fullmatch(plain):
        raise ConfigError(
            f"{name} has {host!r}; expected a host name, *.name or an address without brackets, scheme and port "
            "(names with other letters in their xn-- form)"
        )
    return plain


MAX_STOPS, MAX_LOGPROBS, MAX_INTEGER = 16, 20, 2**31 - 1
MIN_REPETITION_PENALTY = 1e-6  # below it, logits in float32 would not be finite
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
    """How one answer is drawn; None is a field's default. Raises RequestError naming the field that is wrong."""

    max_tokens: int | None = _option(None, "tokens of the answer at most; default: what is left of the context")
    temperature: float = _option(0.0, "0 takes the likeliest token, more gives variety; 2 at most")
    top_p: float = _option(1.0, "draw among the likeliest tokens that have this probability together; 0: the likeliest")
    top_k: int = _option(0, "draw among this many likeliest tokens; 0 and -1: all")
    min_p: float = _option(0.0, "leave out tokens less likely than this share of the likeliest one")
    repetition_penalty: float = _option(1.0, "above 1 makes tokens of prompt and answer less likely")
    presence_penalty: float = _option(0.0, "subtracted once from tokens already in the answer")
    frequency_penalty: float = _option(0.0, "subtracted for each time a token is already in the answer")
    seed: int | None = _option(None, "makes the draws repeatable; -1: as without")
    stop: tuple[str, ...] = _option((), "texts that end the answer; one that is a token, as <|im_end|>, stops at that token too")
    stop_token_ids: tuple[int, ...] = _option((), "token ids that end the answer")
    ignore_eos: bool = _option(False, "go on after the tokens that the checkpoint calls its end")
    min_tokens: int = _option(0, "tokens of the answer at least")
    logit_bias: Mapping[int, float] = field(
        default_factory=dict, metadata={"help": "-100 to 100, added to the logits, by token id"}
    )
    logprobs: int | None = _option(None, "log-probabilities of this many likeliest tokens at each step")
    skip_special_tokens: bool = _option(True, "leave special tokens out of the text")
    include_stop_str_in_output: bool = _option(False, "keep the stop text, or the token that ended the answer, at its end")
    structured: StructuredOutput | None = field(
        default=None, metadata={"help": "what the answer must look like; also as a dictionary"}
    )

    def __new__(cls, *args: Any, **given: Any) -> SamplingParams:
        unknown = sorted(set(given) - set(cls.__dataclass_fields__))
        if unknown:
            names = ", ".join(cls.__dataclass_fields__)
            hint = explain_sampling(unknown[0], cls.__dataclass_fields__)
            raise RequestError(f"unknown sampling parameter {unknown[0]!r}{hint}; parameters: {names}", param=unknown[0])
        return object.__new__(cls)

    def __post_init__(self) -> None:
        for f in fields(self):
            if getattr(self, f.name) is None and f.default is not None:
                object.__setattr__(self, f.name, {} if f.name == "logit_bias" else f.default)
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        object.__setattr__(self, "stop", tuple(self.stop))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        for name in ("ignore_eos", "skip_special_tokens", "include_stop_str_in_output"):
            if not isinstance(getattr(self, name), bool):
                raise RequestError(f"{name} is {getattr(self, name)!r}; expected true or false", param=name)
        self._number("temperature", 0, 2)
        self._number("top_p", 0, 1)
        self._number("min_p", 0, 1)
        self._number("repetition_penalty", MIN_REPETITION_PENALTY, 100)
        self._number("presence_penalty", -2, 2)
        self._number("frequency_penalty", -2, 2)
        self._integer("max_tokens", 1, optional=True)
        self._integer("top_k", -1)
        self._integer("min_tokens", 0)
        self._integer("seed", -(2**63), 2**63 - 1, optional=True)
        self._integer("logprobs", 0, MAX_LOGPROBS, optional=True)
        if self.seed == -1:
            object.__setattr__(self, "seed", None)
        if len(self.stop) > MAX_STOPS or not all(_is_text(s) for s in self.stop):
            raise RequestError(f"stop must hold at most {MAX_STOPS} texts, none of them empty", param="stop")
        if len(self.stop_token_ids) > 256 or not all(_is_integer(i) and 0 <= i <= MAX_INTEGER for i in self.stop_token_ids):
            raise RequestError("stop_token_ids must hold at most 256 token ids of 0 or more", param="stop_token_ids")
        bias = self.logit_bias
        if len(bias) > 1024 or not all(_is_integer(i) and abs(i) <= MAX_INTEGER and _is_number(v) for i, v in bias.items()):
            raise RequestError("logit_bias must hold at most 1024 finite numbers by token id", param="logit_bias")
        for id, value in bias.items():
            if not -100 <= value <= 100:
                raise RequestError(f"logit_bias of token {id} is {value}; expected a number from -100 to 100", param="logit_bias")
        object.__setattr__(self, "logit_bias", {id: float(value) for id, value in bias.items()})
        object.__setattr__(self, "structured", _structured(self.structured))
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(f"min_tokens {self.min_tokens} is more than max_tokens {self.max_tokens}", param="min_tokens")

    def _number(self, name: str, low: float, high: float) -> None:
        value = getattr(self, name)
        if not _is_number(value) or not low <= value <= high:
            raise RequestError(f"{name} is {value!r}; expected a number from {low:g} to {high:g}", param=name)
        object.__setattr__(self, name, float(value))  # numpy's numbers too

    def _integer(self, name: str, low: int, high: int = MAX_INTEGER, *, optional: bool = False) -> None:
        value = getattr(self, name)
        if value is None and optional:
            return
        if not _is_integer(value) or not low <= value <= high:
            wanted = f"of {low} or more" if not _is_integer(value) or value < low else f"from {low} to {high}"
            wanted += ", or none at all" if optional else ""
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


def read_options(values: Mapping[str, Any]) -> tuple[EngineConfig, MediaConfig]:
    """The keywords of `VLPipeline`, each to the configuration that has it; raises ConfigError for one that none has."""
    known = {f.name: config for config in (EngineConfig, MediaConfig) for f in fields(config)}
    unknown = sorted(set(values) - set(known))
    if unknown:
        hint = explain_option(unknown[0], known, [f.name for f in fields(ServerConfig)])
        raise ConfigError(f"unknown option {unknown[0]!r}{hint}; options: {', '.join(sorted(known))}")
    engine, media = ({k: v for k, v in values.items() if known[k] is config} for config in (EngineConfig, MediaConfig))
    return EngineConfig(**engine), MediaConfig(**media)
