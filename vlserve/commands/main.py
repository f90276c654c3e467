"""The command line. Flags are made from the configuration's fields, so each exists once.

Starting is quick on purpose: the engine's process is started before the web framework is imported.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import sys
from collections.abc import Sequence
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

import vlserve
from vlserve.commands.console import Parser, argument_text, knows_unicode, use_what_the_console_has
from vlserve.commands.flags import Config, add_flags, flag_fields, flag_name, given
from vlserve.config import EngineConfig, MediaConfig, SamplingParams, ServerConfig, read_options
from vlserve.errors import ConfigError, VLServeError
from vlserve.migrating import explain_flags
from vlserve.ranks.torchrun_slurm import find_machine
from vlserve.server.admission import KEYS_VARIABLE, read_keys
from vlserve.system_limits import describe, find_refusal, raise_open_files

COMMANDS: dict[str, dict[str, Config]] = {
    "serve": {"server": ServerConfig, "engine": EngineConfig, "media": MediaConfig},
    "chat": {"sampling": SamplingParams, "engine": EngineConfig, "media": MediaConfig},
    "run": {"sampling": SamplingParams, "engine": EngineConfig, "media": MediaConfig},
}
TOOLS: tuple[str, ...] = ("plan", "doctor", "shard", "quantize", "convert", "bench")  # modules of vlserve.commands


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, 1 for an error that is explained, 2 for wrong usage."""
    raise_open_files()
    use_what_the_console_has()
    parser = _parser()
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        known = {name: _flags(name) for name in COMMANDS} | {name: [] for name in TOOLS}
        parser.command = options.command
        parser.error(explain_flags(unknown, known, options.command))
    try:
        status = int(options.run(options))
        sys.stdout.flush()
        return status
    except VLServeError as error:
        print(f"vlserve: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:  # who read the output has enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still to be flushed goes there
        return 128 + signal.SIGPIPE
    except Exception as error:
        if find_refusal(error) is None:
            raise
        print(f"vlserve: error: {describe(error)} ({error})", file=sys.stderr)
        return 1


def _parser() -> Parser:
    parser = Parser(
        prog="vlserve",
        description="Serve and ask vision-language models.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,  # --api-key, of other servers, would be --api-key-file
    )
    parser.add_argument("--version", action="version", version=f"vlserve {vlserve.__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND", dest="command")

    def command(name: str, run: Any, help: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help, description=help, allow_abbrev=False)
        sub.add_argument(
            "model", nargs="?", default="demo", metavar="MODEL", help=EngineConfig.__dataclass_fields__["model"].metadata["help"]
        )
        sub.set_defaults(run=run)
        return sub

    command("serve", _serve, "Start an OpenAI-compatible HTTP server.")
    command("chat", _chat, "Talk to a model in the terminal; /image PATH adds a picture.")
    run = command("run", _run, "Ask one question and print the answer.")
    run.add_argument("--prompt", required=True, help="the question")
    run.add_argument(
        "--image", action="append", default=[], metavar="PATH", help="a picture: path or URL; may be given several times"
    )
    run.add_argument("--json", action="store_true", help="print one JSON document with text, tokens, usage and timing")
    for name in TOOLS:
        tool = import_module(f"vlserve.commands.{name}")
        sub = commands.add_parser(name, help=tool.HELP, description=tool.HELP, allow_abbrev=False)
        tool.add_arguments(sub)
        sub.set_defaults(run=tool.run)
    for name in COMMANDS:
        sub = commands.choices[name]
        for title, config in COMMANDS[name].items():
            add_flags(sub, title, config)
    return parser


def _flags(command: str) -> list[str]:
    """All flags of a command that are made from fields."""
    return [flag_name(field) for config in COMMANDS[command].values() for field in flag_fields(config)]


def _serve(options: argparse.Namespace) -> int:
    keys = read_keys(options.api_key_file, os.environ.get(KEYS_VARIABLE))
    config = ServerConfig(**given(options, ServerConfig), api_keys=keys)
    settings = given(options, EngineConfig, MediaConfig)
    machine = find_machine(os.environ)
    if machine is not None:
        if machine.local_rank > 0:
            print(f"vlserve: {machine.launcher} started several processes here; the first starts all ranks, this one ends")
            return 0
        settings = {"nnodes": machine.nnodes, "node_rank": machine.node_rank, "rdzv_endpoint": machine.rdzv_endpoint} | settings
    engine, _ = read_options(settings)
    if engine.node_rank > 0:
        return _run_worker_node(engine, config)
    _check_address(config.host, config.port)
    from vlserve.pipeline.vl_pipeline import VLPipeline

    pipeline = VLPipeline(wait=False, **settings)
    from vlserve.server.serve import serve

    return serve(pipeline, config)


def _run_worker_node(engine: EngineConfig, config: ServerConfig) -> int:
    from vlserve.ranks.worker_node import run_worker_node
    from vlserve.server.logs import configure_logging

    configure_logging(config)
    return run_worker_node(engine)


def _check_address(host: str, port: int) -> None:
    """Before a model is loaded: whether the address can be listened on."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        if find_refusal(error) is not None:
            raise
        raise ConfigError(f"cannot listen on {host} port {port}: {error.strerror}; give another --host or --port") from None


def _run(options: argparse.Namespace) -> int:
    sampling = SamplingParams(**given(options, SamplingParams))
    for path in options.image:
        if not _is_there(path):  # said before a model is loaded
            raise ConfigError(f"cannot read {path}: no such file")
    from vlserve.pipeline.vl_pipeline import VLPipeline

    with VLPipeline(**given(options, EngineConfig, MediaConfig)) as pipeline:
        text = argument_text(options.prompt)
        prompt = (text, options.image) if options.image else text
        if options.json:
            print(json.dumps(asdict(pipeline(prompt, sampling=sampling)), ensure_ascii=not knows_unicode(sys.stdout)))
            return 0
        for delta in pipeline.stream(prompt, sampling=sampling):
            print(delta.text, end="", flush=True)
        print()
    return 0


def _is_there(picture: str) -> bool:
    """Whether it is a file; URLs are not looked at."""
    return picture.lower().startswith(("http://", "https://", "data:", "file:")) or Path(picture).expanduser().is_file()


def _chat(options: argparse.Namespace) -> int:
    sampling = SamplingParams(**given(options, SamplingParams))
    from vlserve.pipeline.vl_pipeline import VLPipeline

    with VLPipeline(**given(options, EngineConfig, MediaConfig)) as pipeline:
        print(f"{pipeline.config.model}. /image PATH adds a picture to your next message, /clear starts over, /quit ends.")
        _talk(pipeline, sampling)
    return 0


def _talk(pipeline: Any, sampling: SamplingParams) -> None:
    messages: list[dict[str, Any]] = []
    pictures: list[dict[str, Any]] = []
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            print()
            return
        word, _, rest = line.partition(" ")
        if word in ("/quit", "/exit"):
            return
        if word == "/clear":
            messages, pictures = [], []
        elif word == "/image":
            path = rest.strip()
            if _is_there(path):
                pictures.append({"type": "image", "image": path})
            else:
                print(f"no such file: {path!r}")
        elif word.startswith("/"):
            print("commands: /image PATH, /clear, /quit")
        elif line:
            question = {"role": "user", "content": [*pictures, {"type": "text", "text": line}]}
            answer = _say(pipeline, [*messages, question], sampling)
            if answer is not None:
                messages += [question, {"role": "assistant", "content": answer}]
                pictures = []


def _say(pipeline: Any, messages: list[dict[str, Any]], sampling: SamplingParams) -> str | None:
    """Print the answer as it comes; None when it failed or was broken off with Ctrl-C."""
    text = ""
    try:
        for delta in pipeline.stream(messages, sampling=sampling):
            text += delta.text
            print(delta.text, end="", flush=True)
        print()
        return text
    except KeyboardInterrupt:
        print("\n(broken off)")
    except VLServeError as error:
        print(f"error: {error}")
    return None


if __name__ == "__main__":
    sys.exit(main())
