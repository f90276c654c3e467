"""Several ranks, each on a card that is not there: they answer as the CPU does, and take part in the same collectives."""

from __future__ import annotations

import contextlib
import itertools
import socket
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.engine.ranks import tp_engine
from tests.engine.reference import add, engine, prompt, run
from tests.engine.test_laws import picture
from tests.engine.test_tensor_parallel import small_cache
from tests.llm.quantised import awq, rewrite
from tests.rehearsal import interpreter
from tests.rehearsal.collectives import GLOO, LAUNCHED, NCCL, ONE_SHOT, RECORDED, REPLAYED, Collective, Collectives
from tests.rehearsal.cuda import H100, Rehearsal, install
from tests.rehearsal.device import DeviceError
from tests.rehearsal.engines import READ, make_tiny, tokens
from tests.rehearsal.engines import RECORDED as GRAPH_RECORDED
from tests.rehearsal.launches import Launches
from vlserve.config import EngineConfig, SamplingParams
from vlserve.engine import engine as engine_module
from vlserve.engine import preflight
from vlserve.engine.engine import Engine, Seat
from vlserve.engine.messages import TokenEvent
from vlserve.engine.process_group import CollectiveError
from vlserve.engine.runner import Runner
from vlserve.kernels import gate, norms, rotary
from vlserve.prompt.build import Prompt
from vlserve.vision import tower

OPTIONS: dict[str, Any] = {"max_num_seqs": 3, "max_num_batched_tokens": 16, "max_model_len": 48, "block_size": 4}
SUMS = {"embedding", "o_proj", "down_proj"}  # the only collectives of a decode step's graph
HOST = {"batch", "batch_rest", "kv cache", "graphs", "one-shot vote", "check"}  # what is said over the host
GATHERED = {"features": "all_gather", "warm-up": "all_gather", "logits": "gather", "tokens": "broadcast"}
MAX_TOKENS = 6
Tokens = dict[int, list[int | None]]  # by request


@dataclass(frozen=True)
class Machine:
    """An engine on several rehearsed cards."""

    engine: Engine
    runners: list[Runner]
    cards: Rehearsal
    ranks: Collectives

    def waits(self, rank: int) -> Counter[str]:
        """As `tests.rehearsal.engines.waits`, of one rank."""
        return Counter(place.rpartition(":")[0] for place in self.cards.shared.waits_for.get(rank, []))

    def forget_waits(self) -> None:
        self.cards.shared.waits_for.clear()


@contextlib.contextmanager
def cards(number: int, tp: int = 2) -> Iterator[tuple[Rehearsal, Collectives]]:
    """Few multiprocessors and few tiles at once: the interpreter is soon through with them."""
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        found = Rehearsal(replace(H100, multi_processor_count=2), number)
        install(patch, found)
        Launches(found.shared).install(patch)
        interpreter.install(patch)
        patch.setattr(tower, "TILES_AT_ONCE", 1)
        for module in (norms, rotary, gate):  # by torch's operators: other tests launch their kernels
            patch.setattr(module, "runs_triton", lambda x: False)
        ranks = Collectives(found, Path(folder), tp)
        ranks.install(patch)
        yield found, ranks


@contextlib.contextmanager
def machine(folder: Path, tp: int = 2, *, num_cards: int | None = None, **options: Any) -> Iterator[Machine]:
    with (
        cards(num_cards or tp, tp) as (found, ranks),
        tp_engine(folder, tp, seated=ranks.seated, device="cuda", **{**OPTIONS, **options}) as (ours, runners),
    ):
        made = Machine(ours, runners, found, ranks)
        made.forget_waits()
        yield made


def together(ranks: Collectives, work: Callable[[Seat], Any], tp: int = 2) -> list[Any]:
    """What `work` gives on each rank, without an engine."""

    def sit(rank: int) -> Any:
        with ranks.seated(EngineConfig(model="none", tp=tp, device="cuda"), rank) as seat:
            return work(seat)

    with ThreadPoolExecutor(tp) as threads:
        return list(threads.map(sit, range(tp)))


def answers(ours: Engine, prompts: list[Prompt], *, without: int | None = None) -> Tokens:
    """Tokens by request; `without` is aborted when it has begun to answer."""
    got: dict[int, list[TokenEvent]] = {}
    for i, one in enumerate(prompts):
        add(ours, i, one, SamplingParams(ignore_eos=True), MAX_TOKENS)
    while without is not None and without not in got:
        for event in ours.step():
            got.setdefault(event.id, []).append(event)
    if without is not None:
        ours.abort([without])
    for id, events in run(ours).items():
        got.setdefault(id, []).extend(events)
    return {id: of_one for id, of_one in tokens(got).items() if id != without}


