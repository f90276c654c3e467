"""Clients that know nothing of vlserve, unchanged: the openai package, LangChain and LiteLLM, over real sockets."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any, Literal

import openai
import pytest
from pydantic import BaseModel

from tests.server.running import RunningServer, data_url
from tests.server.test_api import PICTURE

PARTS: Any = [{"type": "image_url", "image_url": {"url": data_url(PICTURE)}}, {"type": "text", "text": "What shape is it?"}]
MESSAGES: Any = [{"role": "user", "content": PARTS}]
INPUT: Any = [
    {
        "role": "user",
        "content": [
            {"type": "input_image", "image_url": data_url(PICTURE), "detail": "auto"},
            {"type": "input_text", "text": "What shape is it?"},
        ],
    }
]


class Seen(BaseModel):
    """What is to be seen."""

    shape: Literal["circle", "square"]


@pytest.fixture(scope="module")
def answer(client: openai.OpenAI) -> str:
    """What every client must get for `MESSAGES`, with 8 tokens."""
    text = client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=8, temperature=0).choices[0].message.content
    assert text
    return text


@asynccontextmanager
async def asynchronous(server: RunningServer) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=server.base + "/v1", api_key="none", max_retries=0) as client:
        yield client


def test_openai_async(server: RunningServer, answer: str) -> None:
    async def ask() -> None:
        async with asynchronous(server) as client:
            stream = await client.chat.completions.create(
                model="tiny",
                messages=MESSAGES,
                max_tokens=8,
                temperature=0,
                stream=True,
                stream_options={"include_usage": True},
            )
            chunks = [chunk async for chunk in stream]
            assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == answer
            assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 8
            whole, parsed = await asyncio.gather(
                client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=8, temperature=0),
                client.chat.completions.parse(model="tiny", messages=MESSAGES, response_format=Seen, temperature=0),
            )
            assert whole.choices[0].message.content == answer
            assert parsed.choices[0].message.parsed is not None
            assert parsed.choices[0].message.parsed.shape in ("circle", "square")

    asyncio.run(ask())


def test_openai_async_responses_with_a_picture(server: RunningServer, answer: str) -> None:
    async def ask() -> None:
        async with asynchronous(server) as client:
            fields: Any = {"model": "tiny", "input": INPUT, "max_output_tokens": 8, "temperature": 0}
            whole = await client.responses.create(**fields)
            events: list[Any] = [event async for event in await client.responses.create(**fields, stream=True)]
            deltas = "".join(event.delta for event in events if event.type == "response.output_text.delta")
            assert whole.output_text == events[-1].response.output_text == deltas == answer
            async with client.responses.stream(model="tiny", input=INPUT, text_format=Seen, temperature=0) as stream:
                kinds = [event.type async for event in stream]
                assert isinstance((await stream.get_final_response()).output_parsed, Seen)
            assert kinds.count("response.output_text.delta") > 1 and kinds[-1] == "response.completed"
            parsed = await client.responses.parse(model="tiny", input=INPUT, text_format=Seen, temperature=0)
            assert isinstance(parsed.output_parsed, Seen)

    asyncio.run(ask())


def test_openai_stream_helper(client: openai.OpenAI, answer: str) -> None:
    with client.chat.completions.stream(model="tiny", messages=MESSAGES, max_tokens=8, temperature=0) as stream:
        deltas = [event.delta for event in stream if event.type == "content.delta"]
        with pytest.raises(openai.LengthFinishReasonError):  # how the package takes an answer that was cut
            stream.get_final_completion()
    assert "".join(deltas) == answer and len(deltas) > 1
    with client.chat.completions.stream(model="tiny", messages=MESSAGES, response_format=Seen, temperature=0) as parsing:
        final = parsing.get_final_completion().choices[0]
    assert isinstance(final.message.parsed, Seen) and final.finish_reason == "stop"


def test_openai_raw_response_has_the_requests_id(client: openai.OpenAI, answer: str) -> None:
    raw = client.chat.completions.with_raw_response.create(
        model="tiny", messages=MESSAGES, max_tokens=8, temperature=0, extra_headers={"X-Request-Id": "mine-7"}
    )
    assert raw.headers["x-request-id"] == "mine-7" and raw.headers["content-type"] == "application/json"
    parsed = raw.parse()
    assert parsed.choices[0].message.content == answer and parsed._request_id == "mine-7"
    with client.chat.completions.with_streaming_response.create(
        model="tiny", messages=MESSAGES, max_tokens=2, stream=True
    ) as streamed:
        assert streamed.headers["x-request-id"].startswith("req-")
        assert len(list(streamed.parse())) > 1
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="tiny", messages=MESSAGES, temperature=-1)
    assert caught.value.param == "temperature" and caught.value.code == "invalid_request"
    assert (caught.value.request_id or "").startswith("req-")


class Langchain:
    """`ChatOpenAI` for a server, and its messages."""

    def __init__(self, server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("LANGSMITH_TRACING", "LANGCHAIN_TRACING_V2"):
            monkeypatch.setenv(name, "false")
        from langchain_core.messages import HumanMessage
        from langchain_openai import ChatOpenAI

        self.asked = [HumanMessage(content=PARTS)]
        self._make: Callable[..., Any] = ChatOpenAI
        self._fields: dict[str, Any] = {"base_url": server.base + "/v1", "api_key": "none", "model": "tiny", "max_retries": 0}

    def __call__(self, **fields: Any) -> Any:
        return self._make(**self._fields, temperature=0, **fields)


@pytest.fixture
def langchain(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> Langchain:
    return Langchain(server, monkeypatch)


def test_langchain(langchain: Langchain, answer: str) -> None:
    whole = langchain(max_tokens=8).invoke(langchain.asked)
    assert whole.content == answer and whole.response_metadata["finish_reason"] == "length"
    assert whole.usage_metadata["output_tokens"] == 8
    chunks = list(langchain(max_tokens=8, stream_usage=True).stream(langchain.asked))
    assert "".join(chunk.content for chunk in chunks) == answer and len(chunks) > 2
    assert [chunk.usage_metadata["output_tokens"] for chunk in chunks if chunk.usage_metadata] == [8]
    responses = langchain(max_tokens=8, use_responses_api=True).invoke(langchain.asked)
    assert responses.text == answer


def test_langchain_async(langchain: Langchain, answer: str) -> None:
    async def ask() -> str:
        async with openai.DefaultAsyncHttpxClient() as own:  # its default one is never closed
            model = langchain(max_tokens=8, http_async_client=own)
            return "".join([chunk.content async for chunk in model.astream(langchain.asked)])

    assert asyncio.run(ask()) == answer


def test_langchain_tools(langchain: Langchain) -> None:
    from langchain_core.tools import tool

    @tool
    def look(at: Literal["Paris", "Rome"]) -> str:
        """Look at a city."""
        return f"It is {at}."

    bound = langchain(max_tokens=120).bind_tools([look], tool_choice="required", parallel_tool_calls=False)
    called = bound.invoke(langchain.asked)
    assert {call["name"] for call in called.tool_calls} == {"look"} and not called.invalid_tool_calls
    assert called.response_metadata["finish_reason"] == "tool_calls"
    streamed = None
    for chunk in bound.stream(langchain.asked):
        streamed = chunk if streamed is None else streamed + chunk
    assert [call["args"] for call in streamed.tool_calls] == [call["args"] for call in called.tool_calls]
    results = [look.invoke(call) for call in called.tool_calls]
    after = langchain(max_tokens=4).bind_tools([look]).invoke([*langchain.asked, called, *results])
    assert after.usage_metadata["input_tokens"] > called.usage_metadata["input_tokens"], "calls and results were read"


@pytest.mark.parametrize("method", ("json_schema", "function_calling"))
def test_langchain_structured_output(langchain: Langchain, method: str) -> None:
    assert isinstance(langchain().with_structured_output(Seen, method=method).invoke(langchain.asked), Seen)


class Litellm:
    """`litellm.completion` for a server; it asks nobody else."""

    def __init__(self, server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
        import litellm

        monkeypatch.setattr(litellm, "telemetry", False)
        self._module = litellm
        self._fields: dict[str, Any] = {
            "model": "openai/tiny",
            "api_base": server.base + "/v1",
            "api_key": "none",
            "messages": MESSAGES,
            "temperature": 0,
            "max_retries": 0,
        }

    def __call__(self, **fields: Any) -> Any:
        return self._module.completion(**self._fields, **fields)

    async def ask_async(self, **fields: Any) -> Any:
        return await self._module.acompletion(**self._fields, **fields)

    async def close(self) -> None:
        await self._module.close_litellm_async_clients()


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    """LiteLLM takes the thread's event loop in calls that are not async too, and closes none that it made."""
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    yield loop
    loop.run_until_complete(loop.shutdown_asyncgens())
    loop.close()
    asyncio.set_event_loop(None)


