"""Responses that are kept in memory: for previous_response_id, for being asked again, and those answered in the background.

Bounded in number and bytes, of which the least recently used make room. Whoever has another API key sees none of them.
"""

from __future__ import annotations

import asyncio
import sys
from collections import OrderedDict
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from vlserve.config import ServerConfig
from vlserve.errors import RequestError
from vlserve.server.responses_answer import ResponsesAnswer
from vlserve.server.responses_input import Item, kept_item
from vlserve.server.responses_request import ResponsesRequest
from vlserve.server.streams import events

REFERENCE = "item_reference"


class BackgroundRun:
    """An answer that goes on whoever listens, with its events where they were asked for."""

    def __init__(self, answer: ResponsesAnswer, deltas: Any, held: ExitStack, *, keeps_events: bool) -> None:
        self.answer = answer
        self.events: list[bytes] | None = [] if keeps_events else None
        self._news = asyncio.Event()
        self._task = asyncio.ensure_future(self._run(deltas))
        self._task.add_done_callback(lambda task: self._ended(held))  # also where it was cancelled before its first step

    async def _run(self, deltas: Any) -> None:
        async for event in events(self.answer, deltas):
            if self.events is not None and event.startswith(b"event:"):
                self.events.append(event)
                self._tell()

    def _ended(self, held: ExitStack) -> None:
        held.close()
        self.answer.cancel()  # unless it is done
        self._tell()

    async def listen(self, after: int) -> AsyncIterator[bytes]:
        """The events whose sequence_number is above `after`, as they come."""
        place, kept = after + 1, self.events or []
        while True:
            news = self._news
            while place < len(kept):
                yield kept[place]
                place += 1
            if self._task.done():
                return
            await news.wait()

    async def cancel(self) -> None:
        """End it, which takes the request out of the engine."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    def _tell(self) -> None:
        self._news.set()
        self._news = asyncio.Event()


@dataclass(slots=True)
class Kept:
    """One response; `items` is the whole conversation that was answered, `body` the response once it is finished."""

    owner: str
    items: Sequence[Item]
    body: Mapping[str, Any] | None = None
    run: BackgroundRun | None = None
    num_bytes: int = 0

    def whole(self) -> Mapping[str, Any]:
        if self.body is not None:
            return self.body
        assert self.run is not None
        return self.run.answer.whole()


class ResponseStore:
    """All responses that one router keeps. `owner` tells whose they are, one for each API key."""

    def __init__(self, config: ServerConfig) -> None:
        self.is_on = config.store_responses
        self._most, self._most_bytes = config.max_stored_responses, config.max_stored_mib * 2**20
        self._kept: OrderedDict[str, Kept] = OrderedDict()  # the least recently used first
        self.num_bytes = 0

    def __len__(self) -> int:
        return len(self._kept)

    def check_on(self, param: str, what: str, instead: str = "") -> None:
        """Raises RequestError where nothing is kept. `instead`: what the client can do without."""
        if not self.is_on:
            raise RequestError(
                f"{what} needs a server that keeps responses, and this one does not; start it with --store-responses{instead}",
                param=param,
                code="unsupported_parameter",
            )

    def find(self, id: str, owner: str) -> Kept:
        """Raises RequestError when there is none of this owner."""
        self.check_on("response_id", "response_id")
        return self._find(id, owner, "response_id")

    def _find(self, id: str, owner: str, param: str) -> Kept:
        kept = self._kept.get(id)
        if kept is None or kept.owner != owner:
            raise RequestError(
                f"{param}: no response {id[:80]!r} is kept; it was deleted, made room for others, or was never stored",
                param=param,
                code="response_not_found",
            )
        self._kept.move_to_end(id)
        return kept

    def conversation(self, asked: ResponsesRequest, owner: str) -> list[tuple[Item, str]]:
        """All items that a request is to be answered with, each with the field that it comes from."""
        if asked.background:
            self.check_on("background", "background: true", ", or leave background out")
            if asked.store is False:
                raise RequestError("background needs store: true, since the answer is asked for later", param="background")
        way_out = ", or send " if asked.store is False else ", or send store: false and "
        before: list[tuple[Item, str]] = []
        if asked.previous_response_id is not None:
            place = "previous_response_id"
            self.check_on(place, place, way_out + "the whole conversation as input")
            kept = self._find(asked.previous_response_id, owner, place)
            if kept.body is None:
                raise RequestError(f"{place} names a response that is not finished yet; wait for it, or cancel it", param=place)
            before = [(item, place) for item in (*kept.items, *kept.body["output"])]
        known: dict[str, Item] = {}
        instead = way_out + "the item itself"
        items = [*before, *((self._referred(item, place, owner, known, instead), place) for item, place in asked.own_items)]
        if self.keeps(asked) and _size([item for item, _ in items]) > self._most_bytes:
            raise RequestError(
                f"the conversation is larger than the {self._most_bytes // 2**20} MiB of kept responses (--max-stored-mib); "
                "send store: false",
                param="store",
            )
        return items

    def keeps(self, asked: ResponsesRequest) -> bool:
        return self.is_on and asked.store is not False

    def put(self, owner: str, items: Sequence[Item], body: Mapping[str, Any]) -> None:
        """Keep a finished response; the oldest make room."""
        id = body["id"]
        kept = self._kept.pop(id, None) or Kept(owner, items)
        self.num_bytes -= kept.num_bytes
        kept.body = body
        kept.num_bytes = _size(kept.items) + _size(body) + _size(kept.run.events if kept.run else None)
        self._kept[id] = kept
        self.num_bytes += kept.num_bytes
        for oldest in list(self._kept):
            if len(self._kept) <= self._most and self.num_bytes <= self._most_bytes:
                return
            if self._kept[oldest].body is not None:  # one that is running has its place in the queue
                self._drop(oldest)

    def begin(self, owner: str, items: Sequence[Item], run: BackgroundRun) -> None:
        """Know a response that is being made; `put` comes at its end."""
        self._kept[run.answer.id] = Kept(owner, items, run=run)

    async def delete(self, id: str, owner: str) -> None:
        kept = self.find(id, owner)
        if kept.run is not None and kept.body is None:
            await kept.run.cancel()
        if id in self._kept:
            self._drop(id)

    async def cancel(self, id: str, owner: str) -> Mapping[str, Any]:
        """The response as it is after the end of its run."""
        kept = self.find(id, owner)
        if kept.run is None:
            raise RequestError("only a response that was made with background: true can be cancelled", param="response_id")
        if kept.body is None:
            await kept.run.cancel()
        return kept.whole()

    def _referred(self, item: Any, place: str, owner: str, known: dict[str, Item], instead: str) -> Any:
        """The item itself, or the one that it names.

        Args:
            known: all kept items by id, once one was asked for. instead: the way out where nothing is kept.
        """
        if not isinstance(item, Mapping) or (item.get("type") or ("message" if "role" in item else REFERENCE)) != REFERENCE:
            return item
        id = item.get("id")
        if not isinstance(id, str):
            raise RequestError(f"{place}.id is missing", param=f"{place}.id")
        self.check_on(f"{place}.type", f"{place}.type item_reference", instead)
        if not known:
            for kept in self._items_of(owner):
                known.setdefault(kept["id"], kept)
        if id not in known:
            raise RequestError(f"{place}.id: no item {id[:80]!r} is kept; send the item itself", param=f"{place}.id")
        return known[id]

    def _items_of(self, owner: str) -> Iterator[Item]:
        for kept in reversed(self._kept.values()):
            if kept.owner == owner:
                yield from (*(kept.body["output"] if kept.body else ()), *kept.items)

    def _drop(self, id: str) -> None:
        self.num_bytes -= self._kept.pop(id).num_bytes


def kept_items(items: Sequence[tuple[Item, str]]) -> list[Item]:
    return [kept_item(item) for item, _ in items]


def _size(value: Any) -> int:
    """Bytes of memory of JSON values; what two share is counted for both."""
    size = sys.getsizeof(value)
    if isinstance(value, Mapping):
        return size + sum(_size(key) + _size(inner) for key, inner in value.items())
    if isinstance(value, (list, tuple)):
        return size + sum(map(_size, value))
    return size
