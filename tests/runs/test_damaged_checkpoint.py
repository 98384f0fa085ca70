"""Damaged and dangerous checkpoints are refused; a failed save keeps the old file."""

from __future__ import annotations

import os
import resource
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch

from msrn_ray.errors import UserError
from msrn_ray.runs import checkpoint as checkpoint_module
from msrn_ray.runs.checkpoint import (
    load_checkpoint,
    load_train_state,
    save_checkpoint,
)
from tests.runs.checkpoint_example import example


class _Payload:
    """Unpickling it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.folder),)


def test_file_that_would_run_code_is_refused(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    save_checkpoint(tmp_path, example())
    good = torch.load(tmp_path / "model.pt", weights_only=True)
    for name, content in (
        ("model.pt", good | {"metrics": _Payload(ran)}),
        ("train_state.pt", {"model": _Payload(ran)}),
    ):
        torch.save(content, tmp_path / name)
    for load in (load_checkpoint, load_train_state):
        with pytest.raises(UserError, match="would run code; refused"):
            load(tmp_path)
    assert not ran.exists()
    torch.load(tmp_path / "model.pt", weights_only=False)
    assert ran.exists(), "the payload does not run, so the test shows nothing"


def test_cut_off_and_foreign_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    save_checkpoint(tmp_path, example())
    whole = path.read_bytes()
    content = torch.load(path, weights_only=True)
    for length in (0, 10, len(whole) // 2, len(whole) - 30):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"model\.pt: damaged"):
            load_checkpoint(path)
    path.write_text("epoch,loss\n1,0.3\n")
    with pytest.raises(UserError, match=r"model\.pt: damaged") as caught:
        load_checkpoint(path)
    assert "\n" not in str(caught.value)
    for foreign in (content | {"format": 2}, {"state_dict": {}, "epoch": 3}, [1, 2], torch.ones(3)):
        torch.save(foreign, path)
        with pytest.raises(UserError, match=r"model\.pt: not a checkpoint of msrn_ray \(format 1\)"):
            load_checkpoint(path)


@pytest.mark.parametrize("entry", ["label_names", "config", "weights", "cooccurrence", "counts", "thresholds", "epoch"])
def test_missing_entry_is_named(tmp_path: Path, entry: str) -> None:
    save_checkpoint(tmp_path, example())
    content = torch.load(tmp_path / "model.pt", weights_only=True)
    del content[entry]
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(UserError, match=rf"model\.pt.*'{entry}' is missing"):
        load_checkpoint(tmp_path)


def test_invalid_config_in_a_checkpoint_is_named(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, example())
    content = torch.load(tmp_path / "model.pt", weights_only=True)
    content["config"]["optim"]["lr"] = -1
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(UserError, match=r"model\.pt: config: optim\.lr: .*greater than 0"):
        load_checkpoint(tmp_path)


def test_missing_or_incomplete_train_state_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"train_state\.pt: cannot be read \(No such file"):
        load_train_state(tmp_path)
    torch.save({"model": {}, "epoch": 3}, tmp_path / "train_state.pt")
    with pytest.raises(UserError, match=r"train_state\.pt.*optimizer"):
        load_train_state(tmp_path)


class _Unpicklable:
    def __reduce__(self) -> tuple[object, ...]:
        raise RuntimeError("cannot be saved")


def broken_disk(*_: object) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("failure", ["content", "write", "replace"])
def test_failed_save_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: str) -> None:
    save_checkpoint(tmp_path, example())
    before = (tmp_path / "model.pt").read_bytes()
    weights: dict[str, Any] = {"a": torch.ones(1000)}
    if failure == "content":
        weights["b"] = _Unpicklable()
    elif failure == "replace":
        monkeypatch.setattr(os, "replace", broken_disk)
    else:

        def half(content: object, file: BinaryIO) -> None:
            file.write(before[:50])
            broken_disk()

        monkeypatch.setattr(checkpoint_module.torch, "save", half)
    with pytest.raises((RuntimeError, OSError), match=r"cannot be saved|No space left"):
        save_checkpoint(tmp_path, replace(example(), weights=weights, epoch=99))
    monkeypatch.undo()
    assert [file.name for file in tmp_path.iterdir()] == ["model.pt"]
    assert (tmp_path / "model.pt").read_bytes() == before
    assert load_checkpoint(tmp_path).epoch == 7


def test_failed_save_reports_the_systems_error(tmp_path: Path) -> None:
    """The operating system refuses in the middle of the file; torch's message for this is "unexpected pos"."""
    save_checkpoint(tmp_path, example())
    before = (tmp_path / "model.pt").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            save_checkpoint(tmp_path, replace(example(), weights={"a": torch.ones(1_000_000)}))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [file.name for file in tmp_path.iterdir()] == ["model.pt"]
    assert (tmp_path / "model.pt").read_bytes() == before
