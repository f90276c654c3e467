"""Copies of a model behind Ray Serve: one address, OpenAI's API, replicas that come with the load and are replaced when they die.

    python examples/ray_serve.py                                        # one to two copies of the model in the box
    python examples/ray_serve.py MODEL --tp 2 --min-replicas 2 --max-replicas 4   # copies of two GPUs each

Needs Ray beside vlserve; in a virtual environment:
    pip install -c constraints.txt -c examples/ray_constraints.txt -e . 'ray[serve]'

A replica is a process (a Ray actor) with a `VLPipeline`, which has ranks of its own: processes that see the same GPUs, those
that Ray has given to the replica through CUDA_VISIBLE_DEVICES. Ray keeps requests that find no room, sends each to a replica
with few, and watches the replicas. What happens to a request when its replica dies:

* The replica had not taken it: Ray gives it to another one.
* The replica had taken it: it fails at once and Ray does not repeat it; the client may. If the replica's own process died, it
  is a 500 in plain text, or a stream that breaks off. If the engine died (a rank), it is mostly a 503 with Retry-After, or an
  error event in a stream. Until that is noticed (0.2 s) and the replica has ended itself, it goes on taking requests, which
  fail too, the last of them with a 500.

Another replica takes the place as soon as a health check has found the process gone and the model is loaded.

SIGTERM lets open requests end, Ctrl-C does not. SIGTERM is for this script alone: under systemd, KillMode=mixed, since Ray's
processes end at once by it. If the script is killed (SIGKILL), Ray's processes notice after a minute.

Ports: the API's (--port), which also has Ray's /-/healthz and /-/routes, open to all. Ray's own processes listen on some fifteen
ports that the system chooses, on the loopback address, but for one of each replica that Ray opens on all addresses: let a
firewall keep it from others. All of them ask for the token in ~/.ray/auth_token; whoever has it can run code. With the variable
RAY_ADDRESS the replicas go to a cluster that runs already (vlserve on each machine), which belongs into a closed network.
Ray's dashboard is off. /metrics is of the replica that happens to answer.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # nothing is sent to anybody
os.environ["RAY_AUTH_MODE"] = os.environ.get("RAY_AUTH_MODE", "token")
# Ray's name for whether it may be reached from other machines: a Ray for this machine alone listens on loopback
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "1" if os.environ.get("RAY_ADDRESS") else "0"

import ray
from fastapi import FastAPI
from ray import serve
from ray.serve.config import AutoscalingConfig, BackpressureConfig

from vlserve import VLPipeline, VLServeError
from vlserve.config import ServerConfig, read_options
from vlserve.models.checkpoint import find_checkpoint
from vlserve.server.admission import KEYS_VARIABLE, read_keys
from vlserve.server.app import create_app
from vlserve.server.logs import configure_logging

APP = "vlserve"
CLUSTER = os.environ.get("RAY_ADDRESS")  # to join; Ray's own variable
LAST_WORDS_S = 3  # for open requests to be told, once the engine is gone
FLUSH_S = 0.05  # for what they were told to leave the process


@serve.deployment
@serve.ingress()
class Replica:
    """One copy of the model and the whole API for it."""

    def __init__(self, options: dict[str, Any], config: ServerConfig) -> None:
        configure_logging(config)
        self.config, self.num_open = config, 0
        self.pipeline = VLPipeline(**options)
        self.pipeline.client.on_failure = lambda error: self.end()
        if self.pipeline.client.error is not None:  # it failed before we listened to it
            raise self.pipeline.client.error

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Asked for by Ray when the pipeline is there; the app closes it when the replica is told to end."""
        app = create_app(self.pipeline, self.config)
        app.add_middleware(NamedReplica, replica=self)
        return app

    def check_health(self) -> None:
        """Asked by Ray every --health-check-s; three errors in a row, or a process that is gone, and Ray starts another."""
        client = self.pipeline.client
        if client.error is not None:
            raise client.error
        if client.is_overdue:
            raise RuntimeError("the running step takes longer than it may")

    def end(self) -> None:
        """A replica without engine ends itself: Ray would send it requests until three health checks have failed."""
        threading.Thread(target=self._end, name="replica-end").start()

    def _end(self) -> None:
        self.pipeline.close()  # ranks that hang are killed; their GPUs are free before the next replica comes
        deadline = time.monotonic() + LAST_WORDS_S
        while self.num_open and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(FLUSH_S)
        os._exit(1)