@pytest.fixture
def litellm(server: RunningServer, monkeypatch: pytest.MonkeyPatch, loop: asyncio.AbstractEventLoop) -> Iterator[Litellm]:
    client = Litellm(server, monkeypatch)
    yield client
    loop.run_until_complete(client.close())


def test_litellm(litellm: Litellm, loop: asyncio.AbstractEventLoop, answer: str) -> None:
    whole = litellm(max_tokens=8)
    assert whole.choices[0].message.content == answer and whole.usage.completion_tokens == 8
    chunks = list(litellm(max_tokens=8, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == answer
    assert [chunk.usage.completion_tokens for chunk in chunks if getattr(chunk, "usage", None)] == [8]
    assert loop.run_until_complete(litellm.ask_async(max_tokens=8)).choices[0].message.content == answer


def test_litellm_tools_and_schemas(litellm: Litellm) -> None:
    schema = {"type": "object", "properties": {"at": {"enum": ["Paris", "Rome"]}}, "required": ["at"]}
    function = {"name": "look", "parameters": schema | {"additionalProperties": False}}
    tools = [{"type": "function", "function": function}]
    called = litellm(tools=tools, tool_choice="required", parallel_tool_calls=False, max_tokens=120)
    calls = called.choices[0].message.tool_calls
    assert {call.function.name for call in calls} == {"look"}
    assert json.loads(calls[0].function.arguments)["at"] in ("Paris", "Rome")
    Seen.model_validate_json(litellm(response_format=Seen).choices[0].message.content)


def test_litellm_knows_our_errors(litellm: Litellm) -> None:
    import litellm as module

    with pytest.raises(module.BadRequestError, match="max_model_len 512"):
        litellm(max_tokens=100_000)
