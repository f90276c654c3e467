"""What config.json says of the weights, for vlserve and for those who read such checkpoints too. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

HEAD = "lm_head"


def quantization_config(
    method: str, stored_format: str, group_size: int, outer_modules: Sequence[str], inner: Sequence[str] = (HEAD,)
) -> dict[str, Any]:
    """The `quantization_config`; `outer_modules` are the modules beside the language model, which are left as they are, and so
    are the `inner` ones of it: its head and routers, as the files call them."""
    if stored_format == "awq":
        # names as in the files, and as transformers has them, whose patterns start at the whole model
        names = [*outer_modules, *inner, *(f"model.{name}" for name in outer_modules)]
        return {
            "quant_method": "awq",
            "version": "gemm",
            "bits": 4,
            "group_size": group_size,
            "zero_point": True,
            "modules_to_not_convert": names,
        }
    if method == "fp8":
        form, weights = "float-quantized", {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"}
    else:
        form = "pack-quantized"
        weights = {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": group_size}
    group = {
        "targets": ["Linear"],
        "weights": weights | {"dynamic": False},
        "input_activations": None,
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": [f"re:.*{name}{'$' if name.endswith('mlp.gate') else '.*'}" for name in (*outer_modules, *inner)],
    }