class NamedReplica:
    """ASGI middleware: counts a replica's open requests, and says who answers in the header x-replica-id."""

    def __init__(self, app: Any, replica: Any) -> None:
        self.app, self.replica = app, replica
        self.header = (b"x-replica-id", serve.get_replica_context().replica_id.unique_id.encode())

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def named(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":  # Ray's proxy adds the request's id itself
                message["headers"] = [*(h for h in message["headers"] if h[0] != b"x-request-id"), self.header]
            await send(message)

        self.replica.num_open += 1
        try:
            await self.app(scope, receive, named)
        finally:
            self.replica.num_open -= 1


def main() -> None:
    options = parse()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs would ignore it
    try:
        start_ray(options)
        signal.signal(signal.SIGTERM, terminate)  # after Ray has set its own
        deploy(options)
        print(f"listening on http://{options.host}:{options.port} (Ctrl-C ends it)", flush=True)
        threading.Event().wait()
    except KeyboardInterrupt:
        print("ending", flush=True)
    except Terminated:
        print(f"ending; open requests have {options.drain_seconds:g} s", flush=True)
        delete(options.drain_seconds)
    finally:
        if CLUSTER and ray.is_initialized():
            delete(0)
        ray.shutdown()  # a Ray of our own ends with all its processes


def start_ray(options: argparse.Namespace) -> None:
    """Join the cluster, or start one on this machine that nobody else reaches, and see whether the replicas fit."""
    ray.init() if CLUSTER else ray.init(include_dashboard=False)
    there = ray.cluster_resources()
    if options.gpus_per_rank is None:
        options.gpus_per_rank = 1 if there.get("GPU") else 0
    if CLUSTER:
        return  # it may grow
    for name, wanted in (("CPU", options.tp * options.cpus_per_rank), ("GPU", options.tp * options.gpus_per_rank)):
        for number in {options.min_replicas, options.max_replicas}:
            if number * wanted > there.get(name, 0):
                message = f"{number} replicas of {wanted:g} {name} need {number * wanted:g}; there are {there.get(name, 0):g}"
                if number == options.min_replicas:
                    sys.exit(f"{message}. Give fewer --min-replicas, --tp or --{name.lower()}s-per-rank")
                print(f"warning: {message}, so that there will never be as many", file=sys.stderr)


def deploy(options: argparse.Namespace) -> None:
    """Start the API's port and the replicas; returns when as many as there must be have loaded the model."""
    room = options.engine.max_num_seqs
    device = {} if options.engine.device != "auto" else {"device": "cuda" if options.gpus_per_rank else "cpu"}
    threads = {"threads": options.engine.threads or max(1, int(options.cpus_per_rank))}
    deployment = Replica.options(
        ray_actor_options={"num_cpus": options.tp * options.cpus_per_rank, "num_gpus": options.tp * options.gpus_per_rank},
        max_ongoing_requests=room,  # what goes beyond waits with Ray, where a new replica can take it
        max_queued_requests=options.max_queue,
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=1),
        autoscaling_config=AutoscalingConfig(
            min_replicas=options.min_replicas,
            max_replicas=options.max_replicas,
            target_ongoing_requests=options.target_ongoing_requests or room / 2,
            upscale_delay_s=options.upscale_delay_s,
            downscale_delay_s=options.downscale_delay_s,
            metrics_interval_s=1,
            look_back_period_s=max(2.0, min(30.0, options.upscale_delay_s)),
        ),
        health_check_period_s=options.health_check_s,
        health_check_timeout_s=max(5.0, 2 * options.health_check_s),
        graceful_shutdown_timeout_s=options.drain_seconds,
        graceful_shutdown_wait_loop_s=0.5,
        max_constructor_retry_count=2,
    )
    keys = read_keys(options.api_key_file, os.environ.get(KEYS_VARIABLE))
    config = ServerConfig(served_model_name=options.served_model_name or options.model, api_keys=keys)
    serve.start(proxy_location="HeadOnly", http_options={"host": options.host, "port": options.port})
    application = deployment.bind(options.values | device | threads, config)
    try:
        serve.run(application, name=APP, logging_config={"enable_access_log": False})  # the routes write their own
    except RuntimeError as error:
        sys.exit(f"the replicas do not start: {error}")


