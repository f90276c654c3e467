"""`VLPipeline` from Python: every kind of prompt, order, streaming, and the places people run it from."""

from __future__ import annotations

import asyncio
import base64
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image

import vlserve
from tests.settling import wait_until
from tests.vision.test_preprocess import encoded, noise
from vlserve import Completion, ConfigError, EngineError, ModelError, RequestError, SamplingParams, VLPipeline
from vlserve.config import ServerConfig
from vlserve.models.tiles import TilePreprocessor
from vlserve.prompt.chat_messages import read_prompt
from vlserve.prompt.conversation import PromptOptions

PICTURE = Image.fromarray(noise(60, 30))
OPTIONS: dict[str, Any] = {"dtype": "float32", "kv_cache_gib": 0.05}


@pytest.fixture(scope="module")
def pipe(checkpoint: Callable[..., Path]) -> Iterator[VLPipeline]:
    with VLPipeline(str(checkpoint("qwen2")), **OPTIONS) as pipe:
        yield pipe


def test_all_forms_of_a_prompt_mean_the_same(pipe: VLPipeline, tmp_path: Path) -> None:
    png = encoded(PICTURE, "PNG")
    path = tmp_path / "picture.png"
    path.write_bytes(png)
    url = "data:image/png;base64," + base64.b64encode(png).decode()
    text = {"type": "text", "text": "What?"}

    def message(part: dict[str, Any]) -> list[dict[str, Any]]:
        return [{"role": "user", "content": [part, text]}]

    prompts: list[Any] = [
        *[("What?", source) for source in (PICTURE, png, str(path), path, url, np.asarray(PICTURE), [PICTURE])],
        *[message({"type": "image", "image": source}) for source in (PICTURE, str(path), png, np.asarray(PICTURE))],
        message({"type": "image_url", "image_url": {"url": url}}),
        message({"type": "image_url", "image_url": url}),
    ]
    answers = pipe(prompts, max_tokens=6)
    assert len({a.token_ids for a in answers}) == 1 and len({a.usage.prompt_tokens for a in answers}) == 1
    assert answers[0].usage.image_tokens > 0
    single = pipe(prompts[0], max_tokens=6)
    assert isinstance(single, Completion) and single.token_ids == answers[0].token_ids
    assert single.usage.cached_tokens > 0


def test_one_conversation_gives_one_answer_and_a_list_gives_a_list(pipe: VLPipeline) -> None:
    conversation = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    one = pipe(conversation, max_tokens=3)
    many = pipe([conversation, "text", conversation], max_tokens=3, progress=True)
    assert isinstance(one, Completion) and [type(m) for m in many] == [Completion] * 3
    assert many[0].token_ids == many[2].token_ids == one.token_ids
    assert pipe([], max_tokens=3) == []


def test_answers_come_in_the_order_asked(pipe: VLPipeline) -> None:
    prompts = [f"Question {'x ' * i}" for i in range(24)]
    answers = pipe(prompts, max_tokens=4)
    assert [a.usage.prompt_tokens for a in answers] == [pipe(p, max_tokens=1).usage.prompt_tokens for p in prompts]


def test_the_fields_of_an_answer(pipe: VLPipeline) -> None:
    answer = pipe(("What?", PICTURE), sampling=SamplingParams(max_tokens=5, logprobs=2))
    assert answer.finish_reason in ("stop", "length") and answer.usage.completion_tokens == len(answer.token_ids) <= 5
    assert answer.logprobs is not None and [entry.token_id for entry in answer.logprobs] == list(answer.token_ids)
    timing = answer.timing
    assert 0 <= timing.queue_s <= timing.ttft_s <= timing.total_s and timing.encode_s >= 0


def test_the_ending_token_is_in_the_ids_and_not_in_the_text(pipe: VLPipeline) -> None:
    end = pipe.tokenizer.token_id("<|im_end|>")
    answer = pipe("hi", max_tokens=5, logit_bias={end: 100.0}, skip_special_tokens=False)
    assert answer.token_ids == (end,) and answer.text == "" and answer.finish_reason == "stop"


