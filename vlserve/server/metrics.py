"""What /metrics shows: requests as they end, the engine's own figures, the GPUs.

Each `Metrics` has a registry of its own, so several servers live in one process. Requests are counted by the
pipeline's calls (an `Observer`), HTTP answers by the routes; the engine's and the GPUs' figures are read when
somebody asks for them.
"""

from __future__ import annotations

import itertools
import logging
import re
import time
import uuid
from collections.abc import Iterator, MutableMapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, get_args

from fastapi import Response
from fastapi.routing import APIRoute
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from vlserve.config import SamplingParams
from vlserve.engine.messages import STEP_TOKENS, FinishReason, Ready, Stats
from vlserve.pipeline.outputs import Timing, Usage
from vlserve.server.gpus import Gpus
from vlserve.server.http_edge import answer_in_full
from vlserve.server.logs import access_line
from vlserve.timing import Preparation

if TYPE_CHECKING:
    from vlserve.pipeline.vl_pipeline import VLPipeline
    from vlserve.prompt.build import Prompt

log = logging.getLogger(__name__)
# seconds; from a small model on a GPU to a large one on a CPU
REQUEST_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 1000)
TOKEN_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5, 5, 10)
SIZE_BUCKETS = tuple(digit * 10**power for power in range(6) for digit in (1, 2, 5))  # tokens
CHOICE_BUCKETS = (1, 2, 5, 10, 20)
IMAGE_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25)
TEXT_FORMAT = "text/plain; version=0.0.4; charset=utf-8"
QUIET = ("/health", "/live", "/metrics")  # asked every few seconds by machines: only --log-level debug shows them


@dataclass(slots=True)
class _Access:
    """One HTTP request on its way; `owner` tells whose, should two routers share a pipeline."""

    owner: Metrics
    id: str
    begun: float = field(default_factory=time.monotonic)
    answers: list[tuple[FinishReason, Usage]] = field(default_factory=list)


_access: ContextVar[_Access | None] = ContextVar("vlserve_access", default=None)