def delete(wait: float) -> None:
    """End the replicas once they have answered; waits in a thread, since without Ray's processes the call never returns."""
    work = threading.Thread(target=serve.delete, args=(APP,), daemon=True)
    work.start()
    work.join(wait + LAST_WORDS_S)


class Terminated(BaseException):
    """SIGTERM came."""


def terminate(number: int, frame: Any) -> None:
    raise Terminated


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Formatter, allow_abbrev=False)
    add = parser.add_argument
    add("model", nargs="?", default="demo", metavar="MODEL", help="demo, a folder, or a Hugging Face name")
    add("--tp", type=int, default=1, metavar="N", help="ranks of one replica: devices that share the language model")
    add("-o", "--option", action="append", default=[], metavar="NAME=VALUE", help="any other option of VLPipeline, as often as "
        "you like, such as -o kv_cache_gib=8 -o max_num_seqs=128")  # fmt: skip
    add("--served-model-name", metavar="TEXT", help="the model's id in the API; default: MODEL as typed")
    add("--api-key-file", metavar="PATH", help=f"file with one API key a line; the variable {KEYS_VARIABLE} has them with commas")
    group = parser.add_argument_group("replicas")
    add = group.add_argument
    add("--min-replicas", type=int, default=1, metavar="N", help="replicas that there are always")
    add("--max-replicas", type=int, metavar="N", help="replicas that there may be under load; default: 2, or --min-replicas")
    add("--target-ongoing-requests", type=float, metavar="X", help="requests, running and waiting, for which there shall be one "
        "replica; default: half of max_num_seqs, the requests in one step (32)")  # fmt: skip
    add("--upscale-delay-s", type=float, default=10, metavar="X", help="seconds of load before a replica is added")
    add("--downscale-delay-s", type=float, default=300, metavar="X", help="seconds without load before one is ended")
    add(
        "--drain-seconds",
        type=float,
        default=30,
        metavar="X",
        help="seconds for open requests when a replica ends, and on SIGTERM",
    )
    add("--health-check-s", type=float, default=5, metavar="X", help="seconds between two health checks of a replica")
    add("--max-queue", type=int, default=512, metavar="N", help="requests that may wait for a replica; more get status 429")
    group = parser.add_argument_group("machine")
    add = group.add_argument
    add("--host", default="127.0.0.1", help="address of the API")
    add("--port", type=int, default=8000, help="port of the API")
    add("--cpus-per-rank", type=float, default=1, metavar="X", help="CPU cores that Ray keeps for a rank, and its threads")
    add("--gpus-per-rank", type=float, metavar="X", help="GPUs that Ray keeps for a rank; default: 1 where there are. A part of "
        "one, such as 0.5, needs -o gpu_memory_utilization=0.45 and --tp 1")  # fmt: skip
    options = parser.parse_args()
    options.max_replicas = options.max_replicas or max(2, options.min_replicas)
    if not 1 <= options.min_replicas <= options.max_replicas:
        parser.error(f"--min-replicas is {options.min_replicas}; expected 1 to --max-replicas {options.max_replicas}")
    if options.gpus_per_rank not in (None, 0, 1) and (options.tp > 1 or not 0 < options.gpus_per_rank < 1):
        parser.error(f"--gpus-per-rank is {options.gpus_per_rank:g}; expected 0, 1, or with --tp 1 a part of one")
    if not can_listen(options.host, options.port):
        parser.error(f"cannot listen on {options.host} port {options.port}; give another --host or --port")
    try:
        model = str(Path(options.model).resolve()) if Path(options.model).is_dir() else options.model  # Ray works elsewhere
        options.values = {"model": model, "tp": options.tp, **dict(map(read_option, options.option))}
        options.engine, _ = read_options(options.values)
        if not CLUSTER:  # said, or downloaded, once, and before Ray starts
            find_checkpoint(options.engine)
    except (VLServeError, ValueError) as error:
        parser.error(str(error))
    return options


def read_option(text: str) -> tuple[str, Any]:
    """NAME=VALUE, the value in JSON or else a text."""
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"--option is {text!r}; expected NAME=VALUE")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def can_listen(host: str, port: int) -> bool:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError:
        return False
    return True


class Formatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """The text above as it is, and each flag's default."""


if __name__ == "__main__":
    main()
