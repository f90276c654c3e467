"""The examination: reads, checks and tries out in order, and prints one line a check as it goes."""

from __future__ import annotations

import sys

import msgspec

from vlserve.config import EngineConfig
from vlserve.doctor.checks import MIB, Check, check_host, check_ranks
from vlserve.doctor.device_checks import check_devices, runs_on_cuda
from vlserve.doctor.driver import Driver, read_driver
from vlserve.doctor.host import Host, read_host
from vlserve.doctor.probe import Reading, probe
from vlserve.doctor.ranks import Size, Trial, try_ranks

LABELS = {"ok": "ok", "warning": "warning", "failed": "FAILED"}


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """The document of --json; what was not reached is null."""

    passed: bool
    tp: int
    device: str
    checks: list[Check]
    host: Host
    driver: Driver
    probe: Reading
    ranks: Trial | None


def examine(config: EngineConfig, timeout_s: float, *, is_quiet: bool) -> Report:
    """All checks for `config.tp` ranks on `config.device`; nothing goes on for `timeout_s` seconds without news."""
    printer = _Printer(is_quiet=is_quiet)
    tp, device = config.tp, config.device
    host = read_host()
    checks = printer.show(check_host(host, tp))
    driver = read_driver()
    printer.say("asking torch")
    copies_s = min(tp, len(driver.gpus)) ** 2  # a second for each pair and direction
    reading = probe(cuda=device != "cpu", num_devices=tp, timeout_s=timeout_s + copies_s)
    checks += printer.show(check_devices(reading, driver, host, device, tp))
    trial = None
    if not _failures(checks):  # what is known to be wrong would only be found once more, and later
        trial = try_ranks(config, timeout_s, lambda ranks, stage: printer.say(f"rank {stage.rank}: {stage.name}"))
        checks += printer.show([check_ranks(trial, on_cuda=runs_on_cuda(reading, device))])
        printer.show_sizes(trial.sizes)
    failures = _failures(checks)
    printer.conclude(failures, tp)
    return Report(passed=not failures, tp=tp, device=device, checks=checks, host=host, driver=driver, probe=reading, ranks=trial)


def _failures(checks: list[Check]) -> list[str]:
    return [check.name for check in checks if check.status == "failed"]


class _Printer:
    """One line a check, as it is done; on a terminal also what is being waited for."""

    def __init__(self, *, is_quiet: bool) -> None:
        self._is_quiet = is_quiet
        self._is_live = not is_quiet and sys.stdout.isatty()

    def say(self, what: str) -> None:
        if self._is_live:
            print(f"\r\x1b[K... {what}", end="", flush=True)

    def show(self, checks: list[Check]) -> list[Check]:
        for check in checks:
            way_out = f". {check.way_out[0].upper()}{check.way_out[1:]}" if check.way_out else ""
            self._print(f"{LABELS[check.status]:8}{check.name}: {check.found}{way_out}")
        return checks

    def show_sizes(self, sizes: list[Size]) -> None:
        if sizes:
            self._print(f"\n{'all-reduce':>12}{'median':>12}{'bus bandwidth':>18}")
        for size in sizes:
            text = f"{size.num_bytes // MIB} MiB" if size.num_bytes >= MIB else f"{size.num_bytes // 1024} KiB"
            self._print(f"{text:>12}{size.seconds * 1000:>9.3f} ms{size.bus_bytes_per_s / 1e9:>13.2f} GB/s")

    def conclude(self, failures: list[str], tp: int) -> None:
        ranks = f"{tp} rank{'s' if tp > 1 else ''}"
        if failures:
            self._print(f"\nThis machine will not serve with {ranks} until this is mended: {', '.join(failures)}")
        else:
            self._print(f"\nThis machine will serve with {ranks}")

    def _print(self, line: str) -> None:
        if not self._is_quiet:
            print(("\r\x1b[K" if self._is_live else "") + line, flush=True)
