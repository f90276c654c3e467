"""Fields that are not supported: which of their values ask for nothing, and what to send instead of the others.

Clients send what they never meant: LMDeploy's writes all its defaults, LiteLLM and others write empty ones.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Any

from vlserve.errors import RequestError
from vlserve.migrating import explain_sampling

# empty, and yet meant: {} turns web search on, an empty salt is one that somebody forgot, and the rest is what is asked
MEANT_WHEN_EMPTY = frozenset(("web_search_options", "cache_salt", "messages", "prompt", "input", "tokens"))
# field: values that ask for nothing, where the field is not supported. Null and what is empty ask for nothing in any field
NEUTRAL: dict[str, tuple[Any, ...]] = {
    # OpenAI's
    "functions": (),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "verbosity": ("medium",),
    "echo": (False,),
    "best_of": (1,),
    "background": (False,),
    "truncation": ("disabled",),
    # vLLM's
    "guided_whitespace_pattern": (),
    "use_beam_search": (False,),
    "early_stopping": (False,),
    "length_penalty": (1,),
    "watermarking": (False,),
    "thinking_token_budget": (-1,),
    "truncation_side": ("left", "right"),  # of what truncate_prompt_tokens cuts
    "return_prompt_text": (False,),
    "return_token_offsets": (False,),
    "return_mm_kwargs": (True,),
    "routed_experts_prompt_start": (0,),
    "add_special_tokens": (False,),  # in chat the template writes them
    # SGLang's
    "no_stop_trim": (False,),
    "stream_reasoning": (True,),
    "use_audio_in_video": (False,),
    "return_hidden_states": (False,),
    "return_routed_experts": (False,),
    "return_cached_tokens_details": (False,),
    "return_prompt_token_ids": (False,),
    "return_meta_info": (False,),
    "routed_experts_start_len": (0,),
    # LMDeploy's
    "do_preprocess": (True,),
    "return_logprob": (False,),
    "repetition_ngram_size": (0,),
    "repetition_ngram_threshold": (0,),
}
# field: what to send in its place
INSTEAD: dict[str, str] = {
    "functions": "send tools",
    "function_call": "send tool_choice",
    "modalities": "answers are text",
    "audio": "answers are text",
    "web_search_options": "search yourself, and send what was found as text or as a tool's result",
    "suffix": "put it into the prompt",
    "verbosity": "ask for short or long answers in a message",
    "echo": "the question is not repeated in a chat's answer; /v1/completions has echo",
    "best_of": "send n",
    "use_beam_search": "send n and temperature",
    "early_stopping": "send n and temperature",
    "length_penalty": "send n and temperature",
    "truncate_prompt_tokens": "shorten the prompt; /tokenize counts it",
    "truncation": "shorten the input; /tokenize counts it",
    "thinking_token_budget": "send max_completion_tokens",
    "allowed_token_ids": "send structured_outputs or logit_bias",
    "guided_whitespace_pattern": "JSON comes on one line; put the white space into a regex or a grammar",
    "chat_template": "the checkpoint's is used, with chat_template_kwargs",
    "documents": "put them into a message",
    "stop_regex": "send stop",
    "no_stop_trim": "send include_stop_str_in_output",
    "return_prompt_token_ids": "send return_token_ids",
    "return_logprob": "send logprobs",
    "return_prompt_text": "send return_token_ids, and its prompt_token_ids to /detokenize",
    "extra_key": "send cache_salt",
    "extra_body": "send its fields beside the others",
    "lora_path": "start another server with the adapter merged into its checkpoint",
    "adapter_name": "start another server with the adapter merged into its checkpoint",
    "min_dynamic_patch": "send mm_processor_kwargs, with what the model's preprocessing takes",
    "max_dynamic_patch": "send mm_processor_kwargs, with what the model's preprocessing takes",
    "media_io_kwargs": "send mm_processor_kwargs, with what the model's preprocessing takes",
    "add_special_tokens": "the chat template writes them; /v1/completions has add_special_tokens",
    "do_preprocess": "send the raw prompt to /v1/completions",
    "input_ids": "send them as prompt to /v1/completions",
    "image_data": "send pictures as image_url parts of a message",
}


def is_empty(key: str, value: Any) -> bool:
    """Whether a field has no value, whatever the field is."""
    return value is None or (value in ("", [], {}) and key not in MEANT_WHEN_EMPTY)


def is_neutral(key: str, value: Any) -> bool:
    """Whether a field that is not supported can be left out with the same answer."""
    return any(value == neutral and isinstance(value, bool) == isinstance(neutral, bool) for neutral in NEUTRAL.get(key, ()))


def refusal(key: str, known: Collection[str]) -> RequestError:
    """The error for a field that is not supported and asks for something; `known` are the fields that are."""
    shown = key if len(key) <= 64 else key[:64] + "..."
    return RequestError(f"{shown} is {_reason(key, shown, known)}", param=shown, code="unsupported_parameter")


def _reason(key: str, shown: str, known: Collection[str]) -> str:
    values = NEUTRAL.get(key, ())
    what = "only supported as " + " or ".join(map(json.dumps, values)) if values else "not a field that is supported"
    hint = "" if key in NEUTRAL or key in INSTEAD else explain_sampling(shown, known)
    return what + (hint or "; " + INSTEAD.get(key, "leave it out"))
