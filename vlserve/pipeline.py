"""`VLPipeline`: pictures and text in, text out, from Python; the HTTP server stands on it too.

Owns the way from a user's prompt to the engine's request and back. Synchronous calls run on an event
loop in a thread of the pipeline's own, so they work in scripts, notebooks and inside a running loop.
"""

from __future__ import annotations

import asyncio
import os
import queue
import sys
import threading
import weakref
from collections.abc import AsyncIterator, Coroutine, Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from vlserve import structured
from vlserve.answer import AnswerText
from vlserve.checkpoint import find_folder, read_checkpoint
from vlserve.client import EngineClient
from vlserve.config import SamplingParams, read_options
from vlserve.engine.messages import Stage, TokenLogprob
from vlserve.errors import DeadlineError, EngineError, RequestError
from vlserve.loader import PictureLoader
from vlserve.messages import ImagePart, Turn, is_batch, read_prompt
from vlserve.migrating import explain_sampling
from vlserve.observer import AnswerClock, Observer, PreparationClock
from vlserve.outputs import Completion, Delta
from vlserve.prompt import Message, Picture, Prompt, PromptBuilder, PromptOptions, Text

if TYPE_CHECKING:
    from vlserve.vision.config import ImageConfig
    from vlserve.vision.preprocess import ImageTiles

T = TypeVar("T")
MAX_TOKEN_CHARACTERS = 128  # no vocabulary of the field has longer tokens


