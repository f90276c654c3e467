"""How many bytes a rank of a tensor-parallel group holds: weights, a token's keys and values, and a step's activations.

Vision encoder and projector are whole on every rank; the decoder is cut by heads, by feed-forward width and by
vocabulary. The activations are what the code holds on a CUDA device at its fullest moment, tensor by tensor;
tests/rehearsal/memory.py counts the same. Letters: T tokens of a step, L tokens of context, R rows to sample, C hidden size,
Q and K widths of this rank's query and KV heads, F feed-forward width of this rank, V vocabulary, N tiles, P patches
of a tile with the class token, W encoder width, b bytes of a number.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from vlserve.config import EngineConfig
from vlserve.llm.quantisation import INT8
from vlserve.plan.model_shape import DecoderShape, ModelShape
from vlserve.vision.config import TILES_AT_ONCE, EncoderConfig

if TYPE_CHECKING:
    from vlserve.models.architecture import Architecture, Preprocessor

FLOAT32 = 4  # bytes
LOGIT_COPIES = 4  # of what is sampled from, with penalties and log-probabilities
KV_CODE, KV_SCALE = 1, 2  # bytes of a key or value in eight bits, and of the scale of a token and head
ROUTE_BYTES = 4 * FLOAT32  # of a choice of an expert: its number, weight, place in the order, and what sorting takes
SPREAD_BLOCK = 128  # inputs, in which 4-bit weights lie
# as kernels/attention/plan.py has them, whose package needs torch: a tile's rows, programs a multiprocessor, a tile's positions
MOST_ROWS, MOST_PROGRAMS, POSITIONS = 128, 16, 32
MULTIPROCESSORS, GOOD_LOAD = 132, 8  # of an H100; with so many programs for each of them no context is cut


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """The largest step of the engine, and the number types."""

    itemsize: int  # bytes
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    block_size: int
    kv_dtype: str = "auto"  # of the KV cache: the computation's, int8 or fp8
    vision_cache: int = 0  # bytes

    @classmethod
    def of(cls, config: EngineConfig, itemsize: int, max_model_len: int) -> Step:
        return cls(
            itemsize=itemsize,
            max_model_len=max_model_len,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            block_size=config.block_size,
            kv_dtype=config.kv_cache_dtype,
            vision_cache=int(config.vision_cache_gib * 2**30),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """What one rank of `tp` has of the decoder: heads, and rows rounded up (zeros beyond the end)."""

    query_heads: int
    kv_heads: int
    feed_forward: int
    shared_feed_forward: int
    vocabulary: int
    tp: int
    experts: int = 0  # of a layer that has some
    expert_width: int = 0
    adds_expert_bias: bool = True  # of what comes out of an expert; where ranks share its width, the first one adds it


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """A size that is split over the ranks."""

    dimension: str
    size: int
    per_rank: int
    padding: int  # rows of zeros, all ranks together
    copies: int = 1  # ranks that hold the same rows


def shard(decoder: DecoderShape, tp: int, rank: int = 0, *, expert_parallel: bool = False) -> Shard:
    """The decoder's sizes on a rank; the heads divide, or KV heads are replicated (one on each rank). Ranks are alike, but that
    with `expert_parallel` one may have an expert more."""
    number, given = decoder.num_experts, decoder.experts
    unit, width = (1, 0) if given is None else (given.unit, given.width)
    return Shard(
        query_heads=decoder.num_attention_heads // tp,
        kv_heads=max(1, decoder.num_key_value_heads // tp),
        feed_forward=-(-decoder.intermediate_size // tp),
        shared_feed_forward=-(-decoder.shared_intermediate_size // tp),
        vocabulary=-(-decoder.vocab_size // tp),
        tp=tp,
        experts=(rank + 1) * number // tp - rank * number // tp if expert_parallel else number,
        expert_width=width if expert_parallel else -(-width // (unit * tp)) * unit,
        adds_expert_bias=expert_parallel or rank == 0,
    )


def cuts(decoder: DecoderShape, part: Shard, tp: int, *, by_expert: bool = False) -> tuple[Cut, ...]:
    """Every size that is cut, by config.json's keys; of experts that are shared out whole, the most that a rank has."""
    shared, experts = decoder.shared_intermediate_size, decoder.experts
    rows = [
        ("num_attention_heads", decoder.num_attention_heads, part.query_heads),
        ("num_key_value_heads", decoder.num_key_value_heads, part.kv_heads),
        *([("intermediate_size", decoder.intermediate_size, part.feed_forward)] if decoder.has_dense_layers else []),
        *([(decoder.expert_width_key, experts.width, part.expert_width)] if experts is not None and not by_expert else []),
        *([("num_experts", experts.num_experts, -(-experts.num_experts // tp))] if experts is not None and by_expert else []),
        *([("shared_expert_intermediate_size", shared, part.shared_feed_forward)] if shared else []),
        ("vocab_size", decoder.vocab_size, part.vocabulary),
    ]
    copies = {"num_key_value_heads": max(1, tp // decoder.num_key_value_heads)}
    return tuple(
        Cut(
            dimension=name,
            size=size,
            per_rank=each,
            copies=copies.get(name, 1),
            padding=0 if name == "num_experts" else each * tp - size * copies.get(name, 1),
        )
        for name, size, each in rows
    )


def vision_bytes(shape: ModelShape, config: Mapping[str, Any], itemsize: int) -> tuple[int, ModelShape]:
    """Bytes of encoder and projector, and the shape; a package's model that cannot be built is one that is not supported."""
    if shape.sized is not None:
        return shape.sized(itemsize).weights, shape
    if shape.counted is not None and shape.preprocessor is not None:
        try:
            return _counted_bytes(shape.counted, config, shape.preprocessor, itemsize), shape
        except Exception as error:  # noqa: BLE001  (foreign code raises what it likes)
            reason = f"{shape.counted.origin} cannot build it: {type(error).__name__}: {error}"
            shape = replace(shape, reasons=(*shape.reasons, reason))
    if shape.encoder is None:
        notes = ("the vision encoder's weights are not counted",) if shape.image_tokens or shape.preprocessor is None else ()
        return 0, replace(shape, notes=shape.notes + notes)
    return internvit_bytes(shape.encoder, shape.decoder.hidden_size, itemsize), shape


def internvit_bytes(encoder: EncoderConfig, out_size: int, itemsize: int) -> int:
    """InternViT and the projector to `out_size`, as vision/internvit_encoder.py and vision/projector.py build them."""
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
    sinks = part.query_heads * decoder.attention_sinks * FLOAT32

    def layer_bytes(layer: int) -> int:
        def size(names: tuple[str, ...], outputs: int, inputs: int) -> int:
            return _linear_bytes(decoder, f"model.layers.{layer}.", names, outputs, inputs, itemsize)

        def feed_forward(place: str, width: int) -> int:
            names = (f"{place}.gate_proj", f"{place}.up_proj")
            return size(names, 2 * width, hidden) + size((f"{place}.down_proj",), hidden, width)

        attention = size(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), query + 2 * kv, hidden)
        attention += size(("self_attn.o_proj",), hidden, query) + sinks + (biases + norms) * itemsize
        if decoder.experts is None or layer not in decoder.experts.layers:
            mlp_biases = (2 * part.feed_forward + hidden) * decoder.mlp_bias
            return attention + feed_forward("mlp", part.feed_forward) + mlp_biases * itemsize
        experts = part.experts * feed_forward("mlp.experts.0", part.expert_width)
        return attention + experts + shared_bytes(feed_forward) + _expert_numbers(decoder, part) * itemsize

    def shared_bytes(feed_forward: Callable[[str, int], int]) -> int:
        """The expert that every token passes, with its gate."""
        if not shared:
            return 0
        return feed_forward("mlp.shared_expert", shared) + (hidden + (2 * shared + hidden) * decoder.mlp_bias) * itemsize

    shared, numbers = part.shared_feed_forward, range(decoder.num_hidden_layers)
    if decoder.quantisation is not None:
        return sum(map(layer_bytes, numbers)) + hidden * itemsize
    with_experts = decoder.experts.layers if decoder.experts is not None else ()
    dense = [layer for layer in numbers if layer not in with_experts]
    kinds = [layers for layers in (dense, with_experts) if layers]  # of which all layers are alike
    return sum(len(layers) * layer_bytes(layers[0]) for layers in kinds) + hidden * itemsize


def _expert_numbers(decoder: DecoderShape, part: Shard) -> int:
    """Numbers of the router and of the experts' biases."""
    given, hidden = decoder.experts, decoder.hidden_size
    assert given is not None
    biases = part.experts * (2 * part.expert_width + hidden * part.adds_expert_bias) * given.bias
    return given.num_experts * (hidden + given.router_bias) + biases


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
    """The rotary table, which stays, and the fullest moment of a step."""
    return step.max_model_len * shape.decoder.head_dim * FLOAT32 + step_bytes(shape, part, step, is_first=is_first)


def step_bytes(shape: ModelShape, part: Shard, step: Step, *, is_first: bool) -> int:
    """The fullest moment of a step beside all that stays; `is_first` for the rank that samples."""
    peaks = [_layer_peak(shape.decoder, part, step), _logits_peak(shape.decoder, part, step, is_first=is_first)]
    return max(*peaks, _encoder_peak(shape, part, step) if shape.has_pictures else 0)


def most_features(max_num_batched_tokens: int, max_model_len: int) -> int:
    """Of all pictures in a step together: those of a step's own tokens, and of a picture as large as a prompt may be."""
    return max_num_batched_tokens + max_model_len


def most_units(max_num_batched_tokens: int, max_model_len: int, features: int, tp: int) -> int:
    """Units of so many features each that one of `tp` ranks encodes in a step, at most."""
    return max(1, -(-most_features(max_num_batched_tokens, max_model_len) // (features * tp)))


def feature_bytes(shape: ModelShape, step: Step) -> int:
    """Pictures' features: those that are kept across requests, and those of a step, before it drops others."""
    return (step.vision_cache + _new_features(shape.decoder, step)) * shape.has_pictures


def _new_features(decoder: DecoderShape, step: Step) -> int:
    number = most_features(step.max_num_batched_tokens, step.max_model_len)
    return number * decoder.feature_levels * decoder.hidden_size * step.itemsize


def _counted_bytes(family: Architecture, config: Mapping[str, Any], preprocessor: Preprocessor, itemsize: int) -> int:
    """All but the decoder of a model, built without memory on torch's meta device."""
    import torch  # only here: a plan of what is built in needs no torch

    from vlserve.llm.tensor_parallel import Split

    with torch.device("meta"):
        model = family.build(config, preprocessor, Split())
    whole, decoder = (sum(t.numel() for t in (*m.parameters(), *m.buffers())) for m in (model, model.decoder))
    return (whole - decoder) * itemsize


def _layer_peak(decoder: DecoderShape, part: Shard, step: Step) -> int:
    """A chunk of T tokens at the end of a context of L, within one layer."""
    tokens = _step_tokens(step)
    b, hidden, width = step.itemsize, decoder.hidden_size, dense_width(decoder, part)
    query, kv = part.query_heads * decoder.head_dim, part.kv_heads * decoder.head_dim
    # embeddings; the layer's input and residual, held by the caller; this half's norm and sum; features for deeper layers
    held = (5 + decoder.feature_levels * (decoder.feature_levels > 1)) * hidden * b * tokens
    held += tokens * decoder.head_dim * FLOAT32 + _index_bytes(step, tokens)

    def product(outputs: int, inputs: int) -> int:
        """A result, and what a quantised format takes beside it."""
        return outputs * b * tokens + _spread_bytes(decoder, outputs, inputs, tokens, b)

    # query, key and value in one tensor, of which a bias makes another; the query turned; attention's result; parts of it
    projected = product(query + 2 * kv, hidden) + (query + 2 * kv) * b * tokens * decoder.qkv_bias * _is_spread(decoder)
    attention = (3 * query + 2 * kv) * b * tokens + max(_part_bytes(decoder, part, step), product(hidden, query))
    # gate and up; silu(gate) * up; the result
    feed_forward = max(product(2 * width, hidden), 3 * width * b * tokens + product(hidden, width))
    return held + max(projected, attention, feed_forward, experts_peak(decoder, part, tokens, b))


def dense_width(decoder: DecoderShape, part: Shard) -> int:
    """Of the widest part of the feed-forward halves that is no expert of a mixture."""
    return max(part.feed_forward * decoder.has_dense_layers, part.shared_feed_forward)


def experts_peak(decoder: DecoderShape, part: Shard, tokens: int, itemsize: int) -> int:
    """The router's logits, in float32 too; or what each token's experts make of it, a projection after the other."""
    given = decoder.experts
    if given is None:
        return 0
    choices, inner, out = tokens * given.top_k, part.expert_width * itemsize, decoder.hidden_size * itemsize
    routing = tokens * given.num_experts * (itemsize + FLOAT32)
    return choices * ROUTE_BYTES + max(routing, choices * max(3 * inner, inner + out), choices * out + tokens * out)


def _is_spread(decoder: DecoderShape) -> bool:
    return decoder.quantisation is not None


def _spread_bytes(decoder: DecoderShape, outputs: int, inputs: int, tokens: int, itemsize: int) -> int:
    """What the product of many tokens with quantised weights takes: the weights as numbers, or with int8 its sums in 32 bits."""
    if decoder.quantisation is None:
        return 0
    if decoder.quantisation.kind == INT8:
        return 2 * FLOAT32 * outputs * tokens
    return outputs * -(-inputs // SPREAD_BLOCK) * SPREAD_BLOCK * itemsize


def _part_bytes(decoder: DecoderShape, part: Shard, step: Step) -> int:
    """Of attention over long contexts, which are cut so that all multiprocessors have work (kernels/attention/plan.py)."""
    group = max(1, part.query_heads // part.kv_heads)
    tokens = max(1, MOST_ROWS // group)
    programs = -(-_step_tokens(step) // tokens) * part.kv_heads
    most = max(MOST_PROGRAMS * MULTIPROCESSORS, 2 * programs) if programs < GOOD_LOAD * MULTIPROCESSORS else 0
    most = min(most, programs * -(-step.max_model_len // POSITIONS))
    return most * tokens * group * (decoder.head_dim + 1) * FLOAT32


def _logits_peak(decoder: DecoderShape, part: Shard, step: Step, *, is_first: bool) -> int:
    """Logits of R rows. The first rank gathers them, makes them float32 and samples."""
    tokens, b = _step_tokens(step), step.itemsize
    rows = min(step.max_num_seqs, tokens)
    held = (2 * tokens + rows) * decoder.hidden_size * b  # embeddings, hidden states, the rows to sample
    own, whole = rows * part.vocabulary * b, rows * decoder.vocab_size
    if not is_first:
        return held + own
    gathered = (own + 2 * whole * b) if part.vocabulary < decoder.vocab_size else 0
    sampling = whole * (LOGIT_COPIES * FLOAT32 + 1)  # and what grammars allow
    return max(held + max(gathered, own + whole * (b + FLOAT32)), sampling)


def _encoder_peak(shape: ModelShape, part: Shard, step: Step) -> int:
    """This rank's share of a step's tiles in the encoder, TILES_AT_ONCE of them, or a copy of all new features, while the step's
    embeddings wait."""
    encoder, decoder, tokens = shape.encoder, shape.decoder, _step_tokens(step)
    features = _new_features(decoder, step)
    waiting = tokens * decoder.hidden_size * step.itemsize + _index_bytes(step, tokens)
    if shape.sized is not None:
        return waiting + max(shape.sized(step.itemsize).peak, features)
    if encoder is None:  # only its own code knows: it is measured
        return waiting + features
    share = most_units(step.max_num_batched_tokens, step.max_model_len, encoder.tokens_per_tile, part.tp)
    return waiting + max(min(TILES_AT_ONCE, share) * tile_bytes(encoder, decoder, step.itemsize), features)


def tile_bytes(encoder: EncoderConfig, decoder: DecoderShape, itemsize: int) -> int:
    """A tile in the encoder, from its uint8 numbers to its features, at the fullest moment."""
    b, width, pixels, patches = itemsize, encoder.hidden_size, 3 * encoder.image_size**2, _positions(encoder)
    # the encoder's input, the sum so far and the norm of it; feed-forward before and after GELU
    feed_forward = (3 * width + 2 * encoder.intermediate_size) * b
    # the encoder's input, the block's, its norm, query, key and value, the result, its projection; norms of query and key
    attention = (8 + 2 * encoder.use_qk_norm) * width * b
    projector = 3 * patches * width * b + 3 * encoder.tokens_per_tile * decoder.hidden_size * b  # and three layers' results
    normalise = pixels * (1 + 2 * FLOAT32)  # uint8, and two steps in float32
    return max(pixels * b + max(patches * max(feed_forward, attention), projector), normalise)


def _step_tokens(step: Step) -> int:
    return min(step.max_num_batched_tokens, step.max_model_len * step.max_num_seqs)


def _index_bytes(step: Step, tokens: int) -> int:
    """Ids, positions and slots of the tokens, the sequences' lengths and block tables; int64."""
    return 8 * (3 * tokens + 3 * step.max_num_seqs + step.max_num_seqs * -(-step.max_model_len // step.block_size))


def _positions(encoder: EncoderConfig) -> int:
    """Patches of a tile and the class token."""
    return (encoder.image_size // encoder.patch_size) ** 2 + 1
