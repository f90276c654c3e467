"""A chat with pictures in the browser, over the OpenAI-compatible API of a server.

    python examples/gradio_demo.py                                 # starts a server with the model in the box
    python examples/gradio_demo.py --server http://127.0.0.1:8000  # talks to one that runs already

Needs the extra `demo` (`pip install 'vlserve[demo]'`); `make demo` does it all. Speaks to the server and to nobody else.
"""

from __future__ import annotations

import argparse
import base64
import html
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

import gradio as gr
import httpx2
import openai
from PIL import Image

Turn = dict[str, Any]
PICTURES = Path(__file__).parent / "pictures"
EXAMPLES = (
    ("How many shapes are there?", "shapes.png"),
    ("Describe the picture.", "shapes.png"),
    ("What colour is the heart?", "heart.png"),
    ("Which bar is the tallest?", "chart.png"),
    ("写的是什么？", "word.png"),
)
MAX_PICTURE = "20mb"  # in base64 and with the rest of a conversation, a request still fits into what servers take
JOINER = "\u2060"  # no width, no meaning
CSS = """
.message img { max-height: 12rem }
.message small { opacity: 0.6 }
.message .failure { color: #c2410c }
button[aria-label="Share"] { display: none } /* it would put the picture on a public site */
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", metavar="URL", help="the server to talk to; default: start one")
    parser.add_argument("--api-key", metavar="KEY", help="the server's key; default: VLSERVE_API_KEY from the environment")
    parser.add_argument("--python", default=sys.executable, help="the Python that has vlserve, to start a server (default: this)")
    parser.add_argument("--model", help="the model to serve (default: demo), or with --server to ask for (default: its first)")
    parser.add_argument("--host", default="127.0.0.1", help="address of the page (default: %(default)s)")
    parser.add_argument("--port", type=int, default=7860, help="port of the page (default: %(default)s)")
    options = parser.parse_args()
    if options.server and not options.server.startswith(("http://", "https://")):
        parser.error(f"--server is {options.server!r}; expected a URL such as http://127.0.0.1:8000")
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs would ignore it
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    key = options.api_key or os.environ.get("VLSERVE_API_KEY") or secrets.token_urlsafe()
    server = nullcontext(options.server) if options.server else serving(options.python, options.model or "demo", key)
    with tempfile.TemporaryDirectory(prefix="demo-uploads-") as uploads, server as url:
        os.environ["GRADIO_TEMP_DIR"] = uploads
        show(Chat(url, key, options.model if options.server else None).page(), options.host, options.port)


@contextmanager
def serving(python: str, model: str, key: str) -> Iterator[str]:
    """A server with `model` on a free port: its address, once it is ready. Ends with the block."""
    command = [python, "-m", "vlserve", "serve", model, "--port", "0"]
    environment = os.environ | {"VLSERVE_API_KEYS": key}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        yield wait_ready(process)
    finally:
        process.terminate()
        process.wait()


def wait_ready(process: subprocess.Popen[str]) -> str:
    """The server's address, after it has loaded its model; what it says and the stages go to the terminal."""
    assert process.stderr is not None
    address = stage = None
    for line in process.stderr:
        sys.stderr.write(line)
        if listening := re.search(r"listening on (http://\S+)", line):
            address = listening[1]
            break
    echo = threading.Thread(target=sys.stderr.writelines, args=(process.stderr,), daemon=True)
    echo.start()
    while address and process.poll() is None:
        with suppress(httpx2.TransportError):  # it may be ending
            health = httpx2.get(address + "/health", trust_env=False)
            if health.status_code == 200:
                return address
            if stage != (stage := health.json().get("stage", stage)):
                print(f"loading: {stage}", file=sys.stderr)
        time.sleep(0.1)
    echo.join(timeout=5)
    sys.exit(f"the server ended with status {process.wait()}")


def show(page: gr.Blocks, host: str, port: int) -> None:
    """Serve the page until Ctrl-C."""
    try:
        _, address, _ = page.launch(
            server_name=host,
            server_port=port,
            share=False,
            max_file_size=MAX_PICTURE,
            run_history=False,
            css=CSS,
            footer_links=["gradio", "settings"],
            prevent_thread_lock=True,
            quiet=True,
        )
    except OSError:
        sys.exit(f"{host}:{port} cannot be used for the page; choose another --port")
    print(f"the demo is on {address} (Ctrl-C ends it)", flush=True)
    page.block_thread()