def check(ranks: Collectives) -> Counter[tuple[str, str, str]]:
    """All ranks were in the same collectives, and only those were recorded that a graph may hold; by kind, carrier and how."""
    first = ranks.written[0]
    assert all(written == first for written in ranks.written)
    recorded = list[list[Collective]]()
    for how, of_one in itertools.groupby(first, lambda one: one.how):
        run = [replace(one, how=RECORDED) for one in of_one]
        if how == RECORDED:
            recorded.append(run)
        elif how == REPLAYED:
            assert run in recorded
        if how != LAUNCHED:
            assert {one.kind for one in run} == SUMS and all(one.carrier != GLOO for one in run)
    for one in first:
        assert one.kind in SUMS | HOST | GATHERED.keys(), one
        assert one.operation == GATHERED.get(one.kind, one.operation), one
    return Counter((one.kind, one.carrier, one.how) for one in first)


@pytest.fixture(scope="module")
def prompts(tiny: Path) -> list[Prompt]:
    """A picture of three tiles; text; one of one tile beside the first again; text."""
    sets = ([picture(1)], [], [picture(2, (14, 14)), picture(1)], [])
    return [prompt(tiny, text, images) for text, images in zip(("How many?", "Who?", "And?", "Why not?"), sets, strict=True)]


@pytest.fixture(scope="module")
def on_the_cpu(tiny: Path, prompts: list[Prompt]) -> Tokens:
    return answers(engine(tiny, device="cpu"), prompts)


@pytest.fixture(scope="module")
def thin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of one layer."""
    return make_tiny(tmp_path_factory.mktemp("thin"), num_hidden_layers=1)


@pytest.fixture(scope="module")
def thin_on_the_cpu(thin: Path, prompts: list[Prompt]) -> Tokens:
    """The first prompt's alone."""
    return answers(engine(thin, device="cpu"), prompts[:1])


def test_two_ranks_answer_as_the_cpu_and_only_the_first_waits(tiny: Path, prompts: list[Prompt], on_the_cpu: Tokens) -> None:
    """Pictures dealt out, chunks, preemption, an abort, graphs, and sums through symmetric memory."""
    with machine(tiny, kv_cache_gib=small_cache(tiny, 2, 12, 4)) as made:
        got = answers(made.engine, prompts, without=1)
        assert made.engine.scheduler.num_preemptions > 0 and made.engine.overlaps
        waits = [made.waits(rank) for rank in range(2)]
    assert got == {id: on_the_cpu[id] for id in (0, 2, 3)}
    seen = check(made.ranks)
    assert seen["features", NCCL, LAUNCHED] == 2 and seen["o_proj", ONE_SHOT, REPLAYED] > seen["o_proj", ONE_SHOT, RECORDED] > 0
    assert not any(carrier == NCCL for kind, carrier, _ in seen if kind in SUMS)
    assert waits[0].pop(READ) == seen["tokens", NCCL, LAUNCHED], "once for each step that samples"
    assert all(of_one.keys() <= {GRAPH_RECORDED} for of_one in waits)


def test_sums_that_go_over_nccl_are_recorded_as_well(thin: Path, prompts: list[Prompt], monkeypatch: pytest.MonkeyPatch) -> None:
    """With a cache of 8 bits."""
    monkeypatch.setenv("NCCL_P2P_DISABLE", "1")
    options: dict[str, Any] = {"kv_cache_dtype": "int8", "kv_cache_gib": 0.001}
    want = answers(engine(thin, device="cpu", **options), prompts[:1])
    with machine(thin, **options) as made:
        assert answers(made.engine, prompts[:1]) == want
    seen = check(made.ranks)
    assert seen["o_proj", NCCL, REPLAYED] > 0 and not any(carrier == ONE_SHOT for _, carrier, _ in seen)


def test_where_one_rank_cannot_record_none_replays(thin: Path, prompts: list[Prompt], thin_on_the_cpu: Tokens) -> None:
    """And none waits for it in a recording."""

    def broken(work: Callable[[], None]) -> Callable[[], None]:
        raise RuntimeError("no memory is left for a graph")

    with machine(thin) as made:
        graphs: Any = [runner.decodes and runner.decodes.graphs for runner in made.runners]
        graphs[1]._recorder = SimpleNamespace(record=broken, num_free_bytes=1)
        assert answers(made.engine, prompts[:1]) == thin_on_the_cpu
        assert [of_rank.recorded for of_rank in graphs] == [(), ()]
    assert any(one.how == RECORDED for one in made.ranks.written[0]) and made.ranks.written[0] != made.ranks.written[1]


def test_quantised_ranks_without_graphs(thin: Path, prompts: list[Prompt], tmp_path: Path) -> None:
    folder, dense = rewrite(thin, tmp_path, awq(16))
    with machine(folder, enforce_eager=True, overlap=False) as made:
        assert answers(made.engine, prompts[1:2]) == answers(engine(dense, device="cpu"), prompts[1:2])
    assert {how for *_, how in check(made.ranks)} == {LAUNCHED}


