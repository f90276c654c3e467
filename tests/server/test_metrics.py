"""/metrics: every name, exact counts after known requests, and that the dashboard asks for what exists."""

from __future__ import annotations

import asyncio
import json
import re
import sys
import types
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest
import yaml
from fastapi import FastAPI
from fastapi.testclient import TestClient
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

import vlserve
from tests.pipeline.test_local import OPTIONS
from tests.server.running import RunningServer, chat, data_url, running, tiny
from tests.settling import eventually, wait_until
from tests.vision.test_preprocess import encoded, noise
from vlserve import EngineError, VLPipeline
from vlserve.config import ServerConfig
from vlserve.engine.messages import Stats, TokenEvent
from vlserve.server.gpus import GpuReading, Gpus

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
COUNTERS = {
    "prompt_tokens": (),
    "image_tokens": (),
    "generation_tokens": (),
    "request_success": ("finished_reason",),
    "http_requests": ("route", "status"),
    "prefix_cache_queries": (),
    "prefix_cache_hits": (),
    "mm_cache_queries": (),
    "mm_cache_hits": (),
    "num_preemptions": (),
    "image_encoder_seconds": (),
    "step_seconds": (),
    "communication_seconds": (),
}
CACHE = ("block_size", "num_gpu_blocks", "cache_dtype", "enable_prefix_caching", "gpu_memory_utilization")
GAUGES = {
    "cache_config_info": CACHE,
    "num_requests_running": (),
    "num_requests_waiting": (),
    "kv_cache_usage_perc": (),
    "device_bytes": ("rank", "kind"),
}
GPU_GAUGES = dict.fromkeys(("gpu_utilization_perc", "gpu_memory_used_bytes", "gpu_memory_total_bytes"), ("gpu",))
HISTOGRAMS = (
    "time_to_first_token_seconds",
    "inter_token_latency_seconds",
    "e2e_request_latency_seconds",
    "request_queue_time_seconds",
    "request_prefill_time_seconds",
    "request_decode_time_seconds",
    "image_fetch_seconds",
    "image_decode_seconds",
    "image_tiling_seconds",
    "image_encode_seconds",
    "request_inference_time_seconds",
    "request_prompt_tokens",
    "request_generation_tokens",
    "request_params_n",
    "request_params_max_tokens",
    "iteration_tokens_total",
)
# for dashboards that were made for vLLM; ours shows the same in other series
FOR_OTHERS = {
    *("cache_config_info", "request_inference_time_seconds", "request_prompt_tokens", "request_generation_tokens"),
    *("request_params_n", "request_params_max_tokens", "iteration_tokens"),
}
Scrape = dict[tuple[str, frozenset[tuple[str, str]]], float]


def parse(text: str, model: str) -> Scrape:
    """Samples by name without `vlserve:` and labels without model_name, which every sample has."""
    found: Scrape = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = dict(sample.labels)
            assert labels.pop("model_name") == model, sample
            found[sample.name.removeprefix("vlserve:"), frozenset(labels.items())] = sample.value
    return found


def scrape(server: RunningServer) -> Scrape:
    answer = httpx2.get(server.base + "/metrics", headers={"Accept": "application/openmetrics-text;version=1.0.0"})
    assert answer.status_code == 200 and answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    return parse(answer.text, "tiny")


def value(found: Scrape, name: str, **labels: str) -> float:
    return found.get((name, frozenset(labels.items())), 0.0)


def label_names(found: Scrape) -> dict[str, set[str]]:
    """Labels by sample name, model_name among them."""
    names: dict[str, set[str]] = {}
    for name, labels in found:
        names.setdefault(name, {"model_name"}).update(label for label, _ in labels)
    return names


@pytest.fixture(scope="module")
def server(checkpoint: Callable[..., Path]) -> Iterator[RunningServer]:
    with running(*tiny(checkpoint("qwen2")), "--log-format", "json") as server:
        server.wait_ready()
        yield server