@pytest.mark.parametrize("included", [False, True])
def test_a_stop_text_that_is_a_special_token_ends_the_answer(pipe: VLPipeline, included: bool) -> None:
    """It is no end of the checkpoint's, and is left out of texts."""
    token = pipe.tokenizer.token_id("<|im_start|>")
    options: dict[str, Any] = {"max_tokens": 6, "logit_bias": {token: 100.0}, "include_stop_str_in_output": included}
    answer = pipe("hi", stop=["<|im_start|>"], ignore_eos=True, **options)
    assert answer.token_ids == (token,) and answer.finish_reason == "stop"
    assert answer.text == ("<|im_start|>" if included else "")
    later = pipe("hi", stop=["<|im_start|>"], min_tokens=3, **options)
    assert len(later.token_ids) == 4 and later.token_ids.index(token) == 3 and later.finish_reason == "stop"
    assert pipe("hi", **options).finish_reason == "length"


def test_streamed_equals_whole(pipe: VLPipeline) -> None:
    for prompt in ("hi", ("What?", PICTURE)):
        deltas = list(pipe.stream(prompt, max_tokens=30, temperature=1.0, seed=4))
        whole = pipe(prompt, max_tokens=30, temperature=1.0, seed=4)
        assert "".join(d.text for d in deltas) == whole.text
        assert tuple(i for d in deltas for i in d.token_ids) == whole.token_ids
        assert [d.finish_reason for d in deltas[:-1]] == [None] * (len(deltas) - 1) and deltas[-1].finish_reason


def test_leaving_a_stream_early_ends_the_request(pipe: VLPipeline) -> None:
    for _ in range(3):
        for _delta in pipe.stream("hi", max_tokens=400, ignore_eos=True):
            break
    answer = pipe("hi", max_tokens=2)
    assert answer.finish_reason in ("stop", "length")


def test_asyncio_and_sync_work_inside_a_running_loop(pipe: VLPipeline) -> None:
    async def main() -> None:
        want = pipe("hi", max_tokens=4)  # synchronous, inside a running loop
        answers = await asyncio.gather(*(pipe.agenerate("hi", max_tokens=4) for _ in range(5)))
        assert all(a.token_ids == want.token_ids for a in answers)
        text = "".join([d.text async for d in pipe.astream("hi", max_tokens=4)])
        assert text == want.text
        task = asyncio.ensure_future(pipe.agenerate("hi", max_tokens=400, ignore_eos=True))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())


BAD: list[tuple[Any, dict[str, Any], str, str]] = [
    ("x", {"max_tokens": -1}, "max_tokens", "-1"),
    ("x", {"max_tokens": 10**6}, "max_tokens", "max_model_len 512"),
    ("x", {"temperature": float("nan")}, "temperature", "nan"),
    ("x", {"temperatur": 1}, "temperatur", "unknown sampling parameter"),
    ("word " * 800, {}, "messages", "no room"),
    ({"role": "user"}, {}, "prompt", "a prompt is"),
    (("x", "/no/such/file.png"), {}, "images[0]", "cannot read"),
    (("x", [PICTURE] * 100), {}, "messages", "limit is 64"),
    (("x", b"junk"), {}, "images[0]", "cannot be decoded"),
    ([{"role": "user", "content": []}], {}, "messages[0].content", "text or a list"),
    ("x", {"stop_token_ids": [10**6]}, "stop_token_ids", "vocabulary"),
    ("\ud83d", {}, "prompt", "half a character"),
    ("x", {"ignore_eos": 1}, "ignore_eos", "true or false"),
    ("x", {"max_tokens": True}, "max_tokens", "True"),
    ("x", {"temperature": True}, "temperature", "True"),
    ("x", {"logit_bias": {5: True}}, "logit_bias", "finite numbers"),
    ("x", {"logit_bias": {5: 1e39}}, "logit_bias", "from -100 to 100"),
    ("x", {"repetition_penalty": 1e-300}, "repetition_penalty", "from 1e-06 to 100"),
    ("x", {"repetition_penalty": 0}, "repetition_penalty", "is 0; expected a number from 1e-06 to 100"),
    ("x", {"stop": ["\ud83d"]}, "stop", "texts"),
    ("x", {"seed": 2**70}, "seed", "whole number"),
]


