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
import types
from collections.abc import Sequence
from dataclasses import MISSING, Field, asdict, fields
from importlib import import_module
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import vlserve
from vlserve.config import EngineConfig, MediaConfig, SamplingParams, ServerConfig
from vlserve.errors import ConfigError, VLServeError
from vlserve.migrating import explain_flags
from vlserve.server.admission import KEYS_VARIABLE, read_keys

SAMPLING_FLAGS = ("max_tokens", "temperature", "top_p", "top_k", "seed", "stop")
Config = type[EngineConfig] | type[MediaConfig] | type[ServerConfig] | type[SamplingParams]
COMMANDS: dict[str, dict[str, Config]] = {
    "serve": {"server": ServerConfig, "engine": EngineConfig, "media": MediaConfig},
    "chat": {"sampling": SamplingParams, "engine": EngineConfig, "media": MediaConfig},
    "run": {"sampling": SamplingParams, "engine": EngineConfig, "media": MediaConfig},
}
TOOLS: tuple[str, ...] = ("doctor",)  # modules of vlserve.commands


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, 1 for an error that is explained, 2 for wrong usage."""
    parser = _parser()
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        known = {name: _flags(name) for name in COMMANDS} | {name: [] for name in TOOLS}
        parser.error(explain_flags(unknown, known, options.command))
    try:
        return int(options.run(options))
    except VLServeError as error:
        print(f"vlserve: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 128 + signal.SIGINT


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
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
            _add_flags(sub, title, config)
    return parser


def _flag_fields(config: Config) -> list[Field[Any]]:
    """The fields that have a flag."""
    if config is SamplingParams:
        return [field for field in fields(config) if field.name in SAMPLING_FLAGS]
    return [field for field in fields(config) if field.name != "model" and field.metadata.get("flag", True)]


def _flag(field: Field[Any]) -> str:
    return "--" + field.name.replace("_", "-")


def _flags(command: str) -> list[str]:
    """All flags of a command that are made from fields."""
    return [_flag(field) for config in COMMANDS[command].values() for field in _flag_fields(config)]


def _add_flags(parser: argparse.ArgumentParser, title: str, config: Config) -> None:
    group = parser.add_argument_group(f"{title} options")
    hints = get_type_hints(config)
    for field in _flag_fields(config):
        kind, several = _flag_type(hints[field.name])
        flag, text = _flag(field), field.metadata["help"] + _default_text(field)
        settings: dict[str, Any] = {"dest": field.name, "default": None, "help": text}
        if kind is bool:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, **settings)
        elif several:
            group.add_argument(flag, type=kind, action="append", metavar="TEXT", **settings)
        else:
            choices = field.metadata.get("choices")
            metavar = None if choices else {int: "N", float: "X", str: "TEXT"}[kind]
            group.add_argument(flag, type=kind, choices=choices, metavar=metavar, **settings)


def _default_text(field: Field[Any]) -> str:
    shown = field.default is not MISSING and field.default not in (None, (), "")
    return f" (default: {field.default})" if shown else ""


def _flag_type(hint: Any) -> tuple[type, bool]:
    """(type of one value, whether the flag may come several times)."""
    if get_origin(hint) in (Union, types.UnionType):
        hint = next(arm for arm in get_args(hint) if arm is not type(None))
    if get_origin(hint) is tuple:
        return get_args(hint)[0], True
    return hint, False


def _given(options: argparse.Namespace, *configs: Config) -> dict[str, Any]:
    values = {field.name: getattr(options, field.name, None) for config in configs for field in fields(config)}
    return {name: value for name, value in values.items() if value is not None}


def _serve(options: argparse.Namespace) -> int:
    keys = read_keys(options.api_key_file, os.environ.get(KEYS_VARIABLE))
    config = ServerConfig(**_given(options, ServerConfig), api_keys=keys)
    _check_address(config.host, config.port)
    from vlserve.pipeline import VLPipeline

    pipeline = VLPipeline(wait=False, **_given(options, EngineConfig, MediaConfig))
    from vlserve.server.serve import serve

    return serve(pipeline, config)


def _check_address(host: str, port: int) -> None:
    """Before a model is loaded: whether the address can be listened on."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise ConfigError(f"cannot listen on {host} port {port}: {error.strerror}; give another --host or --port") from None


def _run(options: argparse.Namespace) -> int:
    sampling = SamplingParams(**_given(options, SamplingParams))
    from vlserve.pipeline import VLPipeline

    with VLPipeline(**_given(options, EngineConfig, MediaConfig)) as pipeline:
        prompt = (options.prompt, options.image) if options.image else options.prompt
        if options.json:
            print(json.dumps(asdict(pipeline(prompt, sampling=sampling)), ensure_ascii=False))
            return 0
        for delta in pipeline.stream(prompt, sampling=sampling):
            print(delta.text, end="", flush=True)
        print()
    return 0


def _chat(options: argparse.Namespace) -> int:
    sampling = SamplingParams(**_given(options, SamplingParams))
    from vlserve.pipeline import VLPipeline

    with VLPipeline(**_given(options, EngineConfig, MediaConfig)) as pipeline:
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
            if path.startswith(("http://", "https://")) or Path(path).expanduser().is_file():
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
