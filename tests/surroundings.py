"""What the suite does not take over from where it is started, so that it does the same for everybody.

`tests/__init__.py` calls both before anything is imported that reads the environment, and before anything is started.
"""

from __future__ import annotations

import signal
import types
from collections.abc import MutableMapping
from pathlib import Path

# what would send a test elsewhere, or ask it for a key
FOREIGN = ("VLSERVE_API_KEY", "VLSERVE_API_KEYS", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "FORCE_COLOR")
FOREIGN_PREFIXES = ("SLURM_", "TORCHELASTIC_", "OPENAI_", "LANGCHAIN_", "LANGSMITH_", "GRADIO_", "RAY_", "TQDM_")
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # that tests send, or a terminal to whatever runs on it


def make_plain(environment: MutableMapping[str, str]) -> None:
    """Take out what is meant for other programs, or for a server of the developer's own."""
    for name in list(environment):
        if name.upper() in FOREIGN or name.startswith(FOREIGN_PREFIXES):
            del environment[name]
    environment["HF_HUB_OFFLINE"] = "1"  # nothing in the suite may reach for a network
    # one thread of torch's a process, here and in ranks: models are tiny, and threads that wait for one another spin
    environment["OMP_NUM_THREADS"] = "1"
    if not Path("/dev/nvidiactl").exists():  # Triton's kernels then run on the CPU, interpreted
        environment.setdefault("TRITON_INTERPRET", "1")


def let_children_hear() -> None:
    """Signals that this process was started to ignore (`nohup`, `command &` in a script) do nothing here, as before, but work in
    the commands that it starts: being ignored is inherited, a handler is not."""
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    for number in SIGNALS:
        if number in blocked or signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, _do_nothing)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def _do_nothing(number: int, frame: types.FrameType | None) -> None:
    pass
