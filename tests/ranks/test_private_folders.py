"""Private folders: removed when their owner is gone, kept while it lives, and never somebody else's."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from vlserve.ranks.private_folders import LOCK, PrivateFolder


def test_a_killed_owners_folder_is_removed_by_the_next(tmp_path: Path) -> None:
    code = "import os, sys; from vlserve.ranks.private_folders import *; PrivateFolder(Path(sys.argv[1])); os._exit(1)"
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert len(list(tmp_path.iterdir())) == 1
    folder = PrivateFolder(tmp_path)
    assert list(tmp_path.iterdir()) == [folder.path] and folder.path.stat().st_mode & 0o777 == 0o700
    folder.close()
    folder.close()
    assert not list(tmp_path.iterdir())


def test_what_others_have_there_stays(tmp_path: Path) -> None:
    (tmp_path / "vlserve-data").mkdir()
    (tmp_path / "vlserve-data" / "lock").write_text("mine")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text("")
    (tmp_path / "vlserve-link").mkdir()
    os.symlink(elsewhere, tmp_path / "vlserve-link" / LOCK)
    before = sorted(tmp_path.iterdir())
    PrivateFolder(tmp_path).close()
    assert sorted(tmp_path.iterdir()) == before


def test_many_starts_at_once_do_not_remove_one_another(tmp_path: Path) -> None:
    with ThreadPoolExecutor(16) as pool:
        folders = list(pool.map(lambda _: PrivateFolder(tmp_path), range(200)))
    assert sorted(folder.path for folder in folders) == sorted(tmp_path.iterdir())
    assert all((folder.path / LOCK).exists() for folder in folders)
    for folder in folders:
        folder.close()
    assert not list(tmp_path.iterdir())
