"""Flags, keywords and sampling fields of other servers, and what takes their place here.

Only looked at when somebody gives one; `docs/migrating.md` says the same at more length, and a test compares the two.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

LMDEPLOY, VLLM, SGLANG = "LMDeploy", "vLLM", "SGLang"


class Foreign(NamedTuple):
    """A name from elsewhere: `whose` it is, `ours` with the same or the nearest meaning ("" for none), and what to know."""

    whose: tuple[str, ...]
    ours: str
    note: str = ""


ONE_BY_HEADS = "devices share every layer; there are no pipeline stages"
FOUND_QUANTISED = "how a checkpoint is quantised is found in its config.json; leave the flag out"
NAMED_FIRST = "the model comes without a flag: vlserve serve MODEL"
NEVER_CODE = "code from checkpoints is never run; installed packages add models"
KEYS = "a file, since others see a command's arguments; or the variable VLSERVE_API_KEYS"
ALL_MEMORY = "a share of the whole device, for weights and KV cache together; or --kv-cache-gib"

FLAGS: Mapping[str, Foreign] = {
    "--server-name": Foreign((LMDEPLOY,), "--host"),
    "--server-port": Foreign((LMDEPLOY,), "--port"),
    "--cache-max-entry-count": Foreign((LMDEPLOY,), "--kv-cache-gib", "in GiB, not as a share of what the weights leave"),
    "--cache-block-seq-len": Foreign((LMDEPLOY,), "--block-size"),
    "--quant-policy": Foreign((LMDEPLOY,), "--kv-cache-dtype", "8 is int8; there are no 4 bits"),
    "--session-len": Foreign((LMDEPLOY,), "--max-model-len"),
    "--max-batch-size": Foreign((LMDEPLOY,), "--max-num-seqs"),
    "--max-prefill-token-num": Foreign((LMDEPLOY,), "--max-num-batched-tokens"),
    "--model-name": Foreign((LMDEPLOY,), "--served-model-name"),
    "--backend": Foreign((LMDEPLOY,), "", "there is one engine"),
    "--api-keys": Foreign((LMDEPLOY,), "--api-key-file", KEYS),
    "--vision-max-batch-size": Foreign((LMDEPLOY,), "", "tiles are encoded in small groups, so there is nothing to set"),
    "--model-format": Foreign((LMDEPLOY,), "", FOUND_QUANTISED),
    "--ssl": Foreign((LMDEPLOY,), "--ssl-certfile", "with --ssl-keyfile"),
    "--allow-origins": Foreign((LMDEPLOY,), "--cors-origins"),
    "--tensor-parallel-size": Foreign((VLLM,), "--tp"),
    "--pipeline-parallel-size": Foreign((VLLM,), "--tp", ONE_BY_HEADS),
    "--enable-expert-parallel": Foreign((VLLM,), "--expert-parallel"),
    "--ep": Foreign((LMDEPLOY,), "--expert-parallel", "a switch: all ranks of --tp share the experts"),
    "--ep-size": Foreign((SGLANG,), "--expert-parallel", "a switch: all ranks of --tp share the experts"),
    "--data-parallel-size": Foreign((VLLM,), "", "start several servers behind a proxy"),
    "--limit-mm-per-prompt": Foreign((VLLM,), "--limit-images-per-prompt", "a number, since pictures are the one kind of media"),
    "--allowed-media-domains": Foreign((VLLM,), "--allowed-media-hosts"),
    "--api-key": Foreign((VLLM, SGLANG), "--api-key-file", KEYS),
    "--enable-prefix-caching": Foreign((VLLM, LMDEPLOY), "--prefix-caching", "and it is on unless --no-prefix-caching"),
    "--no-enable-prefix-caching": Foreign((VLLM,), "--no-prefix-caching"),
    "--kv-cache-memory-bytes": Foreign((VLLM,), "--kv-cache-gib", "in GiB"),
    "--swap-space": Foreign((VLLM,), "", "a request that loses its blocks is computed again"),
    "--cpu-offload-gb": Foreign((VLLM,), "", "weights stay on the device"),
    "--trust-remote-code": Foreign((VLLM, SGLANG), "", NEVER_CODE),
    "--quantization": Foreign((VLLM, SGLANG), "", FOUND_QUANTISED),
    "--chat-template": Foreign((VLLM, SGLANG, LMDEPLOY), "", "it is the checkpoint's chat_template.jinja"),
    "--tokenizer": Foreign((VLLM,), "", "it is the checkpoint's tokenizer.json"),
    "--download-dir": Foreign((VLLM, LMDEPLOY), "", "set the variable HF_HOME"),
    "--model": Foreign((VLLM,), "", NAMED_FIRST),
    "--allowed-origins": Foreign((VLLM,), "--cors-origins"),
    "--model-path": Foreign((SGLANG,), "", NAMED_FIRST),
    "--tp-size": Foreign((SGLANG,), "--tp"),
    "--dp-size": Foreign((SGLANG,), "", "start several servers behind a proxy"),
    "--mem-fraction-static": Foreign((SGLANG,), "--gpu-memory-utilization", ALL_MEMORY),
    "--context-length": Foreign((SGLANG,), "--max-model-len"),
    "--max-running-requests": Foreign((SGLANG,), "--max-num-seqs"),
    "--chunked-prefill-size": Foreign((SGLANG,), "--max-num-batched-tokens"),
    "--page-size": Foreign((SGLANG,), "--block-size"),
    "--disable-radix-cache": Foreign((SGLANG,), "--no-prefix-caching"),
}
# keywords that are no flags, or mean something else as one
KEYWORDS: Mapping[str, Foreign] = {
    "model_path": Foreign((LMDEPLOY, SGLANG), "model"),
    "backend_config": Foreign((LMDEPLOY,), "", "its fields are keywords of VLPipeline"),
    "chat_template_config": Foreign((LMDEPLOY,), "", "it is the checkpoint's chat_template.jinja"),
    "vision_config": Foreign((LMDEPLOY,), "", "tiles are encoded in small groups, so there is nothing to set"),
}
SAMPLING: Mapping[str, Foreign] = {
    "gen_config": Foreign((LMDEPLOY,), "", "its fields stand beside the prompt, as in pipe(prompt, max_tokens=64)"),
    "sampling_params": Foreign((VLLM, SGLANG), "", "its fields stand beside the prompt, or sampling=SamplingParams(...)"),
    "max_new_tokens": Foreign((LMDEPLOY, SGLANG), "max_tokens"),
    "min_new_tokens": Foreign((LMDEPLOY, SGLANG), "min_tokens"),
    "stop_words": Foreign((LMDEPLOY,), "stop"),
    "random_seed": Foreign((LMDEPLOY,), "seed"),
    "sampling_seed": Foreign((SGLANG,), "seed"),
    "do_sample": Foreign((LMDEPLOY,), "temperature", "0 takes the likeliest token, above 0 draws"),
    "bad_words": Foreign((LMDEPLOY, VLLM), "logit_bias", "by token id; -100 keeps one out"),
    "structured_outputs": Foreign((VLLM,), "structured"),
    "guided_decoding": Foreign((VLLM,), "structured"),
    "json_schema": Foreign((SGLANG,), "structured", 'structured={"json": ...}'),
    "regex": Foreign((SGLANG,), "structured", 'structured={"regex": ...}'),
    "ebnf": Foreign((SGLANG,), "structured", 'structured={"grammar": ...}'),
    "response_format": Foreign((LMDEPLOY,), "structured", 'structured={"json": ...}'),
    "prompt_logprobs": Foreign((VLLM,), "", "log-probabilities are given for the answer only"),
}


def explain_flags(unknown: Sequence[str], ours: Mapping[str, Collection[str]], command: str) -> str:
    """What to say of arguments that a command does not take.

    Args:
        unknown: the arguments left over, flags and values. ours: our flags by command. command: the one that was given.
    """
    flags = [argument.partition("=")[0] for argument in unknown if argument.startswith("-")]
    for flag in flags:
        if flag in FLAGS:
            return f"{flag} is {_explain(FLAGS[flag])}"
    plain = f"unrecognized arguments: {' '.join(unknown)}"
    for flag in flags:
        others = [name for name, known in ours.items() if flag in known]
        if others:
            return f"{plain} ({flag} belongs to vlserve {' and '.join(others)})"
    return plain + (_nearest(flags[0], ours[command]) if flags else "")


def explain_option(name: str, ours: Collection[str], served: Collection[str]) -> str:
    """What to add to the refusal of a keyword of `VLPipeline`; "" when nothing is near. `served`: the server's options."""
    foreign = KEYWORDS.get(name) or FLAGS.get("--" + name.replace("_", "-"))
    if foreign is None:
        return " (an option of vlserve serve)" if name in served else _nearest(name, ours)
    is_server = bool(foreign.ours) and _keyword(foreign.ours.removeprefix("--no-").removeprefix("--")) not in ours
    text = _explain(foreign, " of vlserve serve" if is_server else "")
    text = re.sub(r"--no-([a-z-]+)", lambda flag: f"{_keyword(flag[1])}=False", text)
    return " (" + re.sub(r"--([a-z-]+)", lambda flag: _keyword(flag[1]), text) + ")"


def explain_sampling(name: str, ours: Collection[str]) -> str:
    """The same for a sampling field; `ours` are the fields that can be given."""
    foreign = SAMPLING.get(name)
    if foreign is not None and (not foreign.ours or foreign.ours in ours):
        return f" ({_explain(foreign)})"
    return _nearest(name, ours)


def _explain(foreign: Foreign, where: str = "") -> str:
    whose = " and ".join(f"{project}'s" for project in foreign.whose)
    here = ": ".join(filter(None, (foreign.ours and f"here it is {foreign.ours}{where}", foreign.note)))
    return f"{whose}; {here}"


def _nearest(name: str, ours: Collection[str]) -> str:
    near = difflib.get_close_matches(name, ours, n=1, cutoff=0.8)
    return f" (did you mean {near[0]}?)" if near else ""


def _keyword(flag: str) -> str:
    return flag.replace("-", "_")
