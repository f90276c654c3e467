"""Kept responses: conversations that go on, background answers, bounds, and that nobody reads another's."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from openai.types.responses import Response

from tests.server.running import RunningServer, data_url, running, tiny
from tests.server.test_api import PICTURE
from tests.settling import is_alive, wait_until
from vlserve.config import ServerConfig
from vlserve.errors import ConfigError, RequestError
from vlserve.server.responses_input import kept_item, shortened
from vlserve.server.responses_store import ResponseStore

ONE, OTHER = "key-of-one-client", "key-of-the-other"
LONG: dict[str, Any] = {"model": "tiny", "input": "hi", "background": True, "extra_body": {"ignore_eos": True}}


@pytest.fixture(scope="module")
def server(checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text(f"{ONE}\n{OTHER}\n")
    options = ("--threads", "1", "--store-responses", "--api-key-file", str(keys), "--drain-seconds", "0")
    with running(*tiny(checkpoint("qwen2")), *options) as server:
        server.wait_ready()
        yield server


def client_of(server: RunningServer, key: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.base + "/v1", api_key=key, max_retries=0)


@pytest.fixture(scope="module")
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    with client_of(server, ONE) as client:
        yield client


def raw(server: RunningServer, path: str, key: str = ONE, method: str = "GET") -> httpx2.Response:
    return httpx2.request(method, server.base + "/v1/responses" + path, headers={"Authorization": f"Bearer {key}"}, timeout=60)


def test_a_conversation_goes_on_as_if_it_was_sent_whole(server: RunningServer, client: openai.OpenAI) -> None:
    picture = {"type": "input_image", "image_url": data_url(PICTURE), "detail": "auto"}
    asked: Any = [{"role": "user", "content": [picture, {"type": "input_text", "text": "What is it?"}]}]
    fields: dict[str, Any] = {"model": "tiny", "max_output_tokens": 5}
    first = client.responses.create(input=asked, instructions="Be brief.", **fields)
    second = client.responses.create(input="And now?", previous_response_id=first.id, **fields)
    streamed = list(client.responses.create(input="And now?", previous_response_id=first.id, stream=True, **fields))[-1]
    said: Any = [item.model_dump(exclude_none=True) for item in first.output]
    whole = client.responses.create(input=[*asked, *said, {"role": "user", "content": "And now?"}], store=False, **fields)
    assert second.output_text == whole.output_text == streamed.response.output_text  # type: ignore[union-attr]
    assert second.usage and whole.usage and second.usage.input_tokens == whole.usage.input_tokens, "instructions stay behind"
    assert second.previous_response_id == first.id and (second.store, whole.store) == (True, False)  # type: ignore[attr-defined]
    third = client.responses.create(input="More", previous_response_id=second.id, **fields)
    assert [item.type for item in client.responses.input_items.list(third.id)] == ["message"] * 5
    referred: Any = [{"type": "item_reference", "id": first.output[0].id}, {"role": "user", "content": "x"}]
    given: Any = [*said, {"role": "user", "content": "x"}]
    usages = [client.responses.create(input=items, **fields).usage for items in (referred, given)]
    assert usages[0] and usages[1] and usages[0].input_tokens == usages[1].input_tokens


def test_a_kept_response_is_read_listed_and_deleted(server: RunningServer, client: openai.OpenAI) -> None:
    made = client.responses.create(model="tiny", input="hi", max_output_tokens=3, metadata={"a": "b"})
    again = client.responses.retrieve(made.id)
    assert again.model_dump() == made.model_dump()
    Response.model_validate_json(raw(server, f"/{made.id}").text, strict=True)
    items: Any = [{"role": "user", "content": f"{i}"} for i in range(5)]
    many = client.responses.create(model="tiny", input=items, max_output_tokens=1)
    page = client.responses.input_items.list(many.id, limit=2)
    assert [item.content[0].text for item in page.data] == ["4", "3"] and page.has_more  # type: ignore[union-attr]
    assert [item.content[0].text for item in page] == ["4", "3", "2", "1", "0"]  # type: ignore[union-attr]
    oldest = client.responses.input_items.list(many.id, order="asc", after=page.data[0].id)
    assert oldest.data == [] and not oldest.has_more
    for wrong in ("limit=0", "limit=101", "order=up", "after=msg_x", "limit=x"):
        assert raw(server, f"/{many.id}/input_items?{wrong}").json()["error"]["param"] == wrong.partition("=")[0]
    with pytest.raises(openai.BadRequestError, match="background"):
        client.responses.cancel(made.id)
    client.responses.delete(made.id)
    for call in (client.responses.retrieve, client.responses.delete, client.responses.cancel):
        with pytest.raises(openai.NotFoundError, match="no response"):
            call(made.id)
    unkept = client.responses.create(model="tiny", input="hi", max_output_tokens=1, store=False)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(unkept.id)
    with pytest.raises(openai.BadRequestError, match="store: true"):
        client.responses.create(model="tiny", input="hi", background=True, store=False)


def test_another_key_sees_nothing_of_it(server: RunningServer, client: openai.OpenAI) -> None:
    made = client.responses.create(model="tiny", input="a secret", max_output_tokens=1)
    running = client.responses.create(**LONG)
    reference: Any = [{"type": "item_reference", "id": made.output[0].id}]
    with client_of(server, OTHER) as other:
        theirs = other.responses
        for id in (made.id, running.id):
            for call in (theirs.retrieve, theirs.delete, theirs.cancel, theirs.input_items.list):
                with pytest.raises(openai.NotFoundError):
                    call(id)
            with pytest.raises(openai.NotFoundError):
                other.responses.create(model="tiny", input="go on", previous_response_id=id)
        with pytest.raises(openai.BadRequestError, match="no item"):
            other.responses.create(model="tiny", input=reference)
    assert client.responses.retrieve(made.id).id == made.id
    assert client.responses.cancel(running.id).status == "cancelled", "nobody else ended it"
    assert raw(server, f"/{made.id}", key="no-key-at-all").status_code == 401


def test_effort_is_taken_where_the_model_has_no_dial_for_it(server: RunningServer, client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {"model": "tiny", "input": "hi", "max_output_tokens": 4}
    plain = client.responses.create(**fields)
    for _ in range(2):
        asked = client.responses.create(reasoning={"effort": "low", "summary": "auto"}, **fields)
        assert asked.output_text == plain.output_text
        assert asked.reasoning and asked.reasoning.effort is None, "as it was, not as it was asked for"
    assert len([line for line in server.lines if "reasoning_effort makes no difference" in line]) == 1


def test_a_background_answer_is_polled(client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {"model": "tiny", "input": "hi", "max_output_tokens": 6}
    begun = client.responses.create(background=True, **fields)
    assert begun.status == "queued" and begun.output == [] and begun.background is True and begun.usage is None
    wait_until(lambda: client.responses.retrieve(begun.id).status == "incomplete")
    assert client.responses.retrieve(begun.id).output_text == client.responses.create(**fields).output_text
    refused = {"input": "hi", "background": True, "top_p": 7.0}
    with pytest.raises(openai.BadRequestError, match="top_p"):
        client.responses.create(model="tiny", **refused)  # type: ignore[call-overload]


def test_a_background_answer_survives_its_clients_leaving(server: RunningServer, client: openai.OpenAI) -> None:
    seen = []
    body = {"input": "hi", "background": True, "stream": True, "ignore_eos": True, "max_output_tokens": 200}
    with httpx2.stream("POST", server.base + "/v1/responses", json=body, headers={"Authorization": f"Bearer {ONE}"}) as response:
        for line in response.iter_lines():
            if line.startswith("data: "):
                seen.append(json.loads(line.removeprefix("data: ")))
            if len(seen) == 6:
                break
    id = seen[0]["response"]["id"]
    events = list(client.responses.retrieve(id, stream=True, starting_after=seen[-1]["sequence_number"]))
    numbers = [event["sequence_number"] for event in seen] + [event.sequence_number for event in events]
    assert numbers == list(range(len(numbers)))
    final: Any = events[-1]
    assert final.type == "response.incomplete" and final.response.usage.output_tokens == 200
    assert final.response.model_dump() == client.responses.retrieve(id).model_dump()
    assert len(list(client.responses.retrieve(id, stream=True))) == len(numbers)
    plain = client.responses.create(model="tiny", input="hi", max_output_tokens=1)
    with pytest.raises(openai.BadRequestError, match="stream: true"):
        list(client.responses.retrieve(plain.id, stream=True))


def metric(server: RunningServer, name: str) -> float:
    text = httpx2.get(server.base + "/metrics", headers={"Authorization": f"Bearer {ONE}"}, timeout=60).text
    return sum(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith(name))


def test_cancelling_takes_the_request_out_of_the_engine(server: RunningServer, client: openai.OpenAI) -> None:
    aborted = 'vlserve:request_success_total{finished_reason="abort"'
    before = metric(server, aborted)
    begun = client.responses.create(**LONG)
    with pytest.raises(openai.BadRequestError, match="not finished"):
        client.responses.create(model="tiny", input="go on", previous_response_id=begun.id)
    wait_until(lambda: bool(client.responses.retrieve(begun.id).output))
    ended = client.responses.cancel(begun.id)
    assert ended.status == "cancelled" and ended.output[0].status == "incomplete"  # type: ignore[union-attr]
    assert (
        client.responses.cancel(begun.id).model_dump() == client.responses.retrieve(begun.id).model_dump() == ended.model_dump()
    )
    deleted = client.responses.create(**LONG)
    client.responses.delete(deleted.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(deleted.id)
    wait_until(lambda: metric(server, "vlserve:num_requests_running") == 0)
    assert metric(server, aborted) in (before + 1, before + 2), "the second may have ended before its first step"
    assert len([client.responses.create(model="tiny", input="hi", max_output_tokens=1) for _ in range(2)]) == 2


def test_a_shutdown_ends_background_answers(server: RunningServer, client: openai.OpenAI) -> None:
    """The last one here: the server is gone afterwards."""
    ranks = server.ranks()
    for _ in range(4):
        client.responses.create(**LONG)
    server.process.send_signal(signal.SIGTERM)
    assert server.wait() in (0, -signal.SIGTERM, 128 + signal.SIGTERM)
    wait_until(lambda: not any(map(is_alive, ranks)))
    assert not [line for line in server.lines if "Traceback" in line or "was destroyed" in line]


def body(id: str, text: str = "") -> dict[str, Any]:
    return {"id": id, "output": [{"id": f"msg_{id}", "content": text}]}


def test_bounds_hold_and_the_least_recently_used_goes() -> None:
    store = ResponseStore(ServerConfig(store_responses=True, max_stored_responses=3, max_stored_mib=1))
    for id in "abc":
        store.put("me", [], body(id))
    store.find("a", "me")
    store.put("you", [], body("d"))
    assert [id for id in "abcd" if known(store, id)] == ["a", "c", "d"]
    for id in "efg":
        store.put("me", [kept_item({"role": "user", "content": "x" * 300_000})], body(id, "y" * 100_000))
        assert store.num_bytes <= 2**20
    assert [id for id in "abcdefg" if known(store, id)] == ["f", "g"]
    store.put("me", [], body("h", "z" * 2**21))
    assert len(store) == 0 and store.num_bytes == 0, "one alone that is too large is not kept either"


def known(store: ResponseStore, id: str) -> bool:
    """Without being used by that."""
    return id in store._kept


def test_what_could_never_be_kept_is_refused_before_it_is_answered() -> None:
    from vlserve.server.responses_request import ResponsesRequest

    store = ResponseStore(ServerConfig(store_responses=True, max_stored_mib=1))
    asked = ResponsesRequest.model_validate({"input": "x" * 2**21})
    with pytest.raises(RequestError, match="send store: false"):
        store.conversation(asked, "me")
    assert store.conversation(asked.model_copy(update={"store": False}), "me")


def test_many_turns_are_shortened_one_at_a_time() -> None:
    """All ways to shorten 10,000 turns have 50 million items together, and those of 400,000 more than memory holds."""
    items = [({"role": "system", "content": "s"}, "input[0]"), *(({"role": "user", "content": "u"}, "x"),) * 10_000]
    tries = shortened(items)
    assert len(tries) == 10_000 and all(map(callable, tries))
    assert tries[0]() == items and tries[1]() == [items[0], *items[2:]] and len(tries[-1]()) == 2


def test_what_is_put_twice_counts_once() -> None:
    store = ResponseStore(ServerConfig(store_responses=True))
    store.put("me", [], body("a", "x"))
    size = store.num_bytes
    store.put("me", [], body("a", "x"))
    assert (len(store), store.num_bytes) == (1, size)


@pytest.mark.parametrize("name", ("max_stored_responses", "max_stored_mib"))
def test_wrong_bounds_are_explained(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} is 0"):
        ServerConfig(**{name: 0})
    with pytest.raises(
        ConfigError, match=f"{name} is 7, and no responses are kept; give store_responses .--store-responses. too"
    ):
        ServerConfig(**{name: 7})
    ServerConfig(store_responses=True, **{name: 7})
