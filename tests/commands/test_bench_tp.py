"""`vlserve bench tp`: the advice follows from the figures, and the command measures, shows and leaves nothing behind."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import signal
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from PIL import Image

from tests.checkpoints import make_tokenizer
from tests.commands.test_main import vlserve
from tests.settling import PATIENCE_S, is_alive, wait_until
from tests.test_structure import loaded_by
from vlserve import Completion, ConfigError, EngineError, Timing, Usage
from vlserve.commands import bench, bench_report
from vlserve.commands.bench_advice import Advice, advise
from vlserve.commands.bench_measure import Degree, Load, PromptMaker, Repetition, Row, num_answers, summarise
from vlserve.commands.main import main

LOAD = Load(requests=4, concurrency=(1, 2), pictures=1, picture_size=(60, 30), prompt_tokens=20, answer_tokens=8, repetitions=3)
SMALL = ["--requests", "2", "--concurrency", "1,2", "--repetitions", "2", "--picture-size", "60x30"]
SMALL += ["--prompt-tokens", "20", "--answer-tokens", "5", "--kv-cache-gib", "0.05", "--dtype", "float32"]


def degree(
    tp: int, answer_s: float, tokens_per_s: float, *, share: float | None = None, spread: float = 0.0, device: str = "cuda:0"
) -> Degree:
    """Made up: `answer_s` with 1 request at once, `tokens_per_s` with 16."""

    def row(concurrency: int) -> Row:
        return Row(
            tp=tp,
            concurrency=concurrency,
            requests_per_s=1.0,
            tokens_per_s=tokens_per_s if concurrency == 16 else 64 / answer_s,
            answer_s=answer_s * concurrency,
            ttft_s=answer_s / 10,
            token_s=answer_s / 70,
            comm_share=share,
            spread=spread,
        )

    return Degree(
        tp=tp,
        device=device,
        dtype="bfloat16",
        load_s=1.0,
        kv_tokens=1000,
        prompt_tokens=300,
        image_tokens=256,
        device_bytes=[{"decoder": 2**34 // tp, "kv_cache": 2**33}] * tp,
        rows=[row(1), row(16)],
    )


def advice(*degrees: Degree, separate: bool = True) -> dict[str, Advice]:
    return {one.topic: one for one in advise(degrees, devices_are_separate=separate)}


def test_the_fastest_answer_names_the_degree_for_latency() -> None:
    found = advice(degree(1, 1.0, 1000), degree(2, 0.6, 1500), degree(4, 0.4, 2000))
    assert found["latency"].tp == 4
    assert "1 s (tp 1), 0.6 s (tp 2), 0.4 s (tp 4)" in found["latency"].text


@pytest.mark.parametrize("answer_s,spread,winner", [(0.97, 0.0, 1), (0.9, 0.0, 2), (0.9, 0.2, 1)])
def test_what_noise_explains_goes_to_the_smaller_degree(answer_s: float, spread: float, winner: int) -> None:
    assert advice(degree(1, 1.0, 1000), degree(2, answer_s, 1500, spread=spread))["latency"].tp == winner


def test_replicas_are_named_where_a_degree_does_less_per_device() -> None:
    found = advice(degree(1, 1.0, 1000), degree(2, 0.6, 1500), degree(4, 0.4, 2000))
    assert found["throughput_per_device"].tp == 1
    assert "1000 (tp 1), 750 (tp 2), 500 (tp 4)" in found["throughput_per_device"].text
    assert found["replicas"].tp == 1
    assert "4 devices give 2000 tokens/s as tp 4, and would give up to 4000 as 4 servers of tp 1" in found["replicas"].text
    assert "not measured" in found["replicas"].text


def test_replicas_are_of_the_best_degree_and_only_where_they_divide() -> None:
    """tp 1 has little room for its cache here."""
    found = advice(degree(1, 1.0, 300), degree(2, 0.6, 1500), degree(3, 0.5, 1600), degree(4, 0.4, 2000))
    assert found["throughput_per_device"].tp == 2 and found["replicas"].tp == 2
    assert "3 devices" not in found["replicas"].text and "2 servers of tp 2" in found["replicas"].text


def test_replicas_are_not_named_where_a_degree_does_as_much_per_device() -> None:
    found = advice(degree(1, 1.0, 1000), degree(2, 0.6, 1980))
    assert found["replicas"].tp is None and "no clearly better" in found["replicas"].text


def test_shared_cores_say_nothing_of_devices() -> None:
    found = advice(degree(1, 1.0, 1000), degree(2, 0.6, 1500), separate=False)
    assert "throughput_per_device" not in found and found["replicas"].tp is None and "--threads" in found["replicas"].text


def test_a_degree_that_only_loses_is_named() -> None:
    found = advise([degree(1, 1.0, 1000), degree(2, 0.6, 1500), degree(4, 0.9, 1400)], devices_are_separate=True)
    slower = [one for one in found if one.topic == "slower"]
    assert [one.tp for one in slower] == [4] and "slower than tp 2" in slower[0].text
    assert advice(degree(1, 1.0, 1000), degree(2, 1.4, 700))["slower"].tp == 2
    assert "slower" not in advice(degree(1, 1.0, 1000), degree(2, 1.4, 1500)), "it gains throughput"
    assert "slower" not in advice(degree(1, 1.0, 1000), degree(2, 1.0, 1000)), "it loses nothing"


def test_much_communication_is_named_also_for_a_single_degree() -> None:
    found = advice(degree(1, 1.0, 1000, share=0.0), degree(2, 0.6, 1500, share=0.29), degree(4, 0.5, 1600, share=0.456))
    assert found["communication"].tp == 4 and "46%" in found["communication"].text
    alone = advice(degree(2, 0.6, 1500, share=0.5))
    assert alone.keys() == {"comparison", "communication"} and "Only tp 2" in alone["comparison"].text


def test_memory_is_said_by_degree() -> None:
    assert "16,384 MiB (tp 1), 8,192 MiB (tp 2)" in advice(degree(1, 1.0, 1000), degree(2, 0.6, 1500))["memory"].text


def test_noisy_figures_are_said_to_be_noisy() -> None:
    found = advice(degree(1, 1.0, 1000, spread=0.1), degree(2, 0.6, 1500, spread=0.5))
    assert found["noise"].tp == 2 and "50%" in found["noise"].text
    assert "noise" not in advice(degree(1, 1.0, 1000, spread=0.1)) and "noise" in advice(degree(1, 1.0, 1000, spread=0.9))


def completion(ttft_s: float, total_s: float, tokens: int = 5) -> Completion:
    return Completion(
        text="",
        token_ids=(0,) * tokens,
        finish_reason="length",
        usage=Usage(prompt_tokens=9, completion_tokens=tokens, image_tokens=4, cached_tokens=0),
        timing=Timing(prepare_s=0, queue_s=0, encode_s=0, ttft_s=ttft_s, total_s=total_s),
    )


def test_a_row_has_the_medians_of_repetitions() -> None:
    repetitions = [
        Repetition(seconds=1.0, answers=[completion(0.1, 0.5), completion(0.3, 0.7)], step_s=1.0, comm_s=0.25),
        Repetition(seconds=2.0, answers=[completion(0.2, 1.0), completion(0.2, 1.0)], step_s=2.0, comm_s=0.2),
        Repetition(seconds=4.0, answers=[completion(0.5, 2.5), completion(0.5, 2.5)], step_s=4.0, comm_s=2.0),
    ]
    row = summarise(2, 2, repetitions)
    assert (row.requests_per_s, row.tokens_per_s, row.tokens_per_s_per_device) == (1.0, 5.0, 2.5)
    assert (row.answer_s, row.ttft_s, row.token_s) == pytest.approx((1.0, 0.2, 0.2))
    assert row.comm_share == 0.25 and row.spread == pytest.approx((10 - 2.5) / 5)
    unmeasured = [Repetition(seconds=1.0, answers=[completion(0.1, 0.5)], step_s=0.0, comm_s=0.0)]
    assert summarise(1, 1, unmeasured).comm_share is None


def test_prompts_are_the_same_for_every_degree_and_none_comes_twice() -> None:
    tokenizer = make_tokenizer()

    def made() -> list[tuple[str, bytes]]:
        make = PromptMaker(lambda text: tokenizer.encode(text).ids, LOAD)
        return [(text, picture.tobytes()) for text, (picture,) in make(3) + make(3)]

    prompts = made()
    assert prompts == made() and len({text for text, _ in prompts}) == len({pixels for _, pixels in prompts}) == 6
    for text, pixels in prompts:
        assert LOAD.prompt_tokens <= len(tokenizer.encode(" " + text).ids) <= LOAD.prompt_tokens + 8
        assert len(pixels) == 60 * 30 * 3


def test_the_plot_and_the_tables_show_several_degrees(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    degrees = [degree(1, 1.0, 1000), degree(2, 0.6, 1500, share=0.2), degree(4, 0.4, 2000, share=0.4)]
    bench_report.draw(degrees, "made up", tmp_path / "plot.png")
    with Image.open(tmp_path / "plot.png") as picture:
        picture.load()
        assert picture.format == "PNG" and len(picture.convert("L").getcolors() or []) > 10
    lines = [line for one in degrees for line in bench_report.lines(one)]
    assert len(lines) == 6 and {len(line) for line in lines} == {len(bench_report.header())}
    assert len(list(bench_report.memory_lines(degrees))) == 1 + 1 + 2 + 4


def test_a_plot_that_cannot_be_made_is_refused_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path, message in ((tmp_path / "plot.txt", ".png, .svg, .pdf"), (tmp_path / "no" / "plot.png", "no folder")):
        with pytest.raises(ConfigError, match=message):
            bench_report.check_plot(path)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r'extra "bench": pip install "vlserve\[bench\]"'):
        bench_report.check_plot(tmp_path / "plot.png")


@pytest.mark.parametrize("degrees,wrong", [((1, 3), "3"), ((2, 4, 5), "4")])
def test_degrees_that_the_model_cannot_have_are_named(
    checkpoint: Callable[..., Path], degrees: tuple[int, ...], wrong: str
) -> None:
    message = f"tp={wrong} does not work: .*6 query heads, 2 KV heads.*Degrees that work: 1, 2"
    with pytest.raises(ConfigError, match=message):
        bench.check_degrees(degrees, {"model": str(checkpoint("qwen2"))})


def test_wrong_usage_is_explained_before_anything_runs(checkpoint: Callable[..., Path]) -> None:
    model = str(checkpoint("qwen2"))
    for arguments, status, message in (
        (["tp", model, "--tp", "0"], 2, "argument --tp: '0' is not a whole number of 1 or more"),
        (["tp", model, "--tp", "1,x"], 2, "'x' is not a whole number"),
        (["tp", model], 2, "--tp"),
        (["dp", model, "--tp", "1"], 2, "invalid choice: 'dp'"),
        (["tp", model, "--tp", "1", "--picture-size", "60"], 2, "argument --picture-size"),
        (["tp", model, "--tp", "1", "--requests", "8"], 1, "--requests 8 cannot be 16 at once"),
        (["tp", model, "--tp", "1,3"], 1, "Degrees that work: 1, 2"),
        (["tp", "/no/where", "--tp", "1"], 1, "no such folder"),
    ):
        done = vlserve("bench", *arguments)
        assert done.returncode == status and message in done.stderr and not done.stdout, arguments
        assert "Traceback" not in done.stderr


def test_help_has_an_example_and_the_engines_flags() -> None:
    text = vlserve("bench", "--help").stdout
    assert "vlserve bench tp OpenGVLab" in text and "--kv-cache-gib" in text and "one after another" in text


def test_one_degree_is_measured_as_json_and_drawn(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot = tmp_path / "plot.png"
    done = vlserve("bench", "tp", str(checkpoint("qwen2")), "--tp", "1", "--json", "--plot", str(plot), *SMALL)
    assert done.returncode == 0, done.stderr
    document: dict[str, Any] = json.loads(done.stdout)
    (measured,) = document["degrees"]
    assert measured["tp"] == 1 and measured["device"] == "cpu" and measured["dtype"] == "float32"
    assert measured["prompt_tokens"] >= 20 + measured["image_tokens"] > 20
    assert set(measured["device_bytes"][0]) >= {"decoder", "kv_cache", "vision_cache"}
    assert [row["concurrency"] for row in measured["rows"]] == [1, 2]
    for row in measured["rows"]:
        assert row["tokens_per_s"] == pytest.approx(5 * row["requests_per_s"]) and row["tokens_per_s_per_device"] > 0
        assert 0 < row["ttft_s"] < row["answer_s"] and row["token_s"] > 0
    assert document["load"]["answer_tokens"] == 5 and document["engine"]["dtype"] == "float32" and document["failed"] == {}
    assert document["advice"][0]["topic"] == "comparison"  # and noise, when the machine is busy
    with Image.open(plot) as picture:
        picture.load()
        assert picture.format == "PNG"


def test_a_degree_that_cannot_run_is_told_and_the_table_stands(checkpoint: Callable[..., Path]) -> None:
    model = str(checkpoint("qwen2"))
    done = vlserve("bench", "tp", model, "--tp", "1", *SMALL, "--pictures", "0")
    assert done.returncode == 0, done.stderr
    header, *rows = done.stdout.split("\n\n")[1].splitlines()
    assert header == bench_report.header() and [row.split()[:2] for row in rows] == [["1", "1"], ["1", "2"]]
    words = " ".join(done.stdout.split())
    assert "each with no picture" in words and "Only tp 1 was measured" in words
    failed = vlserve("bench", "tp", model, "--tp", "1", *SMALL, "--kv-cache-gib", "1e-6")
    assert failed.returncode == 1 and " 1  failed: the KV cache would have 0.00 GiB" in failed.stdout
    too_long = vlserve("bench", "tp", model, "--tp", "1", *SMALL, "--prompt-tokens", "600")
    assert too_long.returncode == 1 and "max_model_len 512" in too_long.stderr


def test_a_degree_that_fails_does_not_take_the_others_along(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def measure(engine: dict[str, Any], load: Load) -> Degree:
        if engine["tp"] == 1:
            raise EngineError("out of memory")
        return degree(engine["tp"], 1 / engine["tp"], 500 * engine["tp"])

    monkeypatch.setattr(bench, "_measure", measure)
    monkeypatch.setattr(bench, "check_degrees", lambda degrees, engine: None)
    assert main(["bench", "tp", "demo", "--tp", "4,1,2"]) == 1
    shown = capsys.readouterr().out
    assert shown.index(" 1  failed: out of memory") < shown.index("\n 2        1 ") < shown.index("\n 4       16 ")
    assert "Latency: tp 4." in shown and "Throughput per device: tp 2." in shown
    assert main(["bench", "tp", "demo", "--tp", "1,2,4", "--json"]) == 1
    document = json.loads(capsys.readouterr().out)
    assert document["failed"] == {"1": "out of memory"} and [one["tp"] for one in document["degrees"]] == [2, 4]
    assert document["degrees"][1]["rows"][1]["tokens_per_s_per_device"] == 500


def test_starting_is_light() -> None:
    assert not loaded_by("import vlserve.commands.bench") & {"torch", "matplotlib", "PIL", "numpy", "tqdm"}


def test_ctrl_c_ends_a_measurement_and_leaves_nothing(checkpoint: Callable[..., Path], temp: Path) -> None:
    """On a terminal, so that the progress says when it is measuring."""
    ours, theirs = os.openpty()
    fcntl.ioctl(
        theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0)
    )  # a bar has no place in the 0 columns of a new one
    command = [sys.executable, "-m", "vlserve", "bench", "tp", str(checkpoint("qwen2")), "--tp", "1"]
    command += [*SMALL, "--repetitions", "100000"]
    environment = os.environ | {"TMPDIR": str(temp)}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=theirs, env=environment)
    os.close(theirs)
    try:
        shown = b""
        while b"at once" not in shown:
            assert select.select([ours], [], [], 100)[0], shown
            shown += os.read(ours, 1000)
        assert b"loading" in shown and b"tp 1, " in shown
        ranks = psutil.Process(process.pid).children()
        assert ranks and list(temp.iterdir())
        process.send_signal(signal.SIGINT)
        threading.Thread(target=_read_all, args=(ours,), daemon=True).start()  # a full terminal would hold it up
        assert process.wait(timeout=PATIENCE_S) == 128 + signal.SIGINT
        wait_until(lambda: not any(map(is_alive, ranks)), "the ranks end")
        assert not list(temp.iterdir())
    finally:
        process.kill()
        process.wait()


def _read_all(terminal: int) -> None:
    with contextlib.suppress(OSError):  # Linux's way to say that nobody is left on the other side
        while os.read(terminal, 1000):
            pass
    os.close(terminal)


def test_the_bar_counts_every_answer() -> None:
    assert num_answers(LOAD) == (1 + 2) + 4 * 3 * 2
