"""Tiles in shared memory: there while somebody needs them, elsewhere when it is full, gone when their owner is."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.test_system_limits import no_more_files
from vlserve.engine.messages import pixel_file
from vlserve.engine.pixel_store import PixelStore
from vlserve.errors import EngineError
from vlserve.models.architecture import Layout, Span
from vlserve.ranks import shared_pixels
from vlserve.ranks.client import EngineClient
from vlserve.ranks.private_folders import LOCK
from vlserve.ranks.shared_pixels import PixelFiles
from vlserve.vision.pixels import Pixels, Unit

RED, BLUE = b"r" * 32, b"b" * 32
TILES = torch.arange(2 * 3 * 4 * 4, dtype=torch.uint8)
CONTENT = TILES.numpy().data


@pytest.fixture(autouse=True)
def shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stands for /dev/shm."""
    folder = tmp_path / "shm"
    folder.mkdir()
    monkeypatch.setattr(shared_pixels, "SHARED", folder)
    return folder


@pytest.fixture
def fallback(tmp_path: Path) -> Path:
    folder = tmp_path / "ordinary"
    folder.mkdir()
    return folder


def held(files: PixelFiles) -> list[list[str]]:
    """The pictures in each folder."""
    return [sorted(path.name for path in folder.iterdir() if path.name != LOCK) for folder in files.folders]


def test_a_rank_reads_what_the_front_wrote_even_when_it_is_removed(fallback: Path) -> None:
    files = PixelFiles(fallback)
    files.put(RED, CONTENT)
    pixels = PixelStore(files.folders).open(RED, TILES.nbytes)
    files.release(RED)
    assert held(files) == [[], []] and torch.equal(pixels, TILES)
    with pytest.raises(FileNotFoundError, match="pixels of a picture are gone"):
        PixelStore(files.folders).open(RED, TILES.nbytes)
    with pytest.raises(RuntimeError):
        files.put(RED, CONTENT)
        PixelStore(files.folders).open(RED, TILES.nbytes + 48)  # more than there is must not become a fault of the bus
    files.close()


def test_a_file_stays_until_its_last_user_goes(fallback: Path) -> None:
    files = PixelFiles(fallback)
    for _ in range(3):
        files.put(RED, CONTENT)
    files.put(BLUE, CONTENT)
    for left in (2, 1):
        files.release(RED)
        assert held(files)[0] == sorted(map(pixel_file, (RED, BLUE))), f"{left} need it"
    files.release(RED)
    assert held(files) == [[pixel_file(BLUE)], []]
    files.put(RED, CONTENT)
    assert pixel_file(RED) in held(files)[0]
    files.close()
    assert not any(folder.exists() for folder in files.folders)
    files.close()


