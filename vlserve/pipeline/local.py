"""A pipeline whose model runs on this machine; the HTTP server stands on it too.

Owns the way from a user's prompt to the engine's request and back; how it is called is calls.py's.
"""

from __future__ import annotations

import asyncio
import os
import sys
import weakref
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from vlserve.config import SamplingParams, read_options
from vlserve.engine.messages import Stage
from vlserve.errors import ConfigError, DeadlineError, EngineError, RequestError
from vlserve.media.loader import PictureLoader
from vlserve.models.checkpoint import check_shards, find_checkpoint
from vlserve.pipeline.calls import PipelineCalls
from vlserve.pipeline.harmony import HarmonyParser
from vlserve.pipeline.observer import AnswerClock, Observer
from vlserve.pipeline.outputs import Delta
from vlserve.pipeline.stop_strings import AnswerText, with_stop_tokens
from vlserve.plan.tp_plan import check_tp, choose_dtype
from vlserve.prompt.build import Prompt, PromptBuilder
from vlserve.prompt.chat_messages import ImagePart, Turn
from vlserve.prompt.conversation import Message, Picture, PromptOptions, Text
from vlserve.ranks.client import EngineClient
from vlserve.structured import grammar as structured
from vlserve.timing import PreparationClock

if TYPE_CHECKING:
    from vlserve.vision.pixels import Pixels

T = TypeVar("T")
MAX_TOKEN_CHARACTERS = 128  # no vocabulary of the field has longer tokens


