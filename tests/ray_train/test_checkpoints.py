"""Checkpoints of a run folder without Ray: whole or not at all, and what an interruption leaves behind."""

from __future__ import annotations

import resource
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray.train
import torch

from msrn_ray.errors import UserError
from msrn_ray.ray_train import checkpoints
from msrn_ray.ray_train.checkpoints import NO_SCORE, SCORE, WITHIN_EPOCH, clear_leftovers, report_checkpoint
from msrn_ray.runs.checkpoint import load_checkpoint, load_train_state
from msrn_ray.runs.resume import LIST_COPY, LIST_FILE, NO_LIST, check_list
from msrn_ray.runs.snapshot import restore
from tests.runs.test_checkpoint import state_of
from tests.tiny import make_tiny_checkpoint

Reports = list[dict[str, Any]]


@pytest.fixture
def reports(monkeypatch: pytest.MonkeyPatch) -> Reports:
    """What Ray Train would be handed."""
    calls: Reports = []
    monkeypatch.setattr(ray.train, "report", lambda metrics, **more: calls.append({"metrics": metrics, **more}))
    monkeypatch.setattr(ray.train, "get_all_reported_checkpoints", lambda: list(calls))
    return calls


@pytest.fixture
def small_files() -> Iterator[None]:
    """The system refuses files of more than 100 kB, as it does on a full disk: half-way through."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def files_of(run: Path) -> dict[str, bytes]:
    files = {str(path.relative_to(run)): path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert files.pop(LIST_COPY, None) in (None, NO_LIST.encode()), "there is no list here"
    return files


def test_a_finished_epoch_and_one_that_is_not(tmp_path: Path, reports: Reports) -> None:
    """Only the first has a model; both lie in the run folder before Ray Train hears of them."""
    checkpoint = load_checkpoint(make_tiny_checkpoint(tmp_path / "made"))
    run = tmp_path / "run"
    run.mkdir()
    within = report_checkpoint(run, {"epoch": 3, SCORE: WITHIN_EPOCH}, None, state_of(2, 40))
    whole = report_checkpoint(run, {"epoch": 3, SCORE: 0.5}, checkpoint, state_of(3, 0))
    assert within.startswith("epoch_0003_step_000040_")
    assert whole.startswith("epoch_0003_")
    assert "step" not in whole
    assert set(files_of(run)) == {f"{within}/train_state.pt", f"{whole}/model.pt", f"{whole}/train_state.pt"}
    assert load_train_state(run / within).step == 40
    assert [call["checkpoint"].path for call in reports] == [str(run / within), str(run / whole)]
    assert [call["checkpoint_dir_name"] for call in reports] == [within, whole]
    assert {call["checkpoint_upload_mode"] for call in reports} == {ray.train.CheckpointUploadMode.NO_UPLOAD}


def test_ray_trains_list_is_copied_before_it_is_written_again(tmp_path: Path, reports: Reports) -> None:
    reports.append({})  # one that it has listed
    (tmp_path / LIST_FILE).write_text('{"checkpoint_results": []}')
    report_checkpoint(tmp_path, {"epoch": 1}, None, state_of(0, 5))
    (tmp_path / LIST_FILE).write_text("")
    assert not check_list(tmp_path)
    assert (tmp_path / LIST_FILE).read_text() == '{"checkpoint_results": []}'


def test_the_first_list_is_copied_as_soon_as_it_is_there(
    tmp_path: Path, reports: Reports, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a list that is lost before the second checkpoint would cost the first."""

    def listed() -> Reports:
        if reports:
            (tmp_path / LIST_FILE).write_text('{"checkpoint_results": [1]}')
        return list(reports)

    monkeypatch.setattr(ray.train, "get_all_reported_checkpoints", listed)
    name = report_checkpoint(tmp_path, {"epoch": 1}, None, state_of(0, 5))
    (tmp_path / LIST_FILE).write_text("")
    assert not check_list(tmp_path)
    assert (tmp_path / LIST_FILE).read_text() == '{"checkpoint_results": [1]}'
    assert (tmp_path / name).is_dir()