@pytest.mark.parametrize("prompt,fields,param,message", BAD, ids=[str(n) for n in range(len(BAD))])
def test_bad_requests_name_their_field(pipe: VLPipeline, prompt: Any, fields: dict[str, Any], param: str, message: str) -> None:
    with pytest.raises(RequestError, match=message.replace("[", r"\[")) as caught:
        pipe(prompt, **fields)
    assert caught.value.param == param
    assert pipe("next", max_tokens=1).token_ids


def test_numpy_numbers_and_tiny_temperatures_are_taken(pipe: VLPipeline) -> None:
    greedy = pipe("hi", max_tokens=4).token_ids
    assert pipe("hi", max_tokens=4, temperature=1e-40).token_ids == greedy
    assert pipe("hi", max_tokens=4, temperature=np.float64(0.5), seed=1).token_ids
    with pytest.raises(RequestError, match="not both"):
        pipe("hi", sampling=SamplingParams(), seed=1)


def test_wrong_options_and_models() -> None:
    with pytest.raises(ConfigError, match="unknown option 'max_len'"):
        VLPipeline(max_len=5)
    with pytest.raises(ConfigError, match="dtype is 'float8'"):
        VLPipeline(dtype="float8")
    with pytest.raises(ModelError, match="no such folder"):
        VLPipeline("./nowhere")
    with pytest.raises(ModelError, match="Hub did not give it"):
        VLPipeline("no-such-org/no-such-model")


def test_a_closed_pipeline_says_so_and_two_live_side_by_side(checkpoint: Callable[..., Path]) -> None:
    first, second = (VLPipeline(str(checkpoint(kind)), **OPTIONS) for kind in ("qwen2", "llama"))
    assert first("hi", max_tokens=3).token_ids and second("hi", max_tokens=3).token_ids
    first.close()
    first.close()
    for fields in ({}, {"structured": {"regex": "[0-9]"}}):
        with pytest.raises(EngineError, match="closed"):
            first("hi", **fields)
    assert second("hi", max_tokens=3).token_ids
    second.close()


def test_a_rank_that_is_killed_fails_every_request_at_once(checkpoint: Callable[..., Path]) -> None:
    with VLPipeline(str(checkpoint("qwen2")), **OPTIONS) as pipe:
        children = psutil.Process().children()
        rank = max((p for p in children if "vlserve.rank" in " ".join(p.cmdline())), key=lambda p: p.create_time())
        rank.kill()
        for _ in range(3):  # also before the death is noticed
            with pytest.raises(EngineError, match="killed by signal 9"):
                pipe("hi", max_tokens=400, ignore_eos=True)


def test_a_folder_that_sockets_cannot_live_in_is_an_error_and_no_hang(
    checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = tmp_path / ("x" * 110)
    deep.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(deep))
    with pytest.raises(ConfigError, match="too long a name for sockets; set TMPDIR to a shorter one"):
        VLPipeline(str(checkpoint("qwen2")), **OPTIONS)
    assert list(deep.iterdir()) == []