class Metrics:
    """The figures of one router; counting begins when it is made."""

    def __init__(self, pipeline: VLPipeline, model_name: str) -> None:
        self.registry = CollectorRegistry()
        self._model_name = model_name
        self._prompt_tokens = self._counter("prompt_tokens", "Tokens of prompts whose answer began, once for each answer.")
        self._image_tokens = self._counter("image_tokens", "Of the prompt tokens, those that stand for pictures.")
        self._generation_tokens = self._counter("generation_tokens", "Tokens of answers, the ending one included.")
        self._ttft = self._histogram("time_to_first_token", "From the start of the preparation to the first token.")
        self._gap = self._histogram("inter_token_latency", "From one token of an answer to the next.", TOKEN_BUCKETS)
        self._e2e = self._histogram("e2e_request_latency", "From the start of the preparation to the last token.")
        self._queue = self._histogram("request_queue_time", "Waiting in the engine to be scheduled.")
        self._prefill = self._histogram("request_prefill_time", "From being scheduled to the first token.")
        self._decode = self._histogram("request_decode_time", "From the first token to the last.")
        self._fetch = self._histogram("image_fetch", "Fetching a picture from its URL.", IMAGE_BUCKETS)
        self._image_decode = self._histogram("image_decode", "Decoding a picture to RGB pixels.", IMAGE_BUCKETS)
        self._tiling = self._histogram("image_tiling", "Resizing a picture and cutting it into tiles.", IMAGE_BUCKETS)
        self._inference = self._histogram("request_inference_time", "From being scheduled to the last token.")
        self._request_prompt = self._sizes("request_prompt_tokens", "Tokens of a prompt, of answers that came to an end.")
        self._request_generation = self._sizes("request_generation_tokens", "Tokens of an answer that came to an end.")
        self._params_n = self._sizes("request_params_n", "`n` of requests over HTTP.", CHOICE_BUCKETS)
        self._params_max_tokens = self._sizes("request_params_max_tokens", "`max_tokens` of requests over HTTP that have one.")
        self._encode = self._histogram(
            "image_encode", "The encoder's run for a request's pictures; not for those that were cached.", IMAGE_BUCKETS
        )
        ended = Counter(
            "vlserve:request_success",
            "Answers by the way they ended.",
            ["model_name", "finished_reason"],
            registry=self.registry,
        )
        self._ended = {reason: ended.labels(model_name, reason) for reason in get_args(FinishReason)}
        self._http = Counter(
            "vlserve:http_requests",
            "HTTP requests by route and status.",
            ["model_name", "route", "status"],
            registry=self.registry,
        )
        self.registry.register(_EngineCollector(pipeline, model_name))
        pipeline.observers.append(self)

    def prepared(self, preparation: Preparation) -> None:
        for histogram, entries in (
            (self._fetch, preparation.fetch_s),
            (self._image_decode, preparation.decode_s),
            (self._tiling, preparation.tiling_s),
        ):
            for seconds in entries:
                histogram.observe(seconds)

    def asked(self, params: Sequence[SamplingParams]) -> None:
        """A request over HTTP, with the parameters of each of its choices."""
        self._params_n.observe(len(params))
        if params[0].max_tokens is not None:
            self._params_max_tokens.observe(params[0].max_tokens)

    def first_token(self, prompt: Prompt, ttft_s: float) -> None:
        self._prompt_tokens.inc(len(prompt.token_ids))
        self._image_tokens.inc(prompt.num_image_tokens)
        self._generation_tokens.inc()
        self._ttft.observe(ttft_s)

    def next_token(self, gap_s: float) -> None:
        self._generation_tokens.inc()
        self._gap.observe(gap_s)

    def ended(self, reason: FinishReason, usage: Usage, timing: Timing | None) -> None:
        self._ended[reason].inc()
        access = _access.get()
        if access is not None and access.owner is self:
            access.answers.append((reason, usage))
        if timing is None:
            return
        self._request_prompt.observe(usage.prompt_tokens)
        self._request_generation.observe(usage.completion_tokens)
        self._inference.observe(timing.total_s - timing.prepare_s - timing.queue_s)
        self._e2e.observe(timing.total_s)
        self._queue.observe(timing.queue_s)
        self._prefill.observe(timing.ttft_s - timing.prepare_s - timing.queue_s)
        self._decode.observe(timing.total_s - timing.ttft_s)
        if timing.encode_s > 0:
            self._encode.observe(timing.encode_s)

    def expose(self) -> Response:  # not async: reading the GPUs may take a while
        """The server's figures, for Prometheus."""
        # Always plain text. The OpenMetrics form that Prometheus would rather have is no choice: where the asker wants
        # underscores, prometheus-client writes them for the colons of the samples' names too.
        return Response(generate_latest(self.registry), headers={"Content-Type": TEXT_FORMAT})

    def watched(self, route_class: type[APIRoute]) -> type[APIRoute]:
        """A route class that does as the given one, counts its answers, writes access lines and sends x-request-id."""
        metrics = self

        class Watched(route_class):  # type: ignore[valid-type, misc]
            async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
                async def watched(scope: Scope, receive: Receive, send: Send) -> None:
                    await metrics._watch(handle, self.path, scope, receive, send)

                handle = super().handle
                await answer_in_full(watched, scope, receive, send)

        return Watched

    async def _watch(self, handle: Any, route: str, scope: Scope, receive: Receive, send: Send) -> None:
        """Lasts until the answer's last byte, for a stream too."""
        access, status = _Access(self, _request_id(scope)), 499  # the client left before there was an answer
        scope.setdefault("state", {})["request_id"] = access.id

        async def watched_send(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", access.id.encode())]
            await send(message)

        token = _access.set(access)
        try:
            await handle(scope, receive, watched_send)
        except HTTPException as error:  # answered further out
            status = error.status_code
            raise
        except Exception:
            status = 500
            raise
        finally:
            _access.reset(token)
            self._http.labels(self._model_name, route, str(status)).inc()
            fields = access_line(access.id, route, status, time.monotonic() - access.begun, access.answers)
            level = logging.DEBUG if route in QUIET else logging.INFO
            log.log(level, "request", extra={"fields": fields})

    def _counter(self, name: str, help: str) -> Counter:
        return Counter(f"vlserve:{name}", help, ["model_name"], registry=self.registry).labels(self._model_name)

    def _sizes(self, name: str, help: str, buckets: tuple[int, ...] = SIZE_BUCKETS) -> Histogram:
        histogram = Histogram(f"vlserve:{name}", help, ["model_name"], registry=self.registry, buckets=buckets)
        return histogram.labels(self._model_name)

    def _histogram(self, name: str, help: str, buckets: tuple[float, ...] = REQUEST_BUCKETS) -> Histogram:
        histogram = Histogram(
            f"vlserve:{name}_seconds", f"Seconds. {help}", ["model_name"], registry=self.registry, buckets=buckets
        )
        return histogram.labels(self._model_name)


def _request_id(scope: Scope) -> str:
    """The client's own X-Request-Id where it is a plain word, else a new one."""
    given = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
    return given if re.fullmatch(r"[\w.:-]{1,128}", given, re.ASCII) else f"req-{uuid.uuid4().hex}"


class _EngineCollector:
    """Reads the engine's latest figures and the GPUs at every scrape; shows nothing that is not known."""

    def __init__(self, pipeline: VLPipeline, model_name: str) -> None:
        # not the pipeline: the registry would keep one alive that was dropped
        self._client, self._config, self._model_name = pipeline.client, pipeline.config, model_name
        self._gpus = None if pipeline.config.device == "cpu" else Gpus()

    def collect(self) -> Iterator[Metric]:
        stats = self._client.stats
        if stats is not None:
            yield from self._engine(stats, alive=self._client.error is None)
            if stats.step_sizes:
                yield self._steps(stats)
        if self._client.ready is not None:
            yield self._cache(self._client.ready)
        readings = self._gpus.read() if self._gpus is not None else []
        if not readings:
            return
        for name, help, values in (
            (
                "gpu_utilization_perc",
                "Share of time with a kernel running; 1 is all.",
                [(r.index, r.utilisation) for r in readings],
            ),
            ("gpu_memory_used_bytes", "GPU memory in use by every process.", [(r.index, r.used_bytes) for r in readings]),
            ("gpu_memory_total_bytes", "GPU memory.", [(r.index, r.total_bytes) for r in readings]),
        ):
            gauge = GaugeMetricFamily(f"vlserve:{name}", help, labels=["model_name", "gpu"])
            for index, value in values:
                if value is not None:
                    gauge.add_metric([self._model_name, str(index)], value)
            yield gauge

    def _engine(self, stats: Stats, *, alive: bool) -> Iterator[Metric]:
        """Counters stay when the engine is gone; what it holds is gone with it."""
        for name, help, value in (
            ("num_requests_running", "Requests in the engine's steps.", stats.num_running),
            ("num_requests_waiting", "Requests waiting in the engine.", stats.num_waiting),
            ("kv_cache_usage_perc", "Share of the KV cache's blocks owned by requests; 1 is all.", _usage(stats)),
        ):
            gauge = GaugeMetricFamily(f"vlserve:{name}", help, labels=["model_name"])
            gauge.add_metric([self._model_name], value if alive else 0)
            yield gauge
        for name, help, value in (
            ("prefix_cache_queries", "Prompt tokens of admitted requests.", stats.prefix_queries),
            ("prefix_cache_hits", "Prompt tokens found in the prefix cache.", stats.prefix_hits),
            ("mm_cache_queries", "Pictures whose features a request needed.", stats.image_queries),
            ("mm_cache_hits", "Pictures whose features were cached.", stats.image_hits),
            ("num_preemptions", "Requests sent back to wait because the KV cache was full.", stats.num_preemptions),
            ("image_encoder_seconds", "Seconds that the vision encoder ran.", stats.encode_s),
            ("step_seconds", "Seconds in the engine's steps.", stats.step_s),
            ("communication_seconds", "Of these, seconds in collectives with the other ranks.", stats.comm_s),
        ):
            counter = CounterMetricFamily(f"vlserve:{name}", help, labels=["model_name"])
            counter.add_metric([self._model_name], value)
            yield counter
        device = GaugeMetricFamily("vlserve:device_bytes", "Device memory by use.", labels=["model_name", "rank", "kind"])
        for rank, kinds in enumerate(stats.device_bytes if alive else ()):
            for kind, num_bytes in kinds.items():
                device.add_metric([self._model_name, str(rank), kind], num_bytes)
        yield device

    def _steps(self, stats: Stats) -> Metric:
        histogram = HistogramMetricFamily("vlserve:iteration_tokens_total", "Tokens computed in a step.", labels=["model_name"])
        names = [*(f"{size}.0" for size in STEP_TOKENS), "+Inf"]
        counts = itertools.accumulate(stats.step_sizes)
        histogram.add_metric([self._model_name], list(zip(names, counts, strict=True)), stats.step_tokens)
        return histogram

    def _cache(self, ready: Ready) -> Metric:
        """Labels as vLLM's, so that dashboards find `num_gpu_blocks` and `block_size`, on whatever device the blocks are."""
        labels = {
            "block_size": ready.block_size,
            "num_gpu_blocks": ready.num_blocks,
            "cache_dtype": self._config.kv_cache_dtype,
            "enable_prefix_caching": self._config.prefix_caching,
            "gpu_memory_utilization": self._config.gpu_memory_utilization,
        }
        info = GaugeMetricFamily(
            "vlserve:cache_config_info", "The KV cache of each rank; always 1.", labels=["model_name", *labels]
        )
        info.add_metric([self._model_name, *map(str, labels.values())], 1)
        return info


def _usage(stats: Stats) -> float:
    return stats.num_used_blocks / stats.num_blocks
