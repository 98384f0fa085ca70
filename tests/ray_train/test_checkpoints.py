"""Checkpoints of a run folder without Ray: they are whole or absent, also after an interruption."""

from __future__ import annotations

import resource
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray.train
import torch
from torch import Tensor

from msrn_ray.errors import UserError
from msrn_ray.ray_train import checkpoints
from msrn_ray.ray_train.checkpoints import NO_SCORE, SCORE, WITHIN_EPOCH, clear_leftovers, report_checkpoint
from msrn_ray.runs.checkpoint import TrainState, load_checkpoint, load_train_state, restore
from msrn_ray.runs.resume import LIST_COPY, LIST_FILE, NO_LIST, check_list
from tests.tiny import make_tiny_checkpoint

Reports = list[dict[str, Any]]


def make_state(epoch: int, step: int, model: Mapping[str, Tensor] | None = None) -> TrainState:
    """Return a train state that holds only its place in the run, and a model."""
    return TrainState(model or {}, {}, {}, {}, None, epoch, "f" * 64, step)


@pytest.fixture
def reports(monkeypatch: pytest.MonkeyPatch) -> Reports:
    """Return the list of the reports that Ray Train would receive."""
    calls: Reports = []
    monkeypatch.setattr(ray.train, "report", lambda metrics, **more: calls.append({"metrics": metrics, **more}))
    monkeypatch.setattr(ray.train, "get_all_reported_checkpoints", lambda: list(calls))
    return calls


@pytest.fixture
def small_files() -> Iterator[None]:
    """Make the system refuse files of more than 100 kB half-way through, as a full disk does."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def read_files(run: Path) -> dict[str, bytes]:
    files = {str(path.relative_to(run)): path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert files.pop(LIST_COPY, None) in (None, NO_LIST.encode()), "Ray Train has written no list"
    return files


def test_only_a_finished_epoch_saves_a_model(tmp_path: Path, reports: Reports) -> None:
    """Both checkpoints lie in the run folder before Ray Train gets their reports."""
    checkpoint = load_checkpoint(make_tiny_checkpoint(tmp_path / "made"))
    run = tmp_path / "run"
    run.mkdir()
    unfinished = report_checkpoint(run, {"epoch": 3, SCORE: WITHIN_EPOCH}, None, make_state(2, 40))
    finished = report_checkpoint(run, {"epoch": 3, SCORE: 0.5}, checkpoint, make_state(3, 0))
    assert unfinished.startswith("epoch_0003_step_000040_")
    assert finished.startswith("epoch_0003_")
    assert "step" not in finished
    assert set(read_files(run)) == {
        f"{unfinished}/train_state.pt",
        f"{finished}/model.pt",
        f"{finished}/train_state.pt",
    }
    assert load_train_state(run / unfinished).step == 40
    assert [call["checkpoint"].path for call in reports] == [str(run / unfinished), str(run / finished)]
    assert [call["checkpoint_dir_name"] for call in reports] == [unfinished, finished]
    assert {call["checkpoint_upload_mode"] for call in reports} == {ray.train.CheckpointUploadMode.NO_UPLOAD}


def test_ray_trains_list_is_copied_before_each_report(tmp_path: Path, reports: Reports) -> None:
    reports.append({})  # Ray Train has listed a checkpoint
    (tmp_path / LIST_FILE).write_text('{"checkpoint_results": []}')
    report_checkpoint(tmp_path, {"epoch": 1}, None, make_state(0, 5))
    (tmp_path / LIST_FILE).write_text("")
    assert not check_list(tmp_path)
    assert (tmp_path / LIST_FILE).read_text() == '{"checkpoint_results": []}'


def test_first_list_is_copied_after_the_first_report(
    tmp_path: Path, reports: Reports, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a list that is lost before the second checkpoint would cost the first checkpoint."""

    def listed() -> Reports:
        if reports:
            (tmp_path / LIST_FILE).write_text('{"checkpoint_results": [1]}')
        return list(reports)

    monkeypatch.setattr(ray.train, "get_all_reported_checkpoints", listed)
    name = report_checkpoint(tmp_path, {"epoch": 1}, None, make_state(0, 5))
    (tmp_path / LIST_FILE).write_text("")
    assert not check_list(tmp_path)
    assert (tmp_path / LIST_FILE).read_text() == '{"checkpoint_results": [1]}'
    assert (tmp_path / name).is_dir()


