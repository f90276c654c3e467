"""Fields that are not supported: which of their values ask for nothing, and what to send instead of the others.

Clients send what they never meant: LMDeploy's writes all its defaults, LiteLLM and others write empty ones.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
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
# field: what to send in its place, on any route that does not say something else
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
    # other APIs'
    "options": "send its fields beside the others",
    "parameters": "send its fields beside the others",
    "generation_config": "send its fields beside the others",
    "num_predict": "here it is max_tokens",
    "max_length": "here it is max_tokens",
    "stop_sequences": "here it is stop",
    "keep_alive": "the model stays loaded",
}
PICTURES = ("image", "images", "image_url", "image_data", "multi_modal_data")
TEXTS = ("input", "inputs", "prompt", "text", "query", "question")
CHAT = {
    **dict.fromkeys(PICTURES, "send pictures as image_url parts of a message"),
    **dict.fromkeys((*TEXTS, "history", "chat_history"), "here it is messages"),
    **dict.fromkeys(("system", "system_prompt", "instructions"), "send it as a message with the role system"),
    **dict.fromkeys(("previous_response_id", "conversation"), "send the whole conversation as messages"),
    "text": "here it is messages; text.format is response_format",
    "format": "here it is response_format",
    "max_output_tokens": "here it is max_completion_tokens",
    "reasoning": "here it is reasoning_effort",
    "think": "here it is reasoning_effort or enable_thinking",
    "thinking": "here it is reasoning_effort or enable_thinking",
    "include": "send logprobs: true",
}
COMPLETIONS = {
    **dict.fromkeys(PICTURES, "send pictures to /v1/chat/completions, as image_url parts of a message"),
    **dict.fromkeys(("min_dynamic_patch", "max_dynamic_patch", "media_io_kwargs"), "send pictures to /v1/chat/completions"),
    **dict.fromkeys(TEXTS, "here it is prompt"),
    **dict.fromkeys(("system", "system_prompt", "instructions"), "send it to /v1/chat/completions, as a message of the system"),
    **dict.fromkeys(("functions", "function_call"), "send tools to /v1/chat/completions"),
    "input_ids": "here it is prompt",
    "documents": "put them into the prompt",
    "chat_template": "no template is used here",
    "top_logprobs": "here it is logprobs, a number",
    "format": "here it is response_format",
    "max_output_tokens": "here it is max_tokens",
}
RESPONSES = {
    **dict.fromkeys(PICTURES, "send pictures as input_image parts of input"),
    **dict.fromkeys(("messages", *TEXTS, "history", "chat_history"), "here it is input"),
    **dict.fromkeys(("system", "system_prompt"), "here it is instructions"),
    **dict.fromkeys(("response_format", "format"), "here it is text.format"),
    **dict.fromkeys(("max_new_tokens", "num_predict", "max_length", "thinking_token_budget"), "here it is max_output_tokens"),
    **dict.fromkeys(("reasoning_effort", "think", "thinking"), "here it is reasoning.effort"),
    **dict.fromkeys(("logprobs", "return_logprob"), 'here it is include: ["message.output_text.logprobs"]'),
    **dict.fromkeys(("return_prompt_token_ids", "return_prompt_text"), "token ids come from /v1/chat/completions"),
    **dict.fromkeys(("use_beam_search", "early_stopping", "length_penalty"), "send temperature"),
    "best_of": "a response is one answer",
    "verbosity": "here it is text.verbosity",
    "enable_thinking": "here it is chat_template_kwargs.enable_thinking",
    "function_call": "here it is tool_choice",
    "functions": "here it is tools",
}


def is_empty(key: str, value: Any) -> bool:
    """Whether a field has no value, whatever the field is."""
    return value is None or (value in ("", [], {}) and key not in MEANT_WHEN_EMPTY)


def is_neutral(key: str, value: Any) -> bool:
    """Whether a field that is not supported can be left out with the same answer."""
    return any(value == neutral and isinstance(value, bool) == isinstance(neutral, bool) for neutral in NEUTRAL.get(key, ()))


def refusal(key: str, known: Collection[str], instead: Mapping[str, str]) -> RequestError:
    """The error for a field that is not supported and asks for something.

    Args:
        known: the fields that are supported. instead: what the route has in place of others, before INSTEAD.
    """
    shown = key if len(key) <= 64 else key[:64] + "..."
    return RequestError(
        f"{shown} is {_reason(key, shown, known, {**INSTEAD, **instead})}", param=shown, code="unsupported_parameter"
    )


def _reason(key: str, shown: str, known: Collection[str], instead: Mapping[str, str]) -> str:
    values = NEUTRAL.get(key, ())
    what = "only supported as " + " or ".join(map(json.dumps, values)) if values else "not a field that is supported"
    hint = "" if key in NEUTRAL or key in instead else explain_sampling(shown, known)
    return what + (hint or "; " + instead.get(key, "leave it out"))
