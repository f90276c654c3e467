"""The demo page in a real browser: what a person sees, and what goes over the wire.

Streaming, stopping and refusals are tried against a server that says what the test tells it to; the
answers against vlserve with the model in the box, whatever they are.
"""

from __future__ import annotations

import base64
import json
import os
import queue
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import openai
import psutil
import pytest

from tests.prompt.test_build import copy_of
from tests.server.running import running
from tests.settling import PATIENCE_S, is_alive, wait_until

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-demo/bin/python"  # the page's own environment
if find_spec("playwright") is None:
    pytest.skip("playwright is not installed; the extra `test` has it", allow_module_level=True)
if not PYTHON.exists():
    pytest.skip("the demo page has no environment; `make test` makes it", allow_module_level=True)
if CHROMIUM is None:
    pytest.skip("no browser: neither chromium nor google-chrome is on the PATH", allow_module_level=True)

from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright  # noqa: E402

SHAPES, HEART = ROOT / "examples/pictures/shapes.png", ROOT / "examples/pictures/heart.png"
expect.set_options(timeout=PATIENCE_S * 1000)


class Scripted(ThreadingHTTPServer):
    """A server of one model, `scripted`, that streams what the test says, when the test says it."""

    allow_reuse_address = True
    daemon_threads = True

    def __init__(self, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), _Answer)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.asked: queue.Queue[dict[str, Any]] = queue.Queue()
        self.events: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self.left = threading.Event()
        self.refusal: tuple[int, dict[str, Any]] | None = None
        self._thread = threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    def say(self, *pieces: str) -> None:
        for piece in pieces:
            self.events.put({"choices": [{"index": 0, "delta": {"content": piece}, "finish_reason": None}]})

    def end(self, reason: str = "stop") -> None:
        self.events.put({"choices": [{"index": 0, "delta": {}, "finish_reason": reason}]})
        self.events.put({"choices": [], "usage": {"prompt_tokens": 31, "completion_tokens": 7, "total_tokens": 38}})
        self.events.put(None)

    def request(self) -> dict[str, Any]:
        return self.asked.get(timeout=PATIENCE_S)

    def close(self) -> None:
        self.shutdown()
        self.server_close()
        self._thread.join()


class _Answer(BaseHTTPRequestHandler):
    server: Scripted

    def do_GET(self) -> None:
        self._json(200, {"object": "list", "data": [{"id": "scripted", "object": "model", "created": 0, "owned_by": "us"}]})

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.put(asked | {"key": self.headers["Authorization"]})
        if self.server.refusal is not None:
            return self._json(*self.server.refusal)
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        try:
            while (event := self._next()) is not None:
                chunk = {"id": "x", "object": "chat.completion.chunk", "created": 0, "model": "scripted", **event}
                self.wfile.write(f"data: {json.dumps(chunk)}\n\n".encode())
                if "error" in event:
                    return
            self.wfile.write(b"data: [DONE]\n\n")
        except (BrokenPipeError, ConnectionResetError):
            self.server.left.set()

    def _next(self) -> dict[str, Any] | None:
        while True:
            try:
                return self.server.events.get(timeout=0.05)
            except queue.Empty:
                self.wfile.write(b": still here\n\n")  # fails when the client is not

    def _json(self, status: int, value: dict[str, Any]) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        pass


class Demo:
    """The demo in a process of its own; `page` is its address and `output` what it has printed."""

    def __init__(self, log: Path, *arguments: str, **environment: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.page, self.log = f"http://127.0.0.1:{port}/", log
        with log.open("w") as output:
            self.process = psutil.Popen(
                [str(PYTHON), str(ROOT / "examples/gradio_demo.py"), "--python", sys.executable, "--port", str(port), *arguments],
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=os.environ | environment,
            )

    def wait_for(self, text: str) -> None:
        wait_until(lambda: text in self.output or self.process.poll() is not None, text)
        assert text in self.output, f"the demo ended: {self.output}"

    @property
    def output(self) -> str:
        return self.log.read_text()

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
        try:
            self.process.wait(PATIENCE_S)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)


