"""`VLPipeline` over the network gives what a local one gives, errors included."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.server.running import RunningServer, running, tiny
from tests.vision.test_preprocess import encoded, noise
from vlserve import Completion, ConfigError, EngineError, RequestError, SamplingParams, VLPipeline
from vlserve.pipeline.remote import RemotePipeline

KEY = "remote-key-1"
PICTURE = Image.fromarray(noise(60, 30))
JPEG = encoded(Image.fromarray(noise(90, 70)), "JPEG")
URL = "data:image/jpeg;base64," + base64.b64encode(JPEG).decode()
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}


@pytest.fixture(scope="module")
def server(checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text(KEY)
    with running(*tiny(checkpoint("qwen2")), "--api-key-file", str(keys), "--no-prefix-caching") as server:
        yield server


@pytest.fixture(scope="module")
def remote(server: RunningServer) -> Iterator[VLPipeline]:
    with VLPipeline(server.base + "/v1", api_key=KEY) as pipe:
        yield pipe


@pytest.fixture(scope="module")
def local(checkpoint: Callable[..., Path]) -> Iterator[VLPipeline]:
    with VLPipeline(str(checkpoint("qwen2")), dtype="float32", kv_cache_gib=0.05, prefix_caching=False) as pipe:
        yield pipe


def same(a: Completion, b: Completion) -> None:
    assert (a.text, a.token_ids, a.finish_reason, a.usage) == (b.text, b.token_ids, b.finish_reason, b.usage)
    assert (a.logprobs is None) == (b.logprobs is None)
    for x, y in zip(a.logprobs or (), b.logprobs or (), strict=True):
        assert x.token_id == y.token_id and x.logprob == pytest.approx(y.logprob, abs=1e-4)
        assert [id for id, _ in x.top] == [id for id, _ in y.top]


def test_it_is_the_same_class(remote: VLPipeline) -> None:
    assert isinstance(remote, VLPipeline) and isinstance(remote, RemotePipeline)


PROMPTS: list[Any] = [
    "What shape is it?",
    ("What?", PICTURE),
    ("What?", [JPEG, noise(40, 50)]),
    ("What?", URL),
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "<|im_end|> hi"}],
    [{"role": "user", "content": [{"type": "image", "image": PICTURE}, {"type": "text", "text": "x"}]}],
    [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": URL, "max_dynamic_patch": 1}}]}],
]
FIELDS: list[dict[str, Any]] = [
    {"max_tokens": 6},
    {"max_tokens": 8, "temperature": 1.0, "seed": 5, "top_p": 0.9, "top_k": 40, "min_p": 0.01},
    {"max_tokens": 5, "logprobs": 3},
    {"max_tokens": 6, "repetition_penalty": 1.3, "logit_bias": {5: 2.0}, "presence_penalty": 0.5, "ignore_eos": True},
    {"max_tokens": 30, "temperature": 1.0, "seed": 1, "structured": {"choice": ["yes", "no"]}},
]


@pytest.mark.parametrize("fields", FIELDS, ids=range(len(FIELDS)))
def test_same_calls_same_results(remote: VLPipeline, local: VLPipeline, fields: dict[str, Any]) -> None:
    for prompt in PROMPTS:
        same(remote(prompt, **fields), local(prompt, **fields))


def test_lists_streams_and_asyncio(remote: VLPipeline, local: VLPipeline, tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    PICTURE.save(path)
    prompts = [("a", str(path)), "b", ("c", path)]
    for a, b in zip(remote(prompts, max_tokens=4), local(prompts, max_tokens=4), strict=True):
        same(a, b)
    pieces = list(remote.stream(prompts[0], max_tokens=4))
    assert "".join(piece.text for piece in pieces) == local(prompts[0], max_tokens=4).text
    assert pieces[-1].finish_reason and pieces[-1].timing is not None and pieces[-1].timing.total_s > 0
    same(asyncio.run(remote.agenerate("x", max_tokens=3)), local("x", max_tokens=3))
    for _ in remote.stream("x", max_tokens=400, ignore_eos=True):
        break  # leaving early is fine
    same(remote("x", sampling=SamplingParams(max_tokens=3)), local("x", max_tokens=3))


BAD: list[tuple[Any, dict[str, Any]]] = [
    ("x", {"max_tokens": 100_000}),
    (("x", b"no picture"), {}),
    (("x", "data:image/png;base64,AAAA"), {}),
    ([{"role": "robot", "content": "x"}], {}),
    ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": URL, "max_dynamic_patch": 0}}]}], {}),
    ("x" * 100_000, {}),
    ("x", {"logit_bias": {10**6: 1.0}}),
    ("x", {"structured": {"regex": "("}}),
    ([{"role": "user", "content": "x"}, {"role": "assistant", "content": None, "tool_calls": [CALL]}], {}),
]


@pytest.mark.parametrize("prompt,fields", BAD, ids=range(len(BAD)))
def test_same_mistakes_same_errors(remote: VLPipeline, local: VLPipeline, prompt: Any, fields: dict[str, Any]) -> None:
    with pytest.raises(RequestError) as here:
        local(prompt, **fields)
    with pytest.raises(RequestError) as there:
        remote(prompt, **fields)
    assert (str(there.value), there.value.param, there.value.code) == (str(here.value), here.value.param, here.value.code)


def test_what_goes_wrong_on_the_way_is_named(server: RunningServer, remote: VLPipeline) -> None:
    with pytest.raises(EngineError, match="no vlserve server answers at http://127.0.0.1:9"):
        VLPipeline("http://127.0.0.1:9")
    with pytest.raises(ConfigError, match="dtype is the server's option"):
        VLPipeline(server.base, dtype="float32")
    with VLPipeline(server.base, api_key="wrong-key-123") as pipe, pytest.raises(ConfigError, match="api_key"):
        pipe("x", max_tokens=1)
    with (
        VLPipeline(server.base, api_key=KEY, model_name="other") as pipe,
        pytest.raises(RequestError, match="'other' is not served") as caught,
    ):
        pipe("x", max_tokens=1)
    assert caught.value.code == "model_not_found"
    with pytest.raises(EngineError, match="closed"):
        pipe("x")
    with pytest.raises(AttributeError, match="only a local one"):
        remote.client  # noqa: B018


def test_a_server_that_dies_ends_the_answer(checkpoint: Callable[..., Path]) -> None:
    with running(*tiny(checkpoint("qwen2"))) as server:
        pipe = VLPipeline(server.base)
        pieces = pipe.stream("x", max_tokens=480, ignore_eos=True)
        next(pieces)
        server.kill()
        with pytest.raises(EngineError):
            list(pieces)
        pipe.close()
