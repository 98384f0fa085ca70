"""`atomic_write`: readers see the old file or the whole new file."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path

import pytest

from msrn_ray.io.files import atomic_write


def test_rename_makes_the_new_file_visible(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    path.write_text("old")
    with atomic_write(path) as partial:
        partial.write_text("new")
        assert partial.parent == path.parent, "a rename is atomic only within a file system"
        assert partial.name.startswith("."), "listings leave it out"
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def fail_half_way(path: Path, error: type[BaseException]) -> None:
    with atomic_write(path) as partial:
        partial.write_text("half")
        raise error


@pytest.mark.parametrize("old", ["old", None])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_failing_block_changes_nothing(tmp_path: Path, old: str | None, error: type[BaseException]) -> None:
    path = tmp_path / "state.json"
    if old is not None:
        path.write_text(old)
    with pytest.raises(error):
        fail_half_way(path, error)
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == ({path.name: old} if old else {})


def test_failed_sync_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(descriptor: int) -> None:
        raise OSError("no space left on device")

    path = tmp_path / "state.json"
    path.write_text("old")
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="no space left"), atomic_write(path) as partial:
        partial.write_text("new")
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {path.name: "old"}


def test_file_is_synced_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a power failure could leave the new name with no content."""
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda *arguments: (calls.append("sync"), fsync(*arguments)))
    monkeypatch.setattr(os, "replace", lambda *arguments: (calls.append("rename"), replace(*arguments)))
    with atomic_write(tmp_path / "state.json") as partial:
        partial.write_text("new")
    assert calls == ["sync", "rename"]


def test_block_that_writes_nothing_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    path.write_text("old")
    with pytest.raises(FileNotFoundError), atomic_write(path):
        pass
    assert path.read_text() == "old"


def partial_name(path: Path) -> str:
    """Return the name under which this process writes."""
    with atomic_write(path) as partial:
        partial.write_text("from another process")
    return partial.name


def test_processes_do_not_share_a_partial_file(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    with multiprocessing.get_context("spawn").Pool(1) as pool, atomic_write(path) as partial:
        partial.write_text("from this process")
        assert pool.apply(partial_name, (path,)) != partial.name
        assert path.read_text() == "from another process"
        assert partial.read_text() == "from this process"
    assert path.read_text() == "from this process"
    assert list(tmp_path.iterdir()) == [path]