def test_closing_while_a_request_is_prepared_ends_the_request(
    checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = VLPipeline(str(checkpoint("qwen2")), **OPTIONS)
    begun = threading.Event()

    async def never(*_: Any, **__: Any) -> Any:
        begun.set()
        await asyncio.sleep(3600)

    monkeypatch.setattr("vlserve.media.loader.PictureLoader.load", never)
    for ask in (lambda: pipe(("x", PICTURE)), lambda: list(pipe.stream(("x", PICTURE)))):
        begun.clear()
        failures: list[BaseException] = []

        def run(ask: Callable[[], Any] = ask, failures: list[BaseException] = failures) -> None:
            try:
                ask()
            except BaseException as error:  # noqa: BLE001  (looked at below)
                failures.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        if not begun.wait(2):
            thread.join(10)
        pipe.close()
        thread.join(10)
        assert not thread.is_alive() and isinstance(failures[0], EngineError), failures


def test_one_lazy_picture_in_many_prompts(pipe: VLPipeline, tmp_path: Path) -> None:
    path = tmp_path / "big.png"
    path.write_bytes(encoded(Image.fromarray(noise(700, 500)), "PNG"))
    for _ in range(5):
        with Image.open(path) as lazy:
            answers = pipe([("x", lazy) for _ in range(8)], max_tokens=2)
        assert len({a.token_ids for a in answers}) == 1


@pytest.mark.parametrize("salt", ("\ud800", 5), ids=("cannot be encoded", "of a wrong type"))
def test_a_request_that_no_rank_can_read_ends_alone(salt: Any, pipe: VLPipeline) -> None:
    async def answer() -> None:
        prompt = await pipe.prepare(read_prompt("What?"))
        async for _ in pipe.answer(replace(prompt, cache_salt=salt), SamplingParams(max_tokens=2)):
            pass

    with pytest.raises((UnicodeEncodeError, EngineError), match=r"surrogates|Expected `str`, got `int`"):
        asyncio.run(answer())
    assert not pipe.client._streams
    assert len(pipe("What?", max_tokens=3, ignore_eos=True).token_ids) == 3
    wait_until(lambda: not pipe.client._is_owed, "nobody waits for an answer that will not come")


def test_tiles_of_a_picture_can_be_fewer_or_more(pipe: VLPipeline) -> None:
    turns = read_prompt(("What?", Image.fromarray(noise(600, 400))))
    assert isinstance(pipe.checkpoint.preprocessor, TilePreprocessor)
    limit = pipe.checkpoint.preprocessor.image.max_patches

    def tiles(max_tiles: int | None) -> int:
        options = PromptOptions(mm_processor_kwargs={} if max_tiles is None else {"max_dynamic_patch": max_tiles})
        [span] = asyncio.run(pipe.prepare(turns, options)).spans
        return len(span.pixels.units)

    assert tiles(None) == tiles(limit) == 6 + 1 and tiles(4 * limit) == 4 * 6 + 1
    assert (tiles(1), tiles(2), tiles(3)) == (1, 3, 3)


def test_pictures_that_cannot_fit_the_context_are_named(pipe: VLPipeline) -> None:
    with pytest.raises(RequestError, match="take 560 tokens or more, and max_model_len is 512") as caught:
        pipe(("x", [noise(600, 400)] * 20))
    assert caught.value.code == "context_length_exceeded"


def test_before_it_is_ready_a_pipeline_says_so_and_media_options_are_its_own(checkpoint: Callable[..., Path]) -> None:
    limits = {"limit_images_per_prompt": 1, "max_image_pixels": 1800}
    with VLPipeline(str(checkpoint("qwen2")), wait=False, **limits, **OPTIONS) as pipe:
        with pytest.raises(EngineError, match="still loading"):
            pipe("hi")
        pipe.wait_ready()
        assert pipe(("x", PICTURE), max_tokens=1).token_ids
        with pytest.raises(RequestError, match="the limit is 1"):
            pipe(("x", [PICTURE, PICTURE]))
        with pytest.raises(RequestError, match="61x30 pixels, the limit is 1800"):
            pipe(("x", noise(61, 30)))


def test_the_router_leaves_the_including_apps_errors_alone(pipe: VLPipeline) -> None:
    from fastapi import Depends, FastAPI, HTTPException
    from fastapi.testclient import TestClient

    def locked() -> None:
        raise HTTPException(401, "locked")

    app = FastAPI()
    app.include_router(vlserve.router(pipe), dependencies=[Depends(locked)])
    app.include_router(vlserve.router(pipe, ServerConfig(served_model_name="open")), prefix="/open")
    with TestClient(app) as client:
        assert client.get("/v1/models").status_code == 401
        body = {"model": "open", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
        assert client.post("/open/v1/chat/completions", json=body).json()["usage"]["completion_tokens"] <= 2
        assert client.post("/open/v1/chat/completions", json={}).json()["error"]["param"] == "messages"


SCRIPT = """
from vlserve import VLPipeline
pipe = VLPipeline({model!r}, dtype="float32", kv_cache_gib=0.05)
print("answer", pipe("hi", max_tokens=3).token_ids)
"""


def test_a_script_without_a_main_guard(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(model=str(checkpoint("qwen2"))))
    for command in ([sys.executable, str(script)], [sys.executable, "-c", f"exec(open({str(script)!r}).read())"]):
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
        assert done.returncode == 0 and done.stdout.startswith("answer ("), done.stderr
        assert done.stderr == ""