@contextmanager
def started(log: Path, *arguments: str, **environment: str) -> Iterator[Demo]:
    demo = Demo(log, *arguments, **environment)
    try:
        demo.wait_for("the demo is on")
        yield demo
    finally:
        demo.end()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright, playwright.chromium.launch(executable_path=CHROMIUM) as browser:
        yield browser


@contextmanager
def visit(browser: Browser, demo: Demo) -> Iterator[Page]:
    """The page in a fresh browser window, which may speak to nobody but the demo."""
    with browser.new_page() as page:
        hosts = set()
        page.on("request", lambda request: hosts.add(urlsplit(request.url).hostname))
        page.set_default_timeout(PATIENCE_S * 1000)
        page.goto(demo.page)
        page.get_by_text("How many shapes are there?").wait_for()
        yield page
        assert hosts <= {"127.0.0.1", None}, hosts


@pytest.fixture(scope="module")
def scripted_demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Scripted, Demo]]:
    server = Scripted()
    with started(tmp_path_factory.mktemp("demo") / "log", "--server", server.url, VLSERVE_API_KEY="a key") as demo:
        yield server, demo
    server.close()


@pytest.fixture
def server(scripted_demo: tuple[Scripted, Demo]) -> Scripted:
    return scripted_demo[0]


@pytest.fixture
def page(scripted_demo: tuple[Scripted, Demo], browser: Browser) -> Iterator[Page]:
    with visit(browser, scripted_demo[1]) as page:
        yield page


def ask(page: Page, text: str, *pictures: Path) -> None:
    wait_idle(page)
    box = page.get_by_test_id("textbox")
    if pictures:
        page.get_by_test_id("file-upload").set_input_files(pictures)
        expect(page.locator(".thumbnail-item")).to_have_count(len(pictures))
    box.fill(text)
    page.get_by_test_id("submit-button").click()


def wait_idle(page: Page) -> None:
    """Until Gradio has written the last answer into its history; it then opens the text box."""
    expect(page.get_by_test_id("textbox")).to_be_editable()


def press(page: Page, name: str) -> None:
    wait_idle(page)
    page.get_by_role("button", name=name, exact=True).click()


def move(page: Page, label: str, value: str) -> None:
    """Set a slider by its number; Gradio takes the first try back when the page is still being built."""

    def holds() -> bool:
        page.get_by_label(f"number input for {label}").fill(value)
        page.keyboard.press("Tab")
        page.wait_for_timeout(200)
        return page.get_by_label(f"range slider for {label}").input_value() == value

    wait_until(holds, f"{label} at {value}")


def answers(page: Page) -> Locator:
    return page.get_by_test_id("bot").filter(has_not=page.locator("small, .failure"), has_text=re.compile(r"\S"))


def small_print(page: Page) -> Locator:
    return page.get_by_test_id("bot").locator("small")


def user(text: str, *pictures: Path) -> dict[str, Any]:
    urls = ["data:image/png;base64," + base64.b64encode(picture.read_bytes()).decode() for picture in pictures]
    parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def test_the_answer_grows_and_the_small_print_comes_last(server: Scripted, page: Page) -> None:
    expect(page.get_by_role("heading", name="vlserve: scripted")).to_be_visible()
    ask(page, "Tell me.", SHAPES)
    server.say("Once")
    expect(answers(page)).to_have_text("Once")
    server.say(" upon", " a time")
    expect(answers(page)).to_have_text("Once upon a time")
    expect(small_print(page)).to_have_count(0)
    server.end()
    expect(small_print(page)).to_contain_text("scripted · 31 tokens read, 7 written · ")
    sent = server.request()
    assert sent["messages"] == [user("Tell me.", SHAPES)], "the picture goes out byte for byte"
    assert sent["key"] == "Bearer a key"
    wanted = {"model": "scripted", "temperature": 0, "top_p": 1, "max_tokens": 512, "stream": True}
    assert {key: sent[key] for key in wanted} == wanted and sent.get("seed") is None


