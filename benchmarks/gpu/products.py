"""Products with 4-bit weights, and their dequantisation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F

from benchmarks.gpu import rivals
from benchmarks.gpu.cards import Card
from benchmarks.gpu.case import Built, Case, Rival
from benchmarks.gpu.counted import Counted, counted
from benchmarks.gpu.predict import Grid, Kernel
from benchmarks.gpu.sizes import GROUP, Sizes, Work, int4_bytes
from vlserve.kernels.group_sums import group_sums
from vlserve.kernels.group_sums.reference import INPUTS
from vlserve.kernels.int4.reference import awq_dequantize_ref, awq_matmul_ref
from vlserve.kernels.int4_pairs import ROWS, PairedWeights, pack_for_gpu
from vlserve.kernels.int4_pairs.launch import Launch, choose, split
from vlserve.kernels.int4_pairs.reference import unpack_pairs
from vlserve.kernels.measure import by_outputs
from vlserve.kernels.with_triton import runs_triton

TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16"}
REDUCED, SUMMED = 256, 16  # int4_pairs.triton's, which only imports where Triton is
FEW, MANY, DENSE = (1, 16), (32, 64, 128), (1024,)  # rows
Given = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def product_cases(sizes: Sizes, *, quick: bool = False) -> Iterator[Case]:
    for name, (outputs, inputs) in sizes.linears.items():
        for rows in (1, 64) if quick else (*FEW, *MANY, *DENSE):
            yield product(sizes.name, f"{name} {outputs} x {inputs}", outputs, inputs, rows)
        if not quick:
            yield spread_out(sizes.name, f"{name} {outputs} x {inputs}", outputs, inputs)
    if not quick:  # the other arithmetic
        outputs, inputs = sizes.linears["qkv_proj"]
        for rows in (16, 64):
            yield product(sizes.name, f"qkv_proj {outputs} x {inputs}", outputs, inputs, rows, torch.float16)


def weights(outputs: int, inputs: int, device: torch.device, dtype: torch.dtype) -> Given:
    codes = torch.randint(0, 256, (outputs, inputs // 2), dtype=torch.uint8, device=device)
    scales = (torch.rand(outputs, inputs // GROUP, device=device) / 100 + 0.001).to(dtype)
    return codes, scales, torch.randint(0, 16, scales.shape, dtype=torch.uint8, device=device)


def product(model: str, name: str, outputs: int, inputs: int, rows: int, dtype: torch.dtype = torch.bfloat16) -> Case:
    """x [T, K] times 4-bit weights [N, K]^T; but for the output projection's, what makes x brings its sums."""
    is_dense, is_summed = rows > ROWS, has_sums(name)

    def plan(arch: int, multiprocessors: int) -> str:
        if rows > ROWS:
            return "spread out, then torch's product"
        chosen, parts = launched(outputs, inputs, rows, dtype, arch, multiprocessors)
        programs = -(-outputs // chosen.block_n), -(-rows // chosen.block_t), parts
        text = f"{programs} programs of {chosen.block_t} x {chosen.block_n}, {chosen.warps} warps, {chosen.stages} stages"
        return f"{text}, {machine_code(chosen, dtype, f'sm_{arch}').per_number:g} instructions a weight"

    def build(device: torch.device) -> Built:
        given, x = weights(outputs, inputs, device, dtype), torch.randn(rows, inputs, device=device).to(dtype)
        packed = pack_for_gpu(*given)
        sums = group_sums(x, packed.empty_sums(x)) if is_summed and not is_dense else None
        return Built(
            run=partial(packed.matmul, x, sums),
            want=lambda: by_outputs(partial(awq_matmul_ref, x.double()), *given),
            rivals=lambda: int4_rivals(x, given, packed),
        )

    kind = "AWQ, dense path" if is_dense else "AWQ product"
    return Case(
        model=model,
        kernel=kind if dtype == torch.bfloat16 else f"{kind}, float16",
        shape=f"{name}, {rows} rows",
        work=Work(int4_bytes(outputs * inputs) + 2 * rows * (inputs + outputs), 2 * rows * outputs * inputs),
        plan=plan,
        kernels=lambda card: product_kernels(card, outputs, inputs, rows, dtype, is_summed=is_summed),
        build=build,
    )


def has_sums(name: str) -> bool:
    """Whether what makes the inputs of the product of that name brings their groups' sums."""
    return not name.startswith("o_proj")


def launched(outputs: int, inputs: int, rows: int, dtype: torch.dtype, arch: int, multiprocessors: int) -> tuple[Launch, int]:
    """How, and in how many parts."""
    chosen = choose(f"sm_{arch}", rows, outputs, dtype)
    programs = -(-outputs // chosen.block_n) * -(-rows // chosen.block_t)
    return chosen, split(chosen, programs, -(-inputs // INPUTS), multiprocessors)


def product_kernels(
    card: Card, outputs: int, inputs: int, rows: int, dtype: torch.dtype = torch.bfloat16, *, is_summed: bool
) -> list[Kernel]:
    """Sums of x's groups, unless they are there; the product; and where the inputs are split, the sum of the parts."""
    if rows > ROWS:
        return [spread_out_kernel(card, outputs, inputs), dense_kernel(outputs, inputs, rows)]
    chosen, parts = launched(outputs, inputs, rows, dtype, card.arch, card.multiprocessors)
    types, blocks = TYPES[dtype], -(-inputs // INPUTS)
    tiles = -(-outputs // chosen.block_n), -(-rows // chosen.block_t)
    code = machine_code(chosen, dtype, card.architecture)
    block = int4_bytes(chosen.block_n * INPUTS)  # what a program reads for each block of inputs, beside x and its sums
    results = rows * outputs  # parts stay in L2
    main = Kernel(
        bytes=int4_bytes(outputs * inputs) + 2 * rows * inputs + (2 * results if parts == 1 else 0),
        flops=2 * rows * outputs * inputs,
        instructions=code.per_number * tiles[1] * outputs * inputs,
        through_l2=tiles[0] * blocks * (tiles[1] * block + rows * (2 * INPUTS + 4)) + (4 * parts * results if parts > 1 else 0),
        grid=Grid(
            programs=tiles[0] * tiles[1] * parts, ahead=(chosen.stages - 1) * block / tiles[1], warps=chosen.warps, counted=code
        ),
    )
    found = [main] if is_summed else [sums_kernel(card, types, inputs, rows), main]
    return found if parts == 1 else [*found, adding_kernel(card, types, outputs * rows, parts)]


def machine_code(launch: Launch, dtype: torch.dtype, architecture: str) -> Counted:
    setting = f"group {GROUP}, {launch.block_t} x {launch.block_n}, {launch.warps} warps, {launch.stages} stages"
    return counted("4-bit product", TYPES[dtype], setting, architecture)


def sums_kernel(card: Card, types: str, inputs: int, rows: int) -> Kernel:
    programs, num_bytes = -(-inputs // INPUTS // SUMMED) * rows, 2 * rows * inputs
    code = counted("group sums", types, "2 groups", card.architecture)
    return Kernel(bytes=num_bytes, grid=Grid(programs=programs, ahead=num_bytes / programs, warps=4, counted=code))


def adding_kernel(card: Card, types: str, size: int, parts: int) -> Kernel:
    """Parts are read from L2, four at a time."""
    programs = -(-size // REDUCED)
    code = counted("parts added up", types, "", card.architecture)
    grid = Grid(programs=programs, ahead=2 * size / programs, warps=4, counted=code)
    return Kernel(bytes=2 * size, through_l2=4 * parts * size, waits=1 + -(-parts // 4), grid=grid)


def dense_kernel(outputs: int, inputs: int, rows: int) -> Kernel:
    """torch's product in 16 bits."""
    return Kernel(bytes=2 * (outputs * inputs + rows * (inputs + outputs)), flops=2 * rows * outputs * inputs)


def int4_rivals(x: torch.Tensor, given: Given, packed: PairedWeights) -> Iterator[Callable[[], Rival]]:
    def dense() -> Rival:
        weight = _spread_out(packed)[:, : packed.inputs].contiguous()
        return Rival(name="F.linear", run=lambda: F.linear(x, weight))

    yield dense
    if x.dtype == torch.bfloat16:
        yield lambda: rivals.int4pack(x, *given)
        yield lambda: rivals.gemlite(x, *given)
    yield lambda: rivals.marlin(len(given[0]), x)


def spread_out(model: str, name: str, outputs: int, inputs: int) -> Case:
    """4-bit weights as bfloat16."""

    def build(device: torch.device) -> Built:
        given = weights(outputs, inputs, device, torch.bfloat16)
        packed = pack_for_gpu(*given)
        return Built(
            run=lambda: _spread_out(packed),
            want=lambda: torch.cat([awq_dequantize_ref(c, s.double(), z) for c, s, z in _pieces(given)]),
        )

    return Case(
        model=model,
        kernel="AWQ dequantise",
        shape=name,
        work=Work(int4_bytes(outputs * inputs) + 2 * outputs * inputs, 0),
        plan=lambda arch, multiprocessors: f"{(-(-outputs // 64), -(-inputs // INPUTS))} programs",
        kernels=lambda card: [spread_out_kernel(card, outputs, inputs)],
        build=build,
    )


def spread_out_kernel(card: Card, outputs: int, inputs: int) -> Kernel:
    programs, num_bytes = -(-outputs // 64) * -(-inputs // INPUTS), int4_bytes(outputs * inputs) + 2 * outputs * inputs
    code = counted("pairs spread out", "bf16", f"group {GROUP}", card.architecture)
    return Kernel(bytes=num_bytes, grid=Grid(programs=programs, ahead=num_bytes / programs, warps=4, counted=code))


def _pieces(given: Given) -> Iterator[Given]:
    yield from zip(*(tensor.split(4096) for tensor in given), strict=True)


def _spread_out(packed: PairedWeights) -> torch.Tensor:
    if runs_triton(packed.words):
        from vlserve.kernels.int4_pairs.triton import pairs_dequantize_triton

        return pairs_dequantize_triton(packed)
    return awq_dequantize_ref(*unpack_pairs(packed))