def test_every_series_is_there_before_the_first_request(server: RunningServer) -> None:
    want = {f"{name}_total": {"model_name", *labels} for name, labels in COUNTERS.items()}
    want |= {name: {"model_name", *labels} for name, labels in GAUGES.items()}
    for name in HISTOGRAMS:
        want |= {f"{name}_bucket": {"model_name", "le"}, f"{name}_sum": {"model_name"}, f"{name}_count": {"model_name"}}
    found = scrape(server)
    assert {name: labels for name, labels in label_names(found).items() if not name.endswith("_created")} == want
    reasons = {dict(labels)["finished_reason"] for name, labels in found if name == "request_success_total"}
    assert reasons == {"stop", "length", "abort", "error"}
    assert value(found, "device_bytes", rank="0", kind="kv_cache") > value(found, "device_bytes", rank="0", kind="decoder") > 0


ANSWERED = {"route": "/v1/chat/completions", "status": "200"}


def is_idle(found: Scrape) -> bool:
    """The engine's figures come with its steps, a request's own when the last byte of its answer is sent."""
    return not any(value(found, gauge) for gauge in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"))


def ask(server: RunningServer, *images: Image.Image, **fields: Any) -> dict[str, int]:
    """The request's usage."""
    answer = httpx2.post(server.base + "/v1/chat/completions", json=chat("What shape is it?", *images, **fields), timeout=60)
    assert answer.status_code == 200, answer.text
    if not fields.get("stream"):
        return answer.json()["usage"]
    return json.loads(answer.text.split("\n\n")[-3].removeprefix("data: "))["usage"]


def test_counts_after_known_requests_are_exact(server: RunningServer) -> None:
    picture, other = (Image.fromarray(noise(60, 30, seed=seed)) for seed in (1, 2))
    scrapes = [scrape(server)]
    used = [
        ask(server, picture, ignore_eos=True, max_tokens=5),
        ask(server, picture, other, ignore_eos=True, max_tokens=3, stream=True, stream_options={"include_usage": True}),
        ask(server, ignore_eos=True, max_tokens=1),
    ]
    for body in ({}, chat("x", top_p=7)):
        assert httpx2.post(server.base + "/v1/chat/completions", json=body).status_code == 400
    used.append(ask(server, stop_token_ids=[5], logit_bias={"5": 100}))

    def look() -> Scrape:
        scrapes.append(scrape(server))
        return scrapes[-1]

    def grown(name: str, **labels: str) -> float:
        return value(scrapes[-1], name, **labels) - value(scrapes[0], name, **labels)

    after = eventually(look, lambda found: is_idle(found) and grown("http_requests_total", **ANSWERED) == 4)
    details = [usage["prompt_tokens_details"] for usage in used]
    assert grown("prompt_tokens_total") == sum(usage["prompt_tokens"] for usage in used)
    assert grown("prefix_cache_queries_total") == sum(usage["prompt_tokens"] for usage in used)
    assert grown("prefix_cache_hits_total") == sum(detail["cached_tokens"] for detail in details) > 0
    assert grown("image_tokens_total") == sum(detail["image_tokens"] for detail in details) > 0
    assert [usage["completion_tokens"] for usage in used] == [5, 3, 1, 1]
    assert grown("generation_tokens_total") == 10
    assert grown("request_success_total", finished_reason="length") == 3
    assert grown("request_success_total", finished_reason="stop") == 1
    for reason in ("abort", "error"):
        assert grown("request_success_total", finished_reason=reason) == 0
    counts = dict.fromkeys(HISTOGRAMS, 4) | {
        "inter_token_latency_seconds": 10 - 4,
        "image_fetch_seconds": 0,
        "image_decode_seconds": 3,
        "image_tiling_seconds": 3,
        "image_encode_seconds": 2,  # requests for which the encoder ran
        "iteration_tokens_total": grown("iteration_tokens_total_count"),  # of how many steps does not matter
    }
    computed = sum(usage["prompt_tokens"] for usage in used) - sum(detail["cached_tokens"] for detail in details)
    assert grown("iteration_tokens_total_sum") == computed + 10 - 4, "each token once; the last of an answer is not computed on"
    assert grown("request_prompt_tokens_sum") == grown("prompt_tokens_total") and grown("request_generation_tokens_sum") == 10
    assert grown("request_params_n_sum") == 4 and grown("request_params_max_tokens_sum") == 5 + 3 + 1 + 8
    (labels,) = [dict(labels) for name, labels in after if name == "cache_config_info"]
    assert labels["block_size"] == "16" and int(labels["num_gpu_blocks"]) > 0
    for name, count in counts.items():
        assert grown(f"{name}_count") == grown(f"{name}_bucket", le="+Inf") == count, name
        assert grown(f"{name}_sum") > 0 or count == 0, name
    # two pictures, three times asked for; the prefix cache may hold all of one that was seen, but never the new ones
    queries, hits = grown("mm_cache_queries_total"), grown("mm_cache_hits_total")
    assert queries - hits == 2 and 0 <= hits <= 1
    assert grown("image_encoder_seconds_total") == pytest.approx(grown("image_encode_seconds_sum"))
    assert grown("http_requests_total", **ANSWERED) == 4
    assert grown("http_requests_total", route="/v1/chat/completions", status="400") == 2
    assert grown("http_requests_total", route="/metrics", status="200") == len(scrapes) - 1
    assert value(after, "device_bytes", rank="0", kind="vision_cache") > 0


def test_log_lines_are_json_and_hold_nothing_of_the_client(server: RunningServer) -> None:
    url = "http://192.0.2.7/secret-name.png"
    part = {"type": "image_url", "image_url": {"url": url}}
    bodies: list[Any] = [
        chat("xylophone", user="somebody", max_tokens=2),
        {"messages": [{"role": "user", "content": [part]}]},
        chat("xylophone", model="xylophone"),
    ]
    headers = {"Authorization": "Bearer sk-hidden"}
    address = server.base + "/v1/chat/completions?key=sk-hidden"
    answers = [httpx2.post(address, json=body, headers=headers, timeout=60) for body in bodies]
    assert [answer.status_code for answer in answers] == [200, 400, 404]
    ids = [answer.headers["x-request-id"] for answer in answers]
    assert len(set(ids)) == 3
    odd = httpx2.get(server.base + "/version", headers={"X-Request-Id": "a-b.c:1 forged"})
    assert "forged" not in odd.headers["x-request-id"]

    def lines() -> dict[str, dict[str, Any]]:
        return {line.get("request_id", ""): line for line in map(json.loads, list(server.lines))}

    wait_until(lambda: set(ids) <= set(lines()))
    log = [lines()[id] for id in ids]
    assert [(line["route"], line["status"]) for line in log] == [("/v1/chat/completions", status) for status in (200, 400, 404)]
    assert log[0]["prompt_tokens"] == answers[0].json()["usage"]["prompt_tokens"] and log[0]["seconds"] >= 0
    assert log[0]["finish_reason"] == answers[0].json()["choices"][0]["finish_reason"] and "prompt_tokens" not in log[1]
    for word in ("xylophone", "secret-name", "192.0.2.7", "sk-hidden", "somebody", "forged"):
        assert word not in "".join(server.lines), word
    assert not any("/metrics" in line or "/health" in line for line in server.lines), "asked by machines all the time"


def test_two_routers_count_apart_and_answer_while_loading_and_after_a_failure(
    checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fetched(*arguments: Any) -> bytes:
        return encoded(Image.fromarray(noise(60, 30)), "PNG")

    monkeypatch.setattr("vlserve.media.fetch.Fetcher._fetch", fetched)
    with VLPipeline(str(checkpoint("qwen2")), wait=False, **OPTIONS) as pipe:
        app = FastAPI()
        for name in ("a", "b"):
            app.include_router(vlserve.router(pipe, ServerConfig(served_model_name=name)), prefix=f"/{name}")
        with TestClient(app) as client:

            def figures(name: str) -> Scrape:
                answer = client.get(f"/{name}/metrics")
                assert answer.status_code == 200
                return parse(answer.text, name)

            assert value(figures("a"), "prompt_tokens_total") == 0
            if pipe.client.ready is None:  # as good as always: torch's import alone takes longer
                assert not any(name == "num_requests_running" for name, _ in figures("a"))
            pipe.wait_ready()
            body = chat("hi", max_tokens=3, ignore_eos=True)
            assert client.post("/a/v1/chat/completions", json=body).status_code == 200
            part = {"type": "image_url", "image_url": {"url": "https://pictures.example/x.png"}}
            pipe([{"role": "user", "content": [part]}], max_tokens=2, ignore_eos=True)  # not by HTTP, and still work
            for name, posts in (("a", 1), ("b", 0)):
                found = figures(name)
                assert value(found, "generation_tokens_total") == 5 and value(found, "image_fetch_seconds_count") == 1
                assert value(found, "http_requests_total", route="/v1/chat/completions", status="200") == posts
            asyncio.run(leave_early(pipe))
            found, before = figures("a"), found
            grown = {name: value(found, name) - value(before, name) for name in ("generation_tokens_total", *LATENCIES)}
            assert grown == {"generation_tokens_total": 1, **LATENCIES}
            assert value(found, "request_success_total", finished_reason="abort") == 1
            with monkeypatch.context() as patch, pytest.raises(EngineError, match="broke"):
                patch.setattr(pipe.client, "generate", fails)
                pipe("hi")
            assert value(figures("a"), "request_success_total", finished_reason="error") == 1
            ranks = [p for p in psutil.Process().children() if "vlserve.rank" in " ".join(p.cmdline())]
            max(ranks, key=lambda p: p.create_time()).kill()
            assert client.post("/a/v1/chat/completions", json=chat("hi", max_tokens=400, ignore_eos=True)).status_code == 503
            wait_until(lambda: pipe.client.error is not None)
            found = figures("a")
            assert value(found, "generation_tokens_total") >= 5 and value(found, "num_requests_running") == 0
            assert not any(name == "device_bytes" for name, _ in found), "its memory is gone with it"
            assert value(found, "http_requests_total", route="/v1/chat/completions", status="503") == 1


LATENCIES = {"time_to_first_token_seconds_count": 1, "e2e_request_latency_seconds_count": 0}  # of one that leaves


async def leave_early(pipe: VLPipeline) -> None:
    answer = pipe.astream("hi", max_tokens=400, ignore_eos=True)
    await answer.__anext__()
    await answer.aclose()  # type: ignore[attr-defined]


async def fails(*arguments: Any) -> AsyncIterator[TokenEvent]:
    yield TokenEvent(id=0, token_id=None, finish_reason="error", error="it broke")


class NVMLError(Exception):
    pass


def fake_nvml(**changes: Any) -> types.ModuleType:
    """A driver with two GPUs, of which the second does not tell its utilisation."""

    def utilisation(handle: int) -> Any:
        if handle == 1:
            raise NVMLError("not supported")
        return types.SimpleNamespace(gpu=73, memory=10)

    module = types.ModuleType("pynvml")
    names = {
        "NVMLError": NVMLError,
        "nvmlInit": lambda: None,
        "nvmlDeviceGetCount": lambda: 2,
        "nvmlDeviceGetHandleByIndex": lambda index: index,
        "nvmlDeviceGetUtilizationRates": utilisation,
        "nvmlDeviceGetMemoryInfo": lambda handle: types.SimpleNamespace(used=5 + handle, total=10),
    }
    module.__dict__.update(names | changes)
    return module


def test_gpus_say_what_the_driver_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml())
    assert Gpus().read() == [
        GpuReading(index=0, utilisation=0.73, used_bytes=5, total_bytes=10),
        GpuReading(index=1, utilisation=None, used_bytes=6, total_bytes=10),
    ]


def test_no_library_no_driver_or_a_lost_gpu_is_no_series(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*arguments: Any) -> Any:
        raise NVMLError("driver not loaded")

    for module in (None, fake_nvml(nvmlInit=fails), fake_nvml(nvmlDeviceGetCount=fails)):
        monkeypatch.setitem(sys.modules, "pynvml", module)
        assert Gpus().read() == []
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml(nvmlDeviceGetHandleByIndex=fails))
    assert Gpus().read() == []