def test_a_conversation_with_several_pictures(server: Scripted, page: Page) -> None:
    ask(page, "Which?", SHAPES, HEART)
    server.say("3.")
    server.end("length")
    expect(answers(page)).to_have_text("3.\u2060")  # a bare `3.` would be an empty list
    expect(small_print(page)).to_contain_text("cut off")
    assert server.request()["messages"] == [user("Which?", SHAPES, HEART)]
    ask(page, "And now?", HEART)
    server.say("*This* one.")
    server.end()
    expect(answers(page)).to_have_count(2)
    expect(answers(page).last.locator("em")).to_have_text("This")
    expect(small_print(page)).to_have_count(2)
    conversation = [user("Which?", SHAPES, HEART), assistant("3."), user("And now?", HEART)]
    assert server.request()["messages"] == conversation

    press(page, "Retry")
    server.say("Another.")
    server.end()
    expect(answers(page).last).to_have_text("Another.")
    assert server.request()["messages"] == conversation

    press(page, "Undo")
    expect(answers(page)).to_have_count(1)
    expect(page.get_by_test_id("textbox")).to_have_value("And now?")

    press(page, "Clear")
    expect(answers(page)).to_have_count(0)
    ask(page, "Fresh?")
    server.say("Yes.")
    server.end()
    expect(answers(page)).to_have_text("Yes.")
    assert server.request()["messages"][:-1] == []


def test_stop_ends_the_request_and_the_conversation_goes_on(server: Scripted, page: Page) -> None:
    server.left.clear()
    ask(page, "Talk.")
    server.say("On and", " on")
    expect(answers(page)).to_have_text("On and on")
    page.locator("button.stop-button").click()
    assert server.left.wait(PATIENCE_S), "the demo kept its connection to the server"
    assert server.request()["messages"] == [user("Talk.")]
    ask(page, "Still there?")
    server.say("Yes.")
    server.end()
    expect(answers(page)).to_have_text(["On and on", "Yes."])
    assert server.request()["messages"] == [user("Talk."), assistant("On and on"), user("Still there?")]


def test_the_sliders_are_sent(server: Scripted, page: Page) -> None:
    page.get_by_text("Sampling").click()
    for label, value in (("Max tokens", "12"), ("Top p", "0.9"), ("Temperature", "0.7")):
        move(page, label, value)
    page.get_by_label("Seed", exact=True).fill("5")
    page.keyboard.press("Tab")
    ask(page, "Draw.")
    server.end()
    expect(small_print(page)).to_be_visible()
    sent = server.request()
    wanted = {"temperature": 0.7, "top_p": 0.9, "max_tokens": 12, "seed": 5}
    assert {key: sent[key] for key in wanted} == wanted
    assert isinstance(sent["max_tokens"], int) and isinstance(sent["seed"], int)


def test_what_goes_wrong_is_said_and_does_not_stay_in_the_conversation(server: Scripted, page: Page, tmp_path: Path) -> None:
    def said(text: str) -> None:
        expect(page.locator(".failure").last).to_contain_text(text)

    server.refusal = 400, {"error": {"message": "messages: <i>too</i> long", "type": "invalid_request_error"}}
    ask(page, "Too much?")
    said("messages: <i>too</i> long")
    server.refusal = None
    server.request()

    broken = tmp_path / "broken.png"
    broken.write_text("no picture at all")
    ask(page, "What is it?", broken)
    said("broken.png is no picture")

    large = tmp_path / "large.png"
    large.write_bytes(SHAPES.read_bytes() + bytes(21 * 2**20))
    wait_idle(page)
    page.get_by_test_id("file-upload").set_input_files(large)
    expect(page.get_by_test_id("toast-body")).to_contain_text("maximum allowed size of 20")

    server.events.put({"error": {"message": "the engine failed", "type": "server_error"}})
    ask(page, "And you?")
    said("the engine failed")
    server.request()

    ask(page, "Well?", HEART)
    server.say("A heart.")
    server.end()
    expect(answers(page)).to_have_text("A heart.")
    assert server.request()["messages"] == [user("Well?", HEART)]


