"""How many bytes a rank of a tensor-parallel group holds: weights, a token's keys and values, and a step's activations.

Vision encoder and projector are whole on every rank; the decoder is cut by heads, by feed-forward width and by
vocabulary. The activations are what the code holds at its fullest moment, tensor by tensor; tests/plan/test_footprint.py
measures the same on the CPU. Letters: T tokens of a step, L tokens of context, R rows to sample, C hidden size,
Q and K widths of this rank's query and KV heads, F feed-forward width of this rank, V vocabulary, N tiles, P patches
of a tile with the class token, W encoder width, b bytes of a number.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from vlserve.plan.model_shape import DecoderShape, ModelShape
from vlserve.vision.config import TILES_AT_ONCE, EncoderConfig

if TYPE_CHECKING:
    from vlserve.models.architecture import Architecture, Preprocessor

FLOAT32 = 4  # bytes
LOGIT_COPIES = 4  # of what is sampled from, with penalties and log-probabilities
KV_CODE, KV_SCALE = 1, 2  # bytes of a key or value in eight bits, and of the scale of a token and head
KV_AT_ONCE = 2**17  # keys or values that are turned into numbers together
KV_READING = {"int8": 5, "fp8": 7}  # bytes for each of them, beside its result and its scale


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """The largest step of the engine, and the number types."""

    itemsize: int  # bytes
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    block_size: int
    kv_dtype: str = "auto"  # of the KV cache: the computation's, int8 or fp8


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """What one rank of `tp` has of the decoder: heads, and rows rounded up (zeros beyond the end)."""

    query_heads: int
    kv_heads: int
    feed_forward: int
    shared_feed_forward: int
    vocabulary: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """A size that is split over the ranks."""

    dimension: str
    size: int
    per_rank: int
    padding: int  # rows of zeros, all ranks together
    copies: int = 1  # ranks that hold the same rows


def shard(decoder: DecoderShape, tp: int) -> Shard:
    """The decoder's sizes on a rank; the heads divide, or KV heads are replicated (one on each rank)."""
    return Shard(
        query_heads=decoder.num_attention_heads // tp,
        kv_heads=max(1, decoder.num_key_value_heads // tp),
        feed_forward=-(-decoder.intermediate_size // tp),
        shared_feed_forward=-(-decoder.shared_intermediate_size // tp),
        vocabulary=-(-decoder.vocab_size // tp),
    )


def cuts(decoder: DecoderShape, part: Shard, tp: int) -> tuple[Cut, ...]:
    """Every size that is cut, by config.json's keys."""
    width, shared = decoder.feed_forward_key, decoder.shared_intermediate_size
    rows = [
        ("num_attention_heads", decoder.num_attention_heads, part.query_heads),
        ("num_key_value_heads", decoder.num_key_value_heads, part.kv_heads),
        (width, decoder.intermediate_size, part.feed_forward),
        *([("shared_expert_intermediate_size", shared, part.shared_feed_forward)] if shared else []),
        ("vocab_size", decoder.vocab_size, part.vocabulary),
    ]
    copies = {"num_key_value_heads": max(1, tp // decoder.num_key_value_heads)}
    return tuple(
        Cut(dimension=name, size=size, per_rank=each, copies=copies.get(name, 1), padding=each * tp - size * copies.get(name, 1))
        for name, size, each in rows
    )


def vision_bytes(shape: ModelShape, config: Mapping[str, Any], itemsize: int) -> tuple[int, ModelShape]:
    """Bytes of encoder and projector, and the shape; a package's model that cannot be built is one that is not supported."""
    if shape.counted is not None and shape.preprocessor is not None:
        try:
            return _counted_bytes(shape.counted, config, shape.preprocessor, itemsize), shape
        except Exception as error:  # noqa: BLE001  (foreign code raises what it likes)
            reason = f"{shape.counted.origin} cannot build it: {type(error).__name__}: {error}"
            shape = replace(shape, reasons=(*shape.reasons, reason))
    if shape.encoder is None:
        return 0, replace(shape, notes=(*shape.notes, "the vision encoder's weights are not counted"))
    return internvit_bytes(shape.encoder, shape.decoder.hidden_size, itemsize), shape


def internvit_bytes(encoder: EncoderConfig, out_size: int, itemsize: int) -> int:
    """InternViT and the projector to `out_size`, as vision/encoder.py and vision/projector.py build them."""
    width, ffn = encoder.hidden_size, encoder.intermediate_size
    norm = width if encoder.norm_type == "rms_norm" else 2 * width
    embeddings = width + _positions(encoder) * width + (3 * encoder.patch_size**2 + 1) * width
    attention = 3 * width * (width + encoder.attention_bias) + 2 * width * encoder.use_qk_norm + width * (width + 1)
    layer = 2 * norm + attention + 2 * width + width * ffn + ffn + ffn * width + width  # 2 * width: layer scales
    inner = width * round(1 / encoder.downsample_ratio) ** 2
    projector = 2 * inner + (inner + 1) * out_size + (out_size + 1) * out_size
    return (embeddings + encoder.num_hidden_layers * layer + projector) * itemsize


def decoder_bytes(decoder: DecoderShape, part: Shard, itemsize: int) -> int:
    """Layers and final norm on one rank, without embeddings and head; row-parallel biases are whole."""
    hidden, query, kv = decoder.hidden_size, part.query_heads * decoder.head_dim, part.kv_heads * decoder.head_dim
    biases = (query + 2 * kv) * decoder.qkv_bias + hidden * decoder.output_bias
    norms = 2 * hidden + 2 * decoder.head_dim * decoder.qk_norm
    experts, shared = max(1, decoder.num_experts), part.shared_feed_forward
    mlp_biases = (2 * part.feed_forward + hidden) * experts + (2 * shared + hidden) * bool(shared)
    router = decoder.num_experts * hidden + hidden * bool(shared)  # and the shared expert's gate
    dense = biases + norms + mlp_biases * decoder.mlp_bias + router

    def linears(layer: int) -> int:
        def size(names: tuple[str, ...], outputs: int, inputs: int) -> int:
            return _linear_bytes(decoder, f"model.layers.{layer}.", names, outputs, inputs, itemsize)

        attention = size(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), query + 2 * kv, hidden)
        attention += size(("self_attn.o_proj",), hidden, query)
        each, common = (
            size(("mlp.gate_proj", "mlp.up_proj"), 2 * width, hidden) + size(("mlp.down_proj",), hidden, width)
            for width in (part.feed_forward, shared)
        )
        return attention + experts * each + common * bool(shared)

    if decoder.quantisation is None:  # all layers are alike
        layers = decoder.num_hidden_layers * linears(0)
    else:
        layers = sum(map(linears, range(decoder.num_hidden_layers)))
    return layers + (decoder.num_hidden_layers * dense + hidden) * itemsize


def _linear_bytes(decoder: DecoderShape, prefix: str, names: tuple[str, ...], outputs: int, inputs: int, itemsize: int) -> int:
    """Projections that are one matrix on a rank; they are stored alike, so the first one's name decides."""
    quantisation = decoder.quantisation
    if quantisation is None or not quantisation.covers(prefix + names[0]):
        return outputs * inputs * itemsize
    return quantisation.linear_bytes(outputs, inputs, itemsize)


def embedding_bytes(decoder: DecoderShape, part: Shard, itemsize: int, lm_head_bits: int = 16) -> int:
    """embed_tokens and lm_head, one tensor when they are tied; a head in 8 bits is a tensor of its own, with a scale a row."""
    row = decoder.hidden_size * itemsize
    head = decoder.hidden_size + FLOAT32 if lm_head_bits == 8 else row * (not decoder.tie_word_embeddings)
    return part.vocabulary * (row + head)


def kv_bytes_per_token(decoder: DecoderShape, part: Shard, step: Step) -> int:
    """Keys and values of all layers, with their scales where they are quantised."""
    is_quantised = step.kv_dtype != "auto"
    per_head = decoder.head_dim * KV_CODE + KV_SCALE if is_quantised else decoder.head_dim * step.itemsize
    return 2 * decoder.num_hidden_layers * part.kv_heads * per_head


def activation_bytes(shape: ModelShape, part: Shard, step: Step, *, is_first: bool) -> int:
    """The rotary table, which stays, and the fullest moment of a step; `is_first` for the rank that samples."""
    decoder = shape.decoder
    table = step.max_model_len * decoder.head_dim * FLOAT32
    peaks = [_layer_peak(decoder, part, step), _logits_peak(decoder, part, step, is_first=is_first)]
    if shape.encoder is not None:
        peaks.append(_encoder_peak(shape.encoder, decoder, step))
    return table + max(peaks)


def _counted_bytes(family: Architecture, config: Mapping[str, Any], preprocessor: Preprocessor, itemsize: int) -> int:
    """All but the decoder of a model, built without memory on torch's meta device."""
    import torch  # only here: a plan of what is built in needs no torch

    from vlserve.llm.parallel import Split

    with torch.device("meta"):
        model = family.build(config, preprocessor, Split())
    whole, decoder = (sum(t.numel() for t in (*m.parameters(), *m.buffers())) for m in (model, model.decoder))
    return (whole - decoder) * itemsize


def _layer_peak(decoder: DecoderShape, part: Shard, step: Step) -> int:
    """A chunk of T tokens at the end of a context of L, within one layer."""
    tokens = min(step.max_num_batched_tokens, step.max_model_len * step.max_num_seqs)
    b, hidden = step.itemsize, decoder.hidden_size
    query, kv = part.query_heads * decoder.head_dim, part.kv_heads * decoder.head_dim
    length = step.max_model_len
    # embeddings; the layer's input and residual, held by the caller; this half's norm and sum
    held = 5 * hidden * b * tokens + tokens * decoder.head_dim * FLOAT32 + _index_bytes(step, tokens)
    # what came before the chunk makes a mask necessary
    mask = min(tokens, length) * length if length > tokens else 0
    # query, key and value in one tensor; the query turned; the result; keys and values, gathered from their blocks; the mask
    attention = (3 * query + 2 * kv) * b * tokens + 2 * length * kv * b + mask
    # within torch's kernel: its own result with the log-sum-exp, and the mask as numbers
    inside = (query * b + part.query_heads * FLOAT32) * tokens + mask * b
    if step.kv_dtype != "auto":
        numbers = min(max(KV_AT_ONCE, step.block_size * kv), length * kv)
        inside = max(inside, numbers * KV_READING[step.kv_dtype] + numbers // decoder.head_dim * FLOAT32)
    attention += inside
    if step.kv_dtype != "auto":  # while storing: key and value in float32, their quotients, codes and scales
        storing = 2 * kv * (2 * FLOAT32 + KV_CODE) + 2 * part.kv_heads * KV_SCALE
        attention = max(attention, ((2 * query + 3 * kv) * b + storing) * tokens + mask)
    # query, key and value in one tensor; both halves of what is turned, their products and their sum; what norms gave
    rotation = max(3 * query + 2 * kv, 2 * query + 4 * kv) + decoder.qk_norm * (query + kv)
    feed_forward = 4 * max(part.feed_forward, part.shared_feed_forward) * b * tokens  # gate and up, silu(gate), the product
    norm = hidden * (b + (2 * FLOAT32 if b < FLOAT32 else 0)) * tokens  # 16 bits are normed in float32
    return held + max(attention, rotation * b * tokens, feed_forward, norm)


def _logits_peak(decoder: DecoderShape, part: Shard, step: Step, *, is_first: bool) -> int:
    """Logits of R rows. The first rank gathers them in float32 and samples."""
    tokens = min(step.max_num_batched_tokens, step.max_model_len * step.max_num_seqs)
    rows = min(step.max_num_seqs, tokens)
    held = (2 * tokens + rows) * decoder.hidden_size * step.itemsize  # embeddings, hidden states, the rows to sample
    if is_first:
        return held + rows * decoder.vocab_size * LOGIT_COPIES * FLOAT32
    return held + rows * part.vocabulary * step.itemsize


def _encoder_peak(encoder: EncoderConfig, decoder: DecoderShape, step: Step) -> int:
    """TILES_AT_ONCE tiles in the encoder, while the step's embeddings wait."""
    b, width, tiles = step.itemsize, encoder.hidden_size, TILES_AT_ONCE
    tokens = min(step.max_num_batched_tokens, step.max_model_len * step.max_num_seqs)
    waiting = tokens * decoder.hidden_size * b + _index_bytes(step, tokens)
    pixels, patches = 3 * encoder.image_size**2, _positions(encoder)
    # the encoder's input, the sum so far and the norm of it; feed-forward before and after GELU
    feed_forward = (3 * width + 2 * encoder.intermediate_size) * b
    # the encoder's input, the block's, its norm, query, key and value, the result, its projection; with norms of query and key
    # their steps in float32, and a patch's root
    attention = (8 + 2 * encoder.use_qk_norm) * width * b
    qk_norm = (7 * b + 2 * FLOAT32) * width + FLOAT32 if encoder.use_qk_norm and b < FLOAT32 else 0
    out = encoder.tokens_per_tile * decoder.hidden_size * b
    projector = 3 * patches * width * b + 3 * out  # the patches, shuffled, normed; then three layers' results
    normalise = pixels * (1 + 2 * FLOAT32)  # uint8, and two steps in float32
    return waiting + tiles * max(pixels * b + max(patches * max(feed_forward, attention, qk_norm), projector), normalise)


def _index_bytes(step: Step, tokens: int) -> int:
    """Ids, positions and slots of the tokens, the sequences' lengths and block tables; int64."""
    return 8 * (3 * tokens + 3 * step.max_num_seqs + step.max_num_seqs * -(-step.max_model_len // step.block_size))


def _positions(encoder: EncoderConfig) -> int:
    """Patches of a tile and the class token."""
    return (encoder.image_size // encoder.patch_size) ** 2 + 1