class FakePipeline:
    """Of a pipeline, what metrics need before there is an engine."""

    config = types.SimpleNamespace(device="auto")

    def __init__(self, stats: Stats | None = None) -> None:
        self.observers: list[Any] = []
        self.client = types.SimpleNamespace(stats=stats, error=None, ready=None)


def test_the_engines_figures_as_they_are_and_when_it_failed() -> None:
    from vlserve.server.metrics import Metrics

    stats = Stats(
        num_running=3,
        num_waiting=2,
        num_used_blocks=5,
        num_blocks=20,
        prefix_queries=100,
        prefix_hits=40,
        image_queries=7,
        image_hits=6,
        num_preemptions=1,
        encode_s=1.5,
        step_s=9.5,
        comm_s=2.5,
        device_bytes=[{"decoder": 10}, {"decoder": 11, "other": 12}],
    )
    pipeline = FakePipeline(stats)
    metrics = Metrics(pipeline, "tiny")  # type: ignore[arg-type]

    def engines() -> Scrape:
        found = parse(bytes(metrics.expose().body).decode(), "tiny")
        names = {*GAUGES, *(f"{name}_total" for name in list(COUNTERS)[5:])}
        return {key: v for key, v in found.items() if key[0] in names}

    device = {
        ("device_bytes", frozenset({("rank", rank), ("kind", kind)})): v
        for rank, kind, v in (("0", "decoder", 10), ("1", "decoder", 11), ("1", "other", 12))
    }
    counters = {
        "prefix_cache_queries_total": 100,
        "prefix_cache_hits_total": 40,
        "mm_cache_queries_total": 7,
        "mm_cache_hits_total": 6,
        "num_preemptions_total": 1,
        "image_encoder_seconds_total": 1.5,
        "step_seconds_total": 9.5,
        "communication_seconds_total": 2.5,
    }
    gauges = {"num_requests_running": 3, "num_requests_waiting": 2, "kv_cache_usage_perc": 0.25}
    assert engines() == {(name, frozenset()): v for name, v in (counters | gauges).items()} | device
    pipeline.client.error = EngineError("gone")
    assert engines() == {(name, frozenset()): v for name, v in (counters | dict.fromkeys(gauges, 0)).items()}