def test_a_server_that_is_away_is_named(browser: Browser, tmp_path: Path) -> None:
    server = Scripted()
    with started(tmp_path / "log", "--server", server.url) as demo, visit(browser, demo) as page:
        server.close()
        ask(page, "Anybody there?")
        expect(page.locator(".failure")).to_have_text(re.compile(f"{server.url} does not answer"))
        page.reload()
        expect(page.get_by_test_id("markdown").filter(has_text=f"{server.url} does not answer")).to_be_visible()


def test_answers_equal_the_apis(browser: Browser, tmp_path: Path) -> None:
    questions: list[tuple[str, tuple[Path, ...]]] = [
        ("How many shapes are there?", (SHAPES,)),
        ("Describe the picture.", (HEART,)),
        ("What do you see?", (SHAPES, HEART)),
    ]
    with running("--kv-cache-gib", "0.2") as server, started(tmp_path / "log", "--server", server.base) as demo:
        server.wait_ready()
        with openai.OpenAI(base_url=server.base + "/v1", api_key="none") as api, visit(browser, demo) as page:
            for text, pictures in questions:
                messages: list[Any] = [user(text, *pictures)]
                wanted = api.chat.completions.create(model="demo", messages=messages, max_tokens=512)
                ask(page, text, *pictures)
                usage = wanted.usage
                assert usage is not None
                facts = f"demo · {usage.prompt_tokens} tokens read, {usage.completion_tokens} written"
                expect(small_print(page)).to_contain_text(facts)
                said = answers(page).inner_text().replace("\u2060", "")
                assert said == wanted.choices[0].message.content
                press(page, "Clear")
                expect(answers(page)).to_have_count(0)


@pytest.mark.parametrize("moment,number", [("the demo is on", signal.SIGINT), ("loading: ", signal.SIGTERM)])
def test_its_own_server_ends_with_it(moment: str, number: int, tmp_path: Path, temp: Path) -> None:
    demo = Demo(tmp_path / "log", TMPDIR=str(temp))
    try:
        demo.wait_for(moment)
        children = demo.process.children(recursive=True)
        assert any("vlserve.rank" in " ".join(child.cmdline()) for child in children)
        if moment == "the demo is on":
            demo.wait_for("demo is ready")
        demo.process.send_signal(number)
        assert demo.process.wait(PATIENCE_S) in (0, 128 + number)
        wait_until(lambda: not any(map(is_alive, children)))
        assert "Traceback" not in demo.output and not list(temp.glob("demo-uploads-*"))
    finally:
        demo.end()


def test_a_model_that_cannot_be_served_is_explained(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    damaged = copy_of(checkpoint("qwen2"), tmp_path)
    (damaged / "model.safetensors").write_bytes(b"\xff" * 100)
    for model, message in (("no/such/folder", "no such folder"), (str(damaged), "model.safetensors is damaged")):
        demo = Demo(tmp_path / "log", "--model", model)
        try:
            assert demo.process.wait(PATIENCE_S) == 1
            assert message in demo.output and "Traceback" not in demo.output
        finally:
            demo.end()


def test_wrong_usage_is_explained(tmp_path: Path) -> None:
    demo = Demo(tmp_path / "log", "--server", "localhost:8000")
    assert demo.process.wait(PATIENCE_S) == 2
    assert "--server is 'localhost:8000'; expected a URL" in demo.output