@pytest.mark.parametrize("cut", ["", None])
def test_a_first_checkpoint_that_ray_train_had_not_listed(tmp_path: Path, reports: Reports, cut: str | None) -> None:
    """A kill between its renaming and the list: the run begins anew, without asking for a list that never was."""
    report_checkpoint(tmp_path, {"epoch": 1}, None, state_of(0, 5))
    (tmp_path / "epoch_notes").mkdir()
    if cut is not None:
        (tmp_path / LIST_FILE).write_text(cut)
    assert check_list(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [LIST_COPY, "epoch_notes"]
    for name in ("epoch_0001_5f", "epoch_0002_60"):
        (tmp_path / name).mkdir()
    with pytest.raises(UserError, match="list of the checkpoints is missing or cut off"):
        check_list(tmp_path)  # more than the first: a list has been lost


def test_another_label_graph_is_refused_before_anything_is_taken_up() -> None:
    mask = "label_semantics.attend_mask"
    network = SimpleNamespace(state_dict=lambda: {mask: torch.eye(3) > 0})
    other = state_of(0, 5, model={mask: torch.ones(3, 3) > 0})
    with pytest.raises(UserError, match=r"data\.label_counts: gives another label graph than the run was trained with"):
        restore(SimpleNamespace(network=network), other, 0, torch.device("cpu"))  # type: ignore[arg-type]  # no more is looked at


def test_scores_keep_finished_epochs_before_all_others() -> None:
    assert WITHIN_EPOCH < NO_SCORE < 0


def test_other_ranks_write_nothing(tmp_path: Path, reports: Reports, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints.distributed, "rank", lambda: 1)
    name = report_checkpoint(tmp_path, {"epoch": 1}, None, state_of(0, 5))
    assert reports == [{"metrics": {"epoch": 1}, "checkpoint_dir_name": name}]
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_up_costs_no_checkpoint(tmp_path: Path, reports: Reports, small_files: None) -> None:
    name = report_checkpoint(tmp_path, {"epoch": 1}, None, state_of(0, 5))
    before = files_of(tmp_path)
    with pytest.raises(UserError) as caught:
        report_checkpoint(tmp_path, {"epoch": 2}, None, state_of(1, 5, model={"a": torch.ones(1_000_000)}))
    assert str(caught.value) == (
        f"{tmp_path}: the checkpoint of epoch 2 cannot be written (File too large); earlier checkpoints are whole:"
        f" free some space, then msrn train --resume {tmp_path}"
    )
    assert files_of(tmp_path) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == [LIST_COPY, name], "no partial folder is left"
    assert len(reports) == 1


def test_room_is_left_for_the_list_of_checkpoints(
    tmp_path: Path, reports: Reports, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2**20 - 1))
    with pytest.raises(UserError, match=r"epoch 1 cannot be written \(No space left on device\)"):
        report_checkpoint(tmp_path, {"epoch": 1}, None, state_of(0, 5))
    assert [path.name for path in tmp_path.iterdir()] == [LIST_COPY]
    assert not reports


def test_what_an_interruption_left_is_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (".epoch_0002_5f", "epoch_0001_5e", "epoch_0002_5f", "epoch_0002_step_000004_5f", "tensorboard"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    known = [SimpleNamespace(checkpoint=SimpleNamespace(path=str(tmp_path / "epoch_0001_5e")), metrics={})]
    monkeypatch.setattr(ray.train, "get_all_reported_checkpoints", lambda: known)
    theirs = ["best_epoch_0001_5e", "notes_epoch_3.txt"]
    (tmp_path / theirs[0]).mkdir()
    (tmp_path / theirs[1]).touch()
    clear_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [theirs[0], "epoch_0001_5e", theirs[1], "tensorboard"]
    (tmp_path / theirs[0]).rmdir()
    (tmp_path / theirs[1]).unlink()
    known.clear()
    (tmp_path / ".epoch_0002_5f").mkdir()
    clear_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["epoch_0001_5e", "tensorboard"], (
        "where Ray Train knows of none, its list may be lost, and the checkpoints must not be"
    )
    with pytest.raises(UserError, match=r"train\.storage: .* does not exist on a worker's node"):
        clear_leftovers(tmp_path / "elsewhere")