def gpu_figures(monkeypatch: pytest.MonkeyPatch) -> Scrape:
    from vlserve.server.metrics import Metrics

    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml())
    return parse(bytes(Metrics(FakePipeline(), "tiny").expose().body).decode(), "tiny")  # type: ignore[arg-type]


def test_gpu_series(monkeypatch: pytest.MonkeyPatch) -> None:
    found = gpu_figures(monkeypatch)
    gpu = {(name, dict(labels)["gpu"]): v for (name, labels), v in found.items() if name in GPU_GAUGES}
    assert gpu == {
        ("gpu_utilization_perc", "0"): 0.73,
        ("gpu_memory_used_bytes", "0"): 5,
        ("gpu_memory_used_bytes", "1"): 6,
        ("gpu_memory_total_bytes", "0"): 10,
        ("gpu_memory_total_bytes", "1"): 10,
    }


def queries() -> list[tuple[str, str]]:
    """(panel, PromQL) of the dashboard, its variables and legends too."""
    dashboard = json.loads((EXAMPLES / "monitoring/grafana/dashboards/vlserve.json").read_text())
    found = [(p["title"], t["expr"] + " " + t["legendFormat"]) for p in dashboard["panels"] for t in p.get("targets", ())]
    return found + [("variable", v["definition"]) for v in dashboard["templating"]["list"] if "definition" in v]


