"""`VLPipeline`: pictures and text in, text out, from Python; here, or over the network."""

from __future__ import annotations

from typing import Any

from vlserve.pipeline.local import LocalPipeline
from vlserve.pipeline.remote import RemotePipeline


class VLPipeline(LocalPipeline):
    """A vision-language model, ready to be asked.

        pipe = VLPipeline("demo")
        pipe(("What shape is it?", "picture.png"), max_tokens=16).text

    Args:
        model: demo, a folder, or a Hugging Face name. Other keywords are the fields of `EngineConfig` and
            `MediaConfig`. Or the address of a server, http://host:port: then the calls below go to it, and the
            keywords are `api_key` and those of `RemotePipeline`.
        wait: False returns before the engine is ready; asking before then raises EngineError.

    A prompt is a text, (text, picture), (text, [pictures]), OpenAI-style messages, or a list of these.
    Pictures are PIL images, paths, URLs, data URLs, bytes or uint8 arrays.

    Raises ConfigError for a wrong option, ModelError for a checkpoint that cannot be used.
    """

    def __new__(cls, model: str = "demo", **options: Any) -> VLPipeline:
        if cls is VLPipeline and str(model).lower().startswith(("http://", "https://")):
            return RemotePipeline(model, **options)  # type: ignore[return-value]  # registered below
        return object.__new__(cls)


VLPipeline.register(RemotePipeline)  # for isinstance: the same calls and results
