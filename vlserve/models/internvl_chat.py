"""InternVL in OpenGVLab's own format (`model_type: internvl_chat`): the same models under other names, keys and pixels.

The code that such checkpoints bring is never run. Sources: modeling_internvl_chat.py and conversation.py of
github.com/OpenGVLab/InternVL.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vlserve.llm.config import DecoderConfig
from vlserve.llm.config_readers import is_tied, read_decoder_config
from vlserve.models.architecture import Architecture, Config, Files
from vlserve.models.tiles import TilePreprocessor
from vlserve.vision.original_config import read_original_encoder, read_original_image_config

if TYPE_CHECKING:
    from vlserve.llm.stored_names import Renamed
    from vlserve.llm.tensor_parallel import Split
    from vlserve.models.base import Model

TOKENS = ("<img>", "<IMG_CONTEXT>", "</img>")
DECODERS = {
    "InternLM2ForCausalLM": "internlm2",
    "InternLM3ForCausalLM": "internlm3",
    "LlamaForCausalLM": "llama",
    "Phi3ForCausalLM": "phi3",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3_moe",
}
# the published code's own words
_BEFORE = "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, 是一个有用无害的人工智能助手。"
_SINCE_2_5 = "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """How turns are written: what opens each role's, what ends any, and the system message where a request has none; "" where
    there is then no such turn."""

    system: str = "<|im_start|>system\n"
    user: str = "<|im_start|>user\n"
    assistant: str = "<|im_start|>assistant\n"
    end: str = "<|im_end|>"
    message: str = _BEFORE
    also_ends: tuple[str, ...] = ()

    @property
    def end_tokens(self) -> tuple[str, ...]:
        return (self.end.strip(), *self.also_ends)

    def template(self) -> str:
        """As Jinja; a picture is its placeholder and a line break."""
        turn, end = {"system": self.system, "user": self.user, "assistant": self.assistant}, _quoted(self.end)
        openings = "".join(f"{{% elif message['role'] == '{role}' %}}{{{{ {_quoted(text)} }}}}" for role, text in turn.items())
        system = (
            f"{{% if messages[0]['role'] != 'system' %}}{{{{ {_quoted(self.system + self.message + self.end)} }}}}{{% endif %}}"
        )
        return (
            f"{system if self.message else ''}"
            "{% for message in messages %}"
            f"{openings.replace('{% elif', '{% if', 1)}"
            "{% else %}{{ raise_exception('the model has no turns of role ' + message['role']) }}{% endif %}"
            "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
            f"{{% if part['type'] == 'image' %}}{{{{ {_quoted(TOKENS[1])} + '\\n' }}}}"
            "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
            f"{{{{ {end} }}}}{{% endfor %}}"
            f"{{% if add_generation_prompt %}}{{{{ {_quoted(self.assistant)} }}}}{{% endif %}}"
        )


CONVERSATIONS = {
    "Hermes-2": Conversation(also_ends=("<|endoftext|>",)),
    "internlm2-chat": Conversation(),
    "phi3-chat": Conversation(system="<|system|>\n", user="<|user|>\n", assistant="<|assistant|>\n", end="<|end|>"),
    "internvl2_5": Conversation(end="<|im_end|>\n", message=_SINCE_2_5),
    "internvl3_5": Conversation(end="<|im_end|>\n", message=""),  # as its chat_template.jinja
}


@dataclass(frozen=True, slots=True, kw_only=True)
class OriginalPreprocessor(TilePreprocessor):
    conversation: Conversation

    def chat_template(self) -> str:
        return self.conversation.template()

    def end_tokens(self) -> tuple[str, ...]:
        return self.conversation.end_tokens


def preprocessor(config: Config, files: Files) -> OriginalPreprocessor:
    settings = files.get("preprocessor_config.json", {})
    return OriginalPreprocessor(
        image=read_original_image_config(config, settings, read_original_encoder(config)),
        tokens=TOKENS,
        image_token_id=_token_id(TOKENS[1], files),
        conversation=_conversation(config),
    )


def build(config: Config, preprocessor: OriginalPreprocessor, split: Split) -> Model:
    from vlserve.llm.decoders import make_decoder
    from vlserve.models.base import Model
    from vlserve.vision.internvit_tower import OriginalInternVit

    encoder, decoder = read_original_encoder(config), make_decoder(read_llm_config(config), split)

    class Original(Model):
        def rename(self, name: str) -> Renamed:
            layer = re.match(r"vision_model\.encoder\.layers\.(\d+)\.", name)
            is_above = layer is not None and int(layer[1]) >= encoder.num_hidden_layers  # of the one that is selected
            return None if is_above else super().rename(name)

    return Original(decoder, OriginalInternVit(encoder, preprocessor.image, decoder.config.hidden_size))


def read_llm_config(config: Config) -> DecoderConfig:
    """`llm_config`; its class says which decoder it is. Raises ValueError."""
    text = config.get("llm_config")
    if not isinstance(text, Mapping):
        raise ValueError(f"llm_config is {text!r}; expected an object")
    names = text.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    if name is not None and name not in DECODERS:
        raise ValueError(f"llm_config.architectures {names} is not supported; supported: {', '.join(DECODERS)}")
    model_type = text.get("model_type") if name is None else DECODERS[name]
    try:
        return read_decoder_config({**text, "model_type": model_type, "tie_word_embeddings": is_tied(config, text)})
    except ValueError as error:
        raise ValueError(str(error).replace("text_config", "llm_config")) from error


def _conversation(config: Config) -> Conversation:
    name = config.get("template")
    if name not in CONVERSATIONS:
        raise ValueError(f"template {name!r} is not supported; supported: {', '.join(CONVERSATIONS)}")
    found: Conversation = CONVERSATIONS[name]
    return found


def _token_id(token: str, files: Files) -> Any:
    """By the tokenizer's files: it differs from one generation to the next, and config.json does not say it."""
    added = files.get("tokenizer_config.json", {}).get("added_tokens_decoder")
    for id, entry in added.items() if isinstance(added, Mapping) else ():
        if isinstance(entry, Mapping) and entry.get("content") == token:
            return int(id)
    return files.get("added_tokens.json", {}).get(token)


def _quoted(text: str) -> str:
    """As a literal of Jinja."""
    return json.dumps(text, ensure_ascii=False)


INTERNVL_CHAT = Architecture(preprocessor=preprocessor, build=build, decoder=read_llm_config, encoder=read_original_encoder)