def test_the_dashboard_asks_for_series_and_labels_that_exist(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    ask(server)
    live = label_names(scrape(server)) | {
        name: labels for name, labels in label_names(gpu_figures(monkeypatch)).items() if name in GPU_GAUGES
    }
    asked: Counter[str] = Counter()
    for panel, query in queries():
        names = re.findall(r"vlserve:(\w+)", query)
        assert names, f"{panel}: {query}"
        known = set.intersection(*(live.get(name, set()) for name in names)) | {"instance", "job"}  # Prometheus' own
        used = set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)\s*\"", query)) | set(re.findall(r"{{(\w+)}}", query))
        used |= {label.strip() for group in re.findall(r"by \(([^)]*)\)", query) for label in group.split(",")}
        used |= set(re.findall(r"label_values\([^,]+, (\w+)\)", query))
        assert set(names) <= set(live), f"{panel}: {set(names) - set(live)}"
        assert used <= known, f"{panel}: no label {used - known}"
        asked.update(names)
    families = {re.sub(r"_(total|bucket|sum|count)$", "", name) for name in asked}
    families |= FOR_OTHERS
    assert families == {*COUNTERS, *GAUGES, *GPU_GAUGES, *(re.sub("_total$", "", name) for name in HISTOGRAMS)}, (
        "a panel for each"
    )