class VLPipeline:
    """A vision-language model, ready to be asked.

        pipe = VLPipeline("demo")
        pipe(("What shape is it?", "picture.png"), max_tokens=16).text

    Args:
        model: demo, a folder, or a Hugging Face name. Other keywords are the fields of `EngineConfig` and
            `MediaConfig`.
        wait: False returns before the engine is ready; asking before then raises EngineError.

    A prompt is a text, (text, picture), (text, [pictures]), OpenAI-style messages, or a list of these.
    Pictures are PIL images, paths, URLs, data URLs, bytes or uint8 arrays.

    Raises ConfigError for a wrong option, ModelError for a checkpoint that cannot be used.
    """

    def __init__(self, model: str = "demo", *, wait: bool = True, **options: Any) -> None:
        self.config, self.media = read_options({"model": model, **options})
        self.checkpoint = read_checkpoint(find_folder(model, self.config.revision))
        self.client = EngineClient(self.config)
        self.observers: list[Observer] = []
        try:
            weakref.finalize(self, self.client.close)  # a pipeline that is dropped ends its process
            self._builder = PromptBuilder(self.checkpoint)
            self._pictures = PictureLoader(self.media)
            self._workers = ThreadPoolExecutor(min(8, os.cpu_count() or 1), thread_name_prefix="vlserve-prepare")
            # of their own, so that grammars which take long hold up only one another
            self._grammar_workers = ThreadPoolExecutor(2, thread_name_prefix="vlserve-grammar")
            self._loop: asyncio.AbstractEventLoop | None = None
            self._loop_lock = threading.Lock()
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

    def __call__(
        self, prompt: Any, *, sampling: SamplingParams | None = None, progress: bool | None = None, **fields: Any
    ) -> Any:
        """One `Completion` for one prompt, a list of them, in order, for a list.

        Args:
            prompt: see the class. sampling: or its fields by keyword, e.g. max_tokens=64, temperature=0.0.
            progress: a bar over a list's answers; default: on a terminal.
        """
        params = _sampling(sampling, fields)
        if not is_batch(prompt):
            return self._run(self.agenerate(prompt, sampling=params))
        show = sys.stderr.isatty() if progress is None else progress
        return self._run(self._generate_all(prompt, params, show))

    def stream(self, prompt: Any, *, sampling: SamplingParams | None = None, **fields: Any) -> Iterator[Delta]:
        """The answer piece by piece. Leaving the loop early ends the request."""
        pieces: queue.SimpleQueue[Delta | BaseException | None] = queue.SimpleQueue()

        async def pump() -> None:
            try:
                async for delta in self.astream(prompt, sampling=sampling, **fields):
                    pieces.put(delta)
                pieces.put(None)
            except BaseException as error:
                pieces.put(error)
                raise

        task = asyncio.run_coroutine_threadsafe(pump(), self._background())
        try:
            while (piece := pieces.get()) is not None:
                if isinstance(piece, asyncio.CancelledError):
                    raise EngineError("the pipeline was closed")
                if isinstance(piece, BaseException):
                    raise piece
                yield piece
        finally:
            task.cancel()

    async def agenerate(self, prompt: Any, *, sampling: SamplingParams | None = None, **fields: Any) -> Completion:
        """As calling the pipeline with one prompt, for asyncio."""
        return collect([delta async for delta in self.astream(prompt, sampling=sampling, **fields)])

    async def astream(self, prompt: Any, *, sampling: SamplingParams | None = None, **fields: Any) -> AsyncIterator[Delta]:
        """As `stream`, for asyncio."""
        params = _sampling(sampling, fields)
        await self.check_structured(params)
        async for delta in self.answer(await self.prepare(read_prompt(prompt)), params):
            yield delta

    async def prepare(self, turns: Sequence[Turn], options: PromptOptions | None = None) -> Prompt:
        """Load and cut the pictures, apply the chat template; off the event loop. Raises RequestError."""
        if self.client.error is not None:
            raise EngineError(str(self.client.error))
        options = options or PromptOptions()
        self._check_length(sum(len(part) for turn in turns for part in turn.parts if isinstance(part, str)), "messages")
        clock = PreparationClock()
        images = [part for turn in turns for part in turn.parts if isinstance(part, ImagePart)]
        max_tokens = self.client.ready.max_model_len if self.client.ready else None
        config = self._image_config(options.max_tiles)
        tiles = await self._pictures.load(images, config, max_tokens=max_tokens, clock=clock)
        prompt = await asyncio.get_running_loop().run_in_executor(self._workers, self._build, turns, tiles, options)
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
        text = AnswerText(self._builder.tokenizer, sampling)
        events = self.client.generate(prompt, sampling, max_tokens, timeout_s)
        try:
            async for event in events:
                clock.saw(event)
                if event.finish_reason == "error":
                    kind = DeadlineError if event.is_overdue else EngineError
                    raise kind(event.error or "the engine failed")
                ended_by_token = event.finish_reason == "stop"
                piece = text.add(event.token_id) if event.token_id is not None and not ended_by_token else ""
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
            raise self.client.error or EngineError(f"the engine is still loading (stage: {self.client.stage.name})")
        room = ready.max_model_len - len(prompt.token_ids)
        if room < 1:
            raise RequestError(
                f"the prompt has {len(prompt.token_ids)} tokens ({prompt.num_image_tokens} of them image tokens), "
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
        if max(prompt.token_ids) >= ready.vocab_size:
            raise RequestError(f"the prompt has a token outside the model's vocabulary of {ready.vocab_size}", param="messages")
        return sampling.max_tokens or room

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
        with self._loop_lock:
            loop, self._loop = self._loop, None
        if loop is not None:
            asyncio.run_coroutine_threadsafe(_end_loop(), loop)

    def __enter__(self) -> VLPipeline:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    @property
    def tokenizer(self) -> Any:
        return self._builder.tokenizer

    def _image_config(self, max_tiles: int | None) -> ImageConfig:
        config = self.checkpoint.image_config
        if max_tiles is None:
            return config
        return replace(config, max_patches=min(max_tiles, config.max_patches), min_patches=min(max_tiles, config.min_patches))

    def _build(self, turns: Sequence[Turn], tiles: Sequence[ImageTiles], options: PromptOptions) -> Prompt:
        """In a worker thread, since a long text takes its time."""
        remaining = iter(tiles)

        def part(given: str | ImagePart) -> Text | Picture:
            return Text(given) if isinstance(given, str) else Picture(next(remaining))

        messages = [Message(turn.role, [part(p) for p in turn.parts], turn.is_string, turn.fields) for turn in turns]
        return self._builder.build(messages, options)

    async def _generate_all(self, prompts: Sequence[Any], sampling: SamplingParams, show: bool) -> list[Completion]:
        from tqdm import tqdm

        limit = asyncio.Semaphore(2 * self.config.max_num_seqs)  # prepared pictures take memory
        with tqdm(total=len(prompts), disable=not show, unit="answer") as bar:

            async def one(prompt: Any) -> Completion:
                async with limit:
                    completion = await self.agenerate(prompt, sampling=sampling)
                    bar.update()
                    return completion

            tasks = [asyncio.ensure_future(one(prompt)) for prompt in prompts]
            try:
                return await asyncio.gather(*tasks)
            finally:
                for task in tasks:
                    task.cancel()

    def _background(self) -> asyncio.AbstractEventLoop:
        with self._loop_lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                threading.Thread(target=_run_loop, args=(self._loop,), name="vlserve-loop", daemon=True).start()
            return self._loop

    def _run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        future = asyncio.run_coroutine_threadsafe(coroutine, self._background())
        try:
            return future.result()
        except CancelledError:
            raise EngineError("the pipeline was closed") from None
        except BaseException:  # Ctrl-C too: the request must not go on
            future.cancel()
            raise


def collect(deltas: Sequence[Delta]) -> Completion:
    """The whole answer from its pieces."""
    last = deltas[-1]
    assert last.finish_reason is not None and last.usage is not None and last.timing is not None
    logprobs: list[TokenLogprob] = [entry for delta in deltas for entry in delta.logprobs or ()]
    return Completion(
        text="".join(delta.text for delta in deltas),
        token_ids=tuple(id for delta in deltas for id in delta.token_ids),
        finish_reason=last.finish_reason,
        usage=last.usage,
        timing=last.timing,
        logprobs=tuple(logprobs) if logprobs else None,
    )


def _sampling(sampling: SamplingParams | None, fields: dict[str, Any]) -> SamplingParams:
    if sampling is not None and fields:
        raise RequestError(f"give sampling or its fields, not both (got {', '.join(fields)})", param="sampling")
    if sampling is not None:
        return sampling
    unknown = sorted(set(fields) - set(SamplingParams.__dataclass_fields__))
    if unknown:
        names = ", ".join(SamplingParams.__dataclass_fields__)
        hint = explain_sampling(unknown[0], SamplingParams.__dataclass_fields__)
        raise RequestError(f"unknown sampling parameter {unknown[0]!r}{hint}; parameters: {names}", param=unknown[0])
    return SamplingParams(**fields)


async def _end_loop() -> None:
    """Cancel what the loop still runs, so that nobody waits for it, then stop it."""
    loop = asyncio.get_running_loop()
    others = asyncio.all_tasks(loop) - {asyncio.current_task(loop)}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
    loop.stop()


def _run_loop(loop: asyncio.AbstractEventLoop) -> None:
    asyncio.set_event_loop(loop)
    try:
        loop.run_forever()
    finally:
        loop.close()
