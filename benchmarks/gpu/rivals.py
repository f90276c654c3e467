"""Other kernels for the same work, where they are installed. None has been tried with this benchmark on a GPU yet.

Each function makes one, with weights in the order that it wants, and raises where it cannot; who calls says so once.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.gpu.case import Rival
from benchmarks.gpu.sizes import GROUP
from vlserve.kernels.attention.types import AttentionMetadata
from vlserve.kernels.int4.reference import unpack_codes

WORKSPACE = 128 * 2**20  # bytes, as FlashInfer recommends


def int4pack(x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor) -> Rival:
    """torch's own 4-bit product: the even input in the high half of a byte, w = (code - 8) * scale + offset."""
    packed = torch._convert_weight_to_int4pack((codes << 4 | codes >> 4).contiguous(), 8)
    offsets = ((8 - zeros.float()) * scales.float()).bfloat16()
    both = torch.stack((scales.t(), offsets.t()), dim=-1).contiguous()  # [K / G, N, 2]

    def want() -> torch.Tensor:  # its offsets are rounded
        levels = unpack_codes(codes).unflatten(1, (-1, GROUP)).double() - 8
        return F.linear(x.double(), (levels * scales.double()[..., None] + offsets.double()[..., None]).flatten(1))

    return Rival(name="int4pack", run=lambda: torch._weight_int4pack_mm(x, packed, GROUP, both), want=want)


def gemlite(x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor) -> Rival:
    """gemlite tunes itself when it is first called, which takes time."""
    core = import_module("gemlite.core")
    sizes = {"in_features": x.shape[1], "out_features": len(codes)}
    types = {"input_dtype": core.DType.BF16, "output_dtype": core.DType.BF16}
    layer = core.GemLiteLinearTriton(W_nbits=4, group_size=GROUP, **sizes, **types)
    layer.pack(unpack_codes(codes), scales.clone(), zeros.to(scales.dtype), None)
    return Rival(name="gemlite", run=lambda: layer(x))


def marlin(outputs: int, x: torch.Tensor) -> Rival:
    """IST-DASLab's package: float16, symmetric, with weights of its own."""
    module: Any = import_module("marlin")
    inputs = x.shape[1]
    scales = (torch.rand(inputs // GROUP, outputs, device=x.device) / 100 + 0.001).half()
    levels = torch.randint(-8, 8, (inputs, outputs), device=x.device).half()
    weight = (levels.unflatten(0, (-1, GROUP)) * scales[:, None]).flatten(0, 1)
    linear = torch.nn.Linear(inputs, outputs, bias=False, device=x.device, dtype=torch.float16)
    linear.weight.data = weight.t().contiguous()
    layer = module.Layer(inputs, outputs, groupsize=GROUP)
    layer.pack(linear.cpu(), scales.t().contiguous().cpu())
    layer, half = layer.to(x.device), x.half()
    return Rival(name="Marlin", run=lambda: layer(half), want=lambda: half.double() @ weight.double())


def sdpa_decode(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float) -> Rival:
    """torch's attention over keys and values [B, L, HK, D] that lie in one piece."""
    batch, _, kv_heads, dim = keys.shape
    k, v = (tensor.transpose(1, 2) for tensor in (keys, values))
    q = query.view(batch, kv_heads, -1, dim)  # a KV head's queries side by side, which is its fastest form for one token

    def run() -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, scale=scale).reshape(query.shape)

    return Rival(name="SDPA", run=run)


def sdpa_prefill(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float) -> Rival:
    """As `sdpa_decode`, of one sequence, whose last tokens are the queries."""
    from torch.nn.attention.bias import causal_lower_right

    q = query.transpose(0, 1)[None]
    k, v = (tensor.transpose(1, 2) for tensor in (keys, values))
    is_whole = len(query) == keys.shape[1]
    if not is_whole:  # the bias takes no grouped heads
        k, v = (tensor.repeat_interleave(q.shape[1] // tensor.shape[1], dim=1) for tensor in (k, v))
    mask = None if is_whole else causal_lower_right(len(query), keys.shape[1])

    def run() -> torch.Tensor:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_whole, scale=scale, enable_gqa=is_whole)
        return out[0].transpose(0, 1)

    return Rival(name="SDPA", run=run)


def flashinfer(query: torch.Tensor, caches: tuple[torch.Tensor, torch.Tensor], metadata: AttentionMetadata) -> Rival:
    """FlashInfer on the same pages; all sequences of a case are equally long."""
    module: Any = import_module("flashinfer")
    device, (_, heads, dim), (_, page, kv_heads, _) = query.device, query.shape, caches[0].shape
    context, query_len, batch = metadata.context_lens[0], metadata.query_lens[0], len(metadata.query_lens)
    pages = -(-context // page)
    ends = torch.arange(batch + 1, dtype=torch.int32, device=device)
    paging = ends * pages, metadata.block_tables[:, :pages].flatten().int().contiguous()
    last = torch.full((batch,), context - (pages - 1) * page, dtype=torch.int32, device=device)
    workspace = torch.empty(WORKSPACE, dtype=torch.uint8, device=device)
    if query_len == 1:
        wrapper = module.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=True)
        wrapper.plan(*paging, last, heads, kv_heads, dim, page, q_data_type=query.dtype, kv_data_type=query.dtype)
    else:
        wrapper = module.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD")
        wrapper.plan(ends * query_len, *paging, last, heads, kv_heads, dim, page, causal=True, q_data_type=query.dtype)
    run: Callable[[], torch.Tensor] = lambda: wrapper.run(query, caches)  # noqa: E731
    return Rival(name="FlashInfer", run=run)