def test_the_deployment_examples_name_what_the_server_has(server: RunningServer) -> None:
    prometheus = yaml.safe_load((EXAMPLES / "monitoring/prometheus.yml").read_text())
    deployment, service = yaml.safe_load_all((EXAMPLES / "deploy/kubernetes.yaml").read_text())
    container = deployment["spec"]["template"]["spec"]["containers"][0]
    paths = [prometheus["scrape_configs"][0]["metrics_path"]]
    paths += [container[f"{kind}Probe"]["httpGet"]["path"] for kind in ("startup", "readiness", "liveness")]
    assert paths == ["/metrics", "/health", "/health", "/live"]
    assert all(httpx2.get(server.base + path).status_code == 200 for path in paths)
    assert service["spec"]["selector"] == deployment["spec"]["selector"]["matchLabels"]
    from vlserve.commands.main import _parser

    dockerfile = (EXAMPLES / "deploy/Dockerfile").read_text()
    for command in (json.loads(dockerfile.rsplit("CMD ", 1)[1]), container["args"]):
        assert _parser().parse_args(command).host == "0.0.0.0"
    compose = yaml.safe_load((EXAMPLES / "monitoring/docker-compose.yml").read_text())
    for service in compose["services"].values():
        for volume in service.get("volumes", ()):
            source = volume.split(":")[0]
            assert source in compose["volumes"] or source == "./certs" or (EXAMPLES / "monitoring" / source).exists(), source
    for file in (EXAMPLES / "monitoring/grafana/provisioning").rglob("*.yml"):
        assert yaml.safe_load(file.read_text())["apiVersion"] == 1


def test_the_picture_of_a_data_url_is_decoded_and_not_fetched(server: RunningServer) -> None:
    before = eventually(lambda: scrape(server), is_idle)
    part = {"type": "image_url", "image_url": {"url": data_url(Image.fromarray(noise(20, 20, seed=9)))}}
    body = {"messages": [{"role": "user", "content": [part] * 2}], "max_tokens": 1}
    assert httpx2.post(server.base + "/v1/chat/completions", json=body, timeout=60).status_code == 200
    after = eventually(lambda: scrape(server), is_idle)
    for stage, count in (("fetch", 0), ("decode", 2), ("tiling", 2)):
        name = f"image_{stage}_seconds_count"
        assert value(after, name) - value(before, name) == count
    misses = [value(s, "mm_cache_queries_total") - value(s, "mm_cache_hits_total") for s in (before, after)]
    assert misses[1] - misses[0] == 1, "the same picture twice is encoded once"
    assert value(after, "mm_cache_hits_total") - value(before, "mm_cache_hits_total") == 1