def test_four_ranks_are_in_the_same_collectives(thin: Path, prompts: list[Prompt], thin_on_the_cpu: Tokens) -> None:
    with machine(thin, 4, replicate_kv_heads=True) as made:
        assert answers(made.engine, prompts[:1]) == thin_on_the_cpu
    assert check(made.ranks)["o_proj", ONE_SHOT, REPLAYED] > 0


def test_ranks_of_two_machines(thin: Path, prompts: list[Prompt], thin_on_the_cpu: Tokens) -> None:
    """Rank 1 gets its tiles from rank 0, over the host, and no memory is shared."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{probe.getsockname()[1]}"
    with machine(thin, nnodes=2, rdzv_endpoint=endpoint, enforce_eager=True) as made:
        assert answers(made.engine, prompts[:1]) == thin_on_the_cpu
        assert [runner.device.index for runner in made.runners] == [0, 0]
    assert not any(carrier == ONE_SHOT for _, carrier, _ in check(made.ranks))


def test_two_ranks_on_one_device_wait_in_every_collective(
    thin: Path, prompts: list[Prompt], thin_on_the_cpu: Tokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "resolve_device", lambda config, local_rank: torch.device("cuda", 0))
    with machine(thin, num_cards=1) as made:
        assert made.engine.runner.decodes is None
        before = [len(written) for written in made.ranks.written]
        assert answers(made.engine, prompts[:1]) == thin_on_the_cpu
        waits = made.waits(0)
    check(made.ranks)
    after = [one for written, start in zip(made.ranks.written, before, strict=True) for one in written[start:]]
    number = sum(one.kind not in HOST for one in after)
    assert sum(count for place, count in waits.items() if place.startswith("Gloo's")) == number > 0


def test_a_preflight_times_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "SIZES", (2**13, 2**21))
    with cards(2) as (_, ranks):
        times = together(ranks, lambda seat: preflight.time_all_reduce(seat.group, torch.device("cuda", seat.local_rank), print))
    assert [[one.num_bytes for one in of_rank] for of_rank in times] == [[2**13, 2**21]] * 2
    sums = Counter(one.carrier for one in ranks.written[0] if one.kind == "preflight")
    assert sums[ONE_SHOT] > 0 and sums[NCCL] > 0, "small ones in one kernel, and large ones not"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_rank_that_leaves_out_a_collective_is_found_at_once(thin: Path, prompts: list[Prompt]) -> None:
    found = pytest.raises(CollectiveError, match="rank 0 (is )?in 'o_proj' .*the collective")
    with found, machine(thin, enforce_eager=True) as made:
        group, left_out = made.runners[1].group, list[str]()
        all_reduce = group.all_reduce

        def forgetful(x: torch.Tensor, kind: str) -> torch.Tensor:
            if kind == "o_proj" and not left_out:
                left_out.append(kind)
                return x
            return all_reduce(x, kind)

        group.all_reduce = forgetful  # type: ignore[method-assign]
        answers(made.engine, prompts[1:2])


@pytest.fixture
def nccl() -> Iterator[Any]:
    """Rank 0's group of two; nobody comes to meet it."""
    with cards(2) as (found, ranks), found.entered():
        ranks.here.rank, ranks.here.kind = 0, "o_proj"
        yield dist.ProcessGroupNCCL(dist.HashStore(), 0, 2, dist.ProcessGroupNCCL.Options())


def test_nccl_refuses_what_it_cannot_carry(nccl: Any) -> None:
    def there(*shape: int, index: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=torch.device("cuda", index))

    options = dist.AllreduceOptions()
    for wrong, message in (
        (torch.zeros(4), "a tensor of the host in 'o_proj'"),
        (there(4, index=1), "on cuda:1 by a rank whose device is not that"),
        (there(4, 4).T, "not contiguous in 'o_proj'"),
        (there(4, dtype=torch.int16), "nccl has no torch.int16"),
    ):
        with pytest.raises(DeviceError, match=message):
            nccl.allreduce([wrong], options)
    gather = dist.GatherOptions()
    gather.rootRank = 1
    with pytest.raises(DeviceError, match="outputs on its root and none elsewhere"):
        nccl.gather([[there(4), there(4)]], [there(4)], gather)
    with pytest.raises(DeviceError, match="one flat output of 2 times the input"):
        nccl._allgather_base(there(7), there(4))


def test_no_graph_holds_what_goes_over_the_host_or_makes_a_communicator(nccl: Any) -> None:
    options = dist.AllreduceOptions()
    host = dist.ProcessGroupGloo(dist.HashStore(), 0, 2, None)
    refused = pytest.raises(DeviceError, match="'o_proj' goes over the host while a graph is recorded")
    with refused, torch.cuda.graph(torch.cuda.CUDAGraph()):
        host.allreduce([torch.zeros(1)], options)
    refused = pytest.raises(DeviceError, match="communicator would be made while a graph is recorded")
    with refused, torch.cuda.graph(torch.cuda.CUDAGraph()):
        nccl.allreduce([torch.zeros(4, device="cuda")], options)