def test_many_threads_count_right(fallback: Path) -> None:
    files = PixelFiles(fallback)

    def work(digest: bytes) -> None:
        for _ in range(50):
            files.put(digest, CONTENT)
            assert torch.equal(PixelStore(files.folders).open(digest, TILES.nbytes), TILES)
            files.release(digest)

    with ThreadPoolExecutor(6) as threads:
        list(threads.map(work, [RED, BLUE] * 3))
    assert held(files) == [[], []]
    files.close()


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[Path]], None]:
    """Makes file systems full: room cannot be had for files in these folders."""
    allocate = os.posix_fallocate

    def fill(folders: list[Path]) -> None:
        def failing(file: int, offset: int, size: int) -> None:
            if any(Path(os.readlink(f"/proc/self/fd/{file}")).parent == folder for folder in folders):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            allocate(file, offset, size)

        monkeypatch.setattr(os, "posix_fallocate", failing)

    return fill


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_an_ordinary_folder_serves_when_shared_memory_is_full(fallback: Path, full: Callable[[list[Path]], None]) -> None:
    files = PixelFiles(fallback)
    full(files.folders[:1])
    files.put(RED, CONTENT)
    assert held(files) == [[], [pixel_file(RED)]]
    assert torch.equal(PixelStore(files.folders).open(RED, TILES.nbytes), TILES)
    full([])
    files.put(RED, CONTENT)
    files.put(BLUE, CONTENT)
    assert held(files) == [[pixel_file(BLUE)], [pixel_file(RED)]], "a picture is written once"
    files.release(RED)
    assert held(files)[1] == [pixel_file(RED)]
    files.release(RED)
    assert held(files)[1] == []
    files.close()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_when_everything_is_full_the_client_hears_no_path_and_the_log_has_it(
    fallback: Path, full: Callable[[list[Path]], None], caplog: pytest.LogCaptureFixture
) -> None:
    files = PixelFiles(fallback)
    full(files.folders)
    with pytest.raises(EngineError, match="^the server's file system is full; try again later$"):
        files.put(RED, CONTENT)
    assert "No space left on device" in caplog.text and "--shm-size" in caplog.text
    assert held(files) == [[], []]
    full([])
    files.put(RED, CONTENT)
    files.release(RED)
    assert held(files) == [[], []], "the failed attempt is not counted"
    files.close()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_other_refusals_are_not_told_as_a_lack_of_room(
    fallback: Path, shared: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    files = PixelFiles(fallback)
    with (
        no_more_files(),
        pytest.raises(EngineError, match="^the server has too many files and connections open; try again later$"),
    ):
        files.put(RED, CONTENT)
    assert "Too many open files" in caplog.text and str(shared) in caplog.text and "ulimit -n" in caplog.text
    files.put(RED, CONTENT)
    with no_more_files(), pytest.raises(OSError, match="Too many open files"):
        PixelStore(files.folders).open(RED, TILES.nbytes)

    def denied(*arguments: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(shared))

    monkeypatch.setattr(os, "posix_fallocate", denied)
    with pytest.raises(EngineError, match="^the server cannot keep pictures; its log says more$"):
        files.put(BLUE, CONTENT)
    assert "Permission denied" in caplog.text
    assert held(files) == [[pixel_file(RED)], []]
    files.close()


def test_without_shared_memory_the_ordinary_folder_serves(fallback: Path, shared: Path) -> None:
    shared.rmdir()
    files = PixelFiles(fallback)
    files.put(RED, CONTENT)
    assert held(files) == [[pixel_file(RED)]]
    files.close()
    assert fallback.exists() and list(fallback.iterdir()) == []


OWNER = """
import sys
from pathlib import Path
from vlserve.models.architecture import Layout, Span
from vlserve.ranks import shared_pixels
shared_pixels.SHARED = Path(sys.argv[1])
files = shared_pixels.PixelFiles(Path(sys.argv[2]))
files.put(b"r" * 32, memoryview(bytes(1000)))
print(files.folders[0], flush=True)
sys.stdin.read()
"""


def test_folders_of_the_dead_are_removed_and_those_of_the_living_stay(shared: Path, tmp_path: Path) -> None:
    owners, folders = [], []
    for name in ("dead", "alive"):
        (tmp_path / name).mkdir()
        command = [sys.executable, "-c", OWNER, str(shared), str(tmp_path / name)]
        owners.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        folders.append(Path(owners[-1].stdout.readline().strip()))  # type: ignore[union-attr]
    owners[0].send_signal(signal.SIGKILL)
    owners[0].wait()
    assert all((folder / pixel_file(RED)).exists() for folder in folders), "nobody was left to remove it"
    foreign = [shared / "vlserve-just-made", shared / "other"]
    for folder in foreign:
        folder.mkdir()
    (tmp_path / "mine").mkdir()
    (tmp_path / "beside").mkdir()
    mine, beside = PixelFiles(tmp_path / "mine"), PixelFiles(tmp_path / "beside")  # of one process: each leaves the other's
    assert not folders[0].exists() and (folders[1] / pixel_file(RED)).exists()
    assert all(folder.exists() for folder in (*foreign, *mine.folders, *beside.folders))
    for files in (mine, beside):
        files.close()
    for owner in owners:
        owner.communicate("")
    assert folders[1].exists()
    PixelFiles(tmp_path / "mine").close()
    assert not folders[1].exists(), "now its owner is gone, too"


def test_a_client_that_leaves_while_its_tiles_are_written_leaves_none(fallback: Path) -> None:
    """The thread that writes cannot be stopped; what it wrote is released when it is done."""
    client = _Sharing(PixelFiles(fallback))
    pixels = Pixels(data=TILES.numpy(), units=(Unit((TILES.nbytes,), 1),), digest=RED)
    span = Span(0, Layout([0], [(0, 1)]), pixels)
    prompt: Any = type("Prompt", (), {"spans": [span], "token_ids": [1], "cache_salt": "", "positions": None})

    async def leave() -> None:
        events = client.generate(prompt, None, 1)  # type: ignore[arg-type]
        task = asyncio.ensure_future(anext(events))  # type: ignore[arg-type]
        while not client.is_writing.is_set() and not task.done():
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        client.may_write.set()

    asyncio.run(leave())  # waits for the thread
    assert held(client._pixels) == [[], []] and not client._pixels_of
    client._pixels.close()


class _Sharing(EngineClient):
    """A client without ranks, whose writing waits until it may."""

    def __init__(self, files: PixelFiles) -> None:
        self._ids, self._pixels, self._pixels_of, self._lock = iter(range(9)), files, {}, threading.Lock()  # type: ignore[assignment]
        self.is_writing, self.may_write = threading.Event(), threading.Event()

    def check_alive(self) -> None:
        pass

    def _share_pixels(self, *args: Any) -> None:
        self.is_writing.set()
        self.may_write.wait(10)
        super()._share_pixels(*args)