class LocalPipeline(PipelineCalls):
    """A model on this machine: front, engine client and workers. `VLPipeline` is what people call it."""

    def __init__(self, model: str = "demo", *, wait: bool = True, **options: Any) -> None:
        super().__init__()
        model = os.fspath(model)
        self.config, self.media = read_options({"model": model, **options})
        if self.config.node_rank > 0:
            raise ConfigError(
                f"node_rank is {self.config.node_rank}: only machine 0 answers. On the others run "
                "`vlserve serve --nnodes N --node-rank K` with the same options"
            )
        self.checkpoint = find_checkpoint(self.config)
        check_shards(self.checkpoint.folder, self.config)
        choose_dtype(self.checkpoint.config, self.config.dtype)
        check_tp(
            self.checkpoint.config,
            self.config.tp,
            replicate_kv_heads=self.config.replicate_kv_heads,
            expert_parallel=self.config.expert_parallel,
        )
        self.client = EngineClient(self.config)
        self.max_at_once = 2 * self.config.max_num_seqs  # prepared pictures take memory
        self.observers: list[Observer] = []
        try:
            weakref.finalize(self, self.client.close)  # a pipeline that is dropped ends its process
            self._builder = PromptBuilder(self.checkpoint)
            self._pictures = PictureLoader(self.media)
            self._workers = ThreadPoolExecutor(min(8, os.cpu_count() or 1), thread_name_prefix="vlserve-prepare")
            # of their own, so that grammars which take long hold up only one another
            self._grammar_workers = ThreadPoolExecutor(2, thread_name_prefix="vlserve-grammar")
            if wait:
                self.wait_ready()
        except BaseException:
            self.client.close()
            raise

    def wait_ready(self) -> None:
        """Block until the engine serves, showing the stages on a terminal; raises what start-up failed with."""
        shown = sys.stderr.isatty()

        def on_stage(stage: Stage) -> None:
            parts = f" {stage.done}/{stage.total}" if stage.total else ""
            print(f"\r\033[Kloading {self.config.model}: {stage.name}{parts}", end="", file=sys.stderr, flush=True)

        try:
            self.client.wait_ready(on_stage if shown else lambda stage: None)
        finally:
            if shown:
                print("\r\033[K", end="", file=sys.stderr, flush=True)

    async def answers(self, turns: Sequence[Turn], params: SamplingParams) -> AsyncIterator[Delta]:
        await self.check_structured(params)
        prompt = await self.prepare(
            turns, PromptOptions(only_final=params.structured is not None, is_raw=not params.skip_special_tokens)
        )
        if prompt.opened is None:
            async for delta in self.answer(prompt, params):
                yield delta
            return
        parser = HarmonyParser(prompt.opened, calls=False, reasoning=False)
        async for delta in self.answer(prompt, params):
            pieces = parser.add(delta.text)
            if delta.finish_reason is not None:
                pieces += parser.finish(cut=delta.finish_reason == "length")
            yield replace(delta, text="".join(piece.text for piece in pieces))

    async def prepare(self, turns: Sequence[Turn], options: PromptOptions | None = None) -> Prompt:
        """Load and preprocess the pictures, apply the chat template; off the event loop. Raises RequestError."""
        if self.client.error is not None:
            raise EngineError(str(self.client.error))
        options = options or PromptOptions()
        self.check_number(sum(max(1, len(turn.parts)) for turn in turns), "messages and their parts", "messages")
        self._check_length(sum(len(part) for turn in turns for part in turn.parts if isinstance(part, str)), "messages")
        clock = PreparationClock()
        images = [part for turn in turns for part in turn.parts if isinstance(part, ImagePart)]
        max_tokens = self.client.ready.max_model_len if self.client.ready else None
        preprocessor = self.checkpoint.preprocessor.configured(options.mm_processor_kwargs)
        pixels = await self._pictures.load(images, preprocessor, max_tokens=max_tokens, clock=clock)
        prompt = await asyncio.get_running_loop().run_in_executor(self._workers, self._build, turns, pixels, options)
        prompt = replace(prompt, preparation=clock.read())
        for observer in self.observers:
            observer.prepared(prompt.preparation)
        return prompt

    async def prepare_text(self, text: str, *, beginning: bool = True) -> Prompt:
        """A raw prompt, without the chat template; special tokens in it are ordinary text."""
        self._check_length(len(text), "prompt")
        return await asyncio.get_running_loop().run_in_executor(self._workers, self._builder.encode_plain, text, beginning)

    async def answer(self, prompt: Prompt, sampling: SamplingParams, *, timeout_s: float | None = None) -> AsyncIterator[Delta]:
        """Run a prepared prompt; the last delta has finish_reason and timing.

        Raises RequestError when the lengths or the grammar do not fit, DeadlineError after `timeout_s`, EngineError when
        the engine fails.
        """
        max_tokens = self.check(prompt, sampling)
        await self.check_structured(sampling)
        clock = AnswerClock(prompt, self.observers)
        if self.client.ready is not None:
            sampling = with_stop_tokens(sampling, self._builder.tokenizer, self.client.ready.vocab_size)
        text = AnswerText(self._builder.tokenizer, sampling, prompt.opened)
        events = self.client.generate(prompt, sampling, max_tokens, timeout_s)
        try:
            async for event in events:
                clock.saw(event)
                if event.finish_reason == "error":
                    kind = DeadlineError if event.is_overdue else EngineError
                    raise kind(event.error or "the engine failed")
                if event.token_id is not None and event.finish_reason == "stop":
                    piece = text.end(event.token_id)
                else:
                    piece = text.add(event.token_id) if event.token_id is not None else ""
                    if event.finish_reason is not None and not text.stopped:
                        piece += text.finish()
                reason = "stop" if text.stopped else event.finish_reason
                delta = Delta(
                    text=piece,
                    token_ids=() if event.token_id is None else (event.token_id,),
                    finish_reason=reason,
                    logprobs=None if event.logprob is None else (event.logprob,),
                    usage=clock.usage(),
                )
                if reason is None:
                    yield delta
                    continue
                timing = clock.timing(event)
                clock.end(reason, timing)
                yield replace(delta, timing=timing)
                return
        except EngineError:
            clock.end("error")
            raise
        finally:
            clock.end("abort")  # unless it ended already: the caller left
            await events.aclose()  # type: ignore[attr-defined]

    def check(self, prompt: Prompt, sampling: SamplingParams) -> int:
        """How many tokens the answer may have; raises RequestError when prompt or parameters do not fit the model."""
        ready = self.client.ready
        if ready is None or self.client.error is not None:
            raise self.client.error or EngineError(
                f"the engine is still loading (stage: {self.client.stage.name}); try again in 5 s"
            )
        room = ready.max_model_len - len(prompt.token_ids)
        if room < 1:
            raise RequestError(
                f"the prompt has {len(prompt.token_ids)} tokens ({prompt.num_image_tokens} of them image tokens), "
                f"which leaves no room for an answer in max_model_len {ready.max_model_len}",
                param="messages",
                code="context_length_exceeded",
            )
        if prompt.positions is not None:
            room = min(room, ready.max_model_len - prompt.positions.next)
            if room < 1 or prompt.positions.furthest >= ready.max_model_len:
                raise RequestError(
                    f"the prompt's pictures reach position {max(prompt.positions.furthest, prompt.positions.next)}, "
                    f"which leaves no room for an answer in max_model_len {ready.max_model_len}",
                    param="messages",
                    code="context_length_exceeded",
                )
        if sampling.max_tokens is not None and sampling.max_tokens > room:
            raise RequestError(
                f"max_tokens {sampling.max_tokens} and the prompt's {len(prompt.token_ids)} tokens are more than "
                f"max_model_len {ready.max_model_len}; max_tokens can be {room} at most",
                param="max_tokens",
                code="context_length_exceeded",
            )
        for name, ids in (("logit_bias", sampling.logit_bias), ("stop_token_ids", sampling.stop_token_ids)):
            for id in ids:
                if not 0 <= id < ready.vocab_size:
                    raise RequestError(f"{name} names token {id}; the vocabulary has 0 to {ready.vocab_size - 1}", param=name)
        if max(prompt.token_ids) >= ready.vocab_size or min(prompt.token_ids) < 0:
            raise RequestError(f"the prompt has a token outside the model's vocabulary of {ready.vocab_size}", param="messages")
        return sampling.max_tokens or room

    def check_ids(self, ids: Sequence[int]) -> None:
        """Whether a prompt of token ids can be one; raises RequestError."""
        self.check_number(len(ids), "token ids", "prompt")
        if not self.checkpoint.feature_token_ids.isdisjoint(ids) or min(ids) < 0:
            raise RequestError("prompt has a token id that is a picture's place, or below 0", param="prompt")

    def check_number(self, number: int, what: str, param: str) -> None:
        """Each takes a token or more."""
        if self.client.ready is not None and number > self.client.ready.max_model_len:
            raise RequestError(
                f"{number} {what} are more than max_model_len {self.client.ready.max_model_len} can hold",
                param=param,
                code="context_length_exceeded",
            )

    def _check_length(self, num_characters: int, param: str) -> None:
        most = MAX_TOKEN_CHARACTERS * self.client.ready.max_model_len if self.client.ready else num_characters
        if num_characters > most:  # encoding it first could take a minute
            raise RequestError(
                f"the text has {num_characters} characters, more than {most // MAX_TOKEN_CHARACTERS} tokens can hold",
                param=param,
                code="context_length_exceeded",
            )

    async def check_structured(self, sampling: SamplingParams) -> None:
        """Raises RequestError when `sampling.structured` cannot be followed; remembers what was checked before."""
        if sampling.structured is None:
            return
        self.client.check_alive()
        if not self.checkpoint.end_token_ids:
            raise RequestError("structured output needs a model with an end token (eos_token_id)", param="structured")
        work = asyncio.get_running_loop().run_in_executor(self._grammar_workers, structured.check, sampling.structured)
        try:
            await asyncio.wait_for(work, structured.COMPILE_LIMIT_S)
        except asyncio.TimeoutError:  # the built-in one from Python 3.11 on
            raise RequestError(
                f"the grammar took longer than {structured.COMPILE_LIMIT_S:g} s to check", param="structured"
            ) from None

    def close(self) -> None:
        """End the engine and its process. Open requests raise EngineError."""
        self.client.close()
        self._workers.shutdown(wait=False)
        self._pictures.close()
        self._grammar_workers.shutdown(wait=False)
        self._end_loop()

    def uses_variable(self, name: str) -> bool:
        """Whether the model's chat template reads a variable, e.g. reasoning_effort."""
        return self._builder.template.uses(name)

    @property
    def tokenizer(self) -> Any:
        return self._builder.tokenizer

    def _build(self, turns: Sequence[Turn], pixels: Sequence[Pixels], options: PromptOptions) -> Prompt:
        """In a worker thread, since a long text takes its time."""
        remaining = iter(pixels)

        def part(given: str | ImagePart) -> Text | Picture:
            return Text(given) if isinstance(given, str) else Picture(next(remaining))

        messages = [Message(turn.role, [part(p) for p in turn.parts], turn.is_string, turn.fields) for turn in turns]
        return self._builder.build(messages, options)