class Chat:
    """The page, and the conversation behind it: Gradio keeps the history, the API answers."""

    def __init__(self, url: str, api_key: str, model: str | None) -> None:
        self.url, self.model = url.rstrip("/").removesuffix("/v1"), model
        self.client = openai.AsyncOpenAI(base_url=self.url + "/v1", api_key=api_key, max_retries=0)

    def page(self) -> gr.Blocks:
        settings: list[Any] = [
            gr.Slider(0, 2, 0, step=0.05, label="Temperature", info="0 takes the likeliest token"),
            gr.Slider(0.05, 1, 1, step=0.05, label="Top p", info="1 draws among all tokens"),
            gr.Slider(1, 4096, 512, step=1, label="Max tokens", info="of the answer"),
            gr.Number(None, precision=0, label="Seed", info="makes the draws repeatable"),
        ]
        box = gr.MultimodalTextbox(
            file_types=["image"],
            file_count="multiple",
            placeholder="Ask something; add pictures with the paper clip, by dropping them here, or from the clipboard",
            max_plain_text_length=10**9,  # a long text stays a text
            stop_btn=True,
            autofocus=True,
        )
        with gr.Blocks(title="vlserve", fill_height=True) as page:
            page.load(self.heading, outputs=gr.Markdown(), show_progress="hidden")
            gr.ChatInterface(
                self.answer,
                multimodal=True,
                chatbot=gr.Chatbot(show_label=False, height="max(20rem, 100vh - 18rem)", buttons=["copy"], allow_tags=False),
                textbox=box,
                examples=[[{"text": text, "files": [str(PICTURES / name)]}] for text, name in EXAMPLES],
                cache_examples=False,
                additional_inputs=settings,
                additional_inputs_accordion=gr.Accordion("Sampling", open=False, render=False),
                concurrency_limit=None,
                api_visibility="private",
            )
        return page

    async def heading(self) -> str:
        try:
            return f"## vlserve: {html.escape(await self.model_name())}"
        except openai.APIError as error:
            return f"## vlserve\n{html.escape(self.explain(error))}"

    async def model_name(self) -> str:
        return self.model or (await self.client.models.list()).data[0].id

    async def answer(
        self, message: Turn, history: list[Turn], temperature: float, top_p: float, max_tokens: int, seed: int | None
    ) -> AsyncIterator[Turn]:
        """The answer as it grows, and below it what it took, or what went wrong."""
        text, usage, reason, begin = "", None, None, time.perf_counter()
        try:
            messages: list[Any] = [*conversation(history), question(message["text"], message["files"])]
            model = await self.model_name()
            stream = await self.client.chat.completions.create(
                model=model,
                messages=messages,
                temperature=temperature,
                top_p=top_p,
                max_tokens=int(max_tokens),
                seed=seed,
                stream=True,
                stream_options={"include_usage": True},
            )
            async with stream:
                async for chunk in stream:
                    usage = chunk.usage or usage
                    for choice in chunk.choices:
                        text += choice.delta.content or ""
                        reason = choice.finish_reason or reason
                        yield {"content": [as_markdown(text)]}
        except (openai.APIError, ValueError) as error:
            yield {"content": [as_markdown(text), f"<div class='failure'>{html.escape(self.explain(error))}</div>"]}
            return
        facts = [html.escape(model), f"{time.perf_counter() - begin:.2f} s"]
        if usage is not None:
            facts.insert(1, f"{usage.prompt_tokens} tokens read, {usage.completion_tokens} written")
        if reason == "length":
            facts.append("cut off: no tokens left")
        yield {"content": [as_markdown(text), f"<small>{' · '.join(facts)}</small>"]}

    def explain(self, error: Exception) -> str:
        if isinstance(error, openai.APIConnectionError):
            return f"{self.url} does not answer: the server is away or still starting."
        body = error.body if isinstance(error, openai.APIError) else None
        return str(body["message"] if isinstance(body, dict) and "message" in body else error)


def conversation(history: list[Turn]) -> Iterator[Turn]:
    """What was said so far, in the API's form; a question that got no answer is left out."""
    for asked, answered in pairwise(history):
        if (asked["role"], answered["role"]) == ("user", "assistant"):
            parts, answer = asked["content"], answered["content"][0]["text"].replace(JOINER, "")
            if answer:
                files = [part["file"] for part in parts if part["type"] == "file"]
                yield question("".join(part["text"] for part in parts if part["type"] == "text"), files)
                yield {"role": "assistant", "content": answer}


def question(text: str, files: Iterable[str | dict[str, Any]]) -> Turn:
    """A user's turn in the API's form. Gradio names a file by its path, and in what it keeps by a dict with the path."""
    paths = [Path(file["path"] if isinstance(file, dict) else file) for file in files]
    pictures = [{"type": "image_url", "image_url": {"url": data_url(path)}} for path in paths]
    return {"role": "user", "content": [*pictures, *([{"type": "text", "text": text}] if text else [])]}


def as_markdown(text: str) -> str:
    """The text with a mark where Markdown would take a line such as `3.` for an empty item of a list and show nothing."""
    return re.sub(r"^(\s*\d+[.)])[ \t]*$", rf"\1{JOINER}", text, flags=re.MULTILINE)


def data_url(path: Path) -> str:
    """The file as it is; its content, not its name, says what it is."""
    try:
        with Image.open(path) as picture:
            media_type = picture.get_format_mimetype()
    except (OSError, Image.DecompressionBombError):
        raise ValueError(f"{path.name} is no picture that could be read") from None
    return f"data:{media_type};base64,{base64.b64encode(path.read_bytes()).decode()}"


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:  # while the server was starting
        sys.exit(128 + signal.SIGINT)