@pytest.mark.parametrize("cut", ["", None])
def test_unlisted_first_checkpoint_lets_the_run_start_anew(tmp_path: Path, reports: Reports, cut: str | None) -> None:
    """After a kill between renaming the checkpoint and writing the list, the run starts anew and requires no list."""
    report_checkpoint(tmp_path, {"epoch": 1}, None, make_state(0, 5))
    (tmp_path / "epoch_notes").mkdir()
    if cut is not None:
        (tmp_path / LIST_FILE).write_text(cut)
    assert check_list(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [LIST_COPY, "epoch_notes"]
    for name in ("epoch_0001_5f", "epoch_0002_60"):
        (tmp_path / name).mkdir()
    with pytest.raises(UserError, match="list of the checkpoints is missing or cut off"):
        check_list(tmp_path)  # two checkpoints: their list was lost


def test_another_label_graph_is_refused_before_restoring() -> None:
    mask = "label_semantics.attend_mask"
    network = SimpleNamespace(state_dict=lambda: {mask: torch.eye(3) > 0})
    state = make_state(0, 5, model={mask: torch.ones(3, 3) > 0})
    with pytest.raises(UserError, match=r"data\.label_counts: gives another label graph than the run was trained with"):
        restore(SimpleNamespace(network=network), state, 0)  # type: ignore[arg-type]  # restore reads nothing else


def test_finished_epochs_rank_above_unfinished_epochs() -> None:
    assert WITHIN_EPOCH < NO_SCORE < 0


def test_other_ranks_write_nothing(tmp_path: Path, reports: Reports, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints.distributed, "rank", lambda: 1)
    name = report_checkpoint(tmp_path, {"epoch": 1}, None, make_state(0, 5))
    assert reports == [{"metrics": {"epoch": 1}, "checkpoint_dir_name": name}]
    assert not list(tmp_path.iterdir())


def test_full_disk_costs_no_checkpoint(tmp_path: Path, reports: Reports, small_files: None) -> None:
    name = report_checkpoint(tmp_path, {"epoch": 1}, None, make_state(0, 5))
    old_files = read_files(tmp_path)
    with pytest.raises(UserError) as caught:
        report_checkpoint(tmp_path, {"epoch": 2}, None, make_state(1, 5, model={"a": torch.ones(1_000_000)}))
    assert str(caught.value) == (
        f"{tmp_path}: the checkpoint of epoch 2 cannot be written (File too large); earlier checkpoints are whole:"
        f" free some space, then msrn train --resume {tmp_path}"
    )
    assert read_files(tmp_path) == old_files
    assert sorted(path.name for path in tmp_path.iterdir()) == [LIST_COPY, name], "no partial folder remains"
    assert len(reports) == 1


def test_disk_space_is_kept_for_the_checkpoint_list(
    tmp_path: Path, reports: Reports, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2**20 - 1))
    with pytest.raises(UserError, match=r"epoch 1 cannot be written \(No space left on device\)"):
        report_checkpoint(tmp_path, {"epoch": 1}, None, make_state(0, 5))
    assert [path.name for path in tmp_path.iterdir()] == [LIST_COPY]
    assert not reports


def test_leftovers_of_an_interruption_are_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (".epoch_0002_5f", "epoch_0001_5e", "epoch_0002_5f", "epoch_0002_step_000004_5f", "tensorboard"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    known = [SimpleNamespace(checkpoint=SimpleNamespace(path=str(tmp_path / "epoch_0001_5e")), metrics={})]
    monkeypatch.setattr(ray.train, "get_all_reported_checkpoints", lambda: known)
    user_files = ["best_epoch_0001_5e", "notes_epoch_3.txt"]
    (tmp_path / user_files[0]).mkdir()
    (tmp_path / user_files[1]).touch()
    clear_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        user_files[0],
        "epoch_0001_5e",
        user_files[1],
        "tensorboard",
    ]
    (tmp_path / user_files[0]).rmdir()
    (tmp_path / user_files[1]).unlink()
    known.clear()
    (tmp_path / ".epoch_0002_5f").mkdir()
    clear_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["epoch_0001_5e", "tensorboard"], (
        "Ray Train knows no checkpoint: its list may be lost, so the checkpoints must stay"
    )
    with pytest.raises(UserError, match=r"train\.storage: .* does not exist on a worker's node"):
        clear_leftovers(tmp_path / "elsewhere")
