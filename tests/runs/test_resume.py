"""With which data, lists and files a run may be resumed; tests with whole runs cover settings that differ."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from msrn_ray.config import ExperimentConfig
from msrn_ray.datasets.protocol import Splits
from msrn_ray.errors import UserError
from msrn_ray.runs.folder import DATA_FILE
from msrn_ray.runs.resume import (
    CONFIG_FILE,
    LIST_COPY,
    LIST_FILE,
    MAY_CHANGE,
    SEARCH_FILES,
    check_data,
    check_list,
    check_resumable,
    describe_data,
    listed_metrics,
)
from msrn_ray.training.inputs import check_batch
from msrn_ray.types import SampleTable

CONFIG = ExperimentConfig().with_overrides({"data.root": "/pictures", "train.batch_size": 16})


def splits_of(num_train: int, positive: int = 0) -> Splits:
    def table(num_rows: int) -> SampleTable:
        ids = [f"image {row}" for row in range(num_rows)]
        targets = np.zeros((num_rows, 2), np.int8)
        targets[:positive] = 1
        return SampleTable.from_columns(ids, ids, targets, ("cat", "dog"), "list.csv")

    return Splits(train=table(num_train), val=table(3), test=None, notes=())


def write_data(run: Path, splits: Splits) -> None:
    (run / DATA_FILE).write_text(json.dumps(describe_data(splits, CONFIG)))


def test_same_data_may_move(tmp_path: Path) -> None:
    write_data(tmp_path, splits_of(20))
    check_data(tmp_path, describe_data(splits_of(20), CONFIG.with_overrides({"data.root": "/moved"})))


@pytest.mark.parametrize("current", [splits_of(21), splits_of(20, positive=1)])
def test_other_data_is_refused_with_both_names(tmp_path: Path, current: Splits) -> None:
    """Other images, or the same images with other labels."""
    write_data(tmp_path, splits_of(20))
    moved = CONFIG.with_overrides({"data.root": "/others"})
    with pytest.raises(UserError) as caught:
        check_data(tmp_path, describe_data(current, moved))
    saved_print, current_print = (
        describe_data(splits, CONFIG)["fingerprint"][:12] for splits in (splits_of(20), current)
    )
    assert str(caught.value) == (
        f"{tmp_path} was trained on other images or labels: scenes in /pictures (list.csv: 20 train, 3 val images), fingerprint"
        f" {saved_print}; now scenes in /others (list.csv: {len(current.train)} train, 3 val images), fingerprint"
        f" {current_print}; give the run's data with --data.root, or start a new run"
    )


def test_files_may_move_but_not_become_learned(tmp_path: Path) -> None:
    """The resumed run compares the content of the files; learned vectors are no file."""
    CONFIG.with_overrides({"data.label_counts": "/a.npz", "data.word_vectors": "/v.txt"}).save(tmp_path / CONFIG_FILE)
    moved = CONFIG.with_overrides({"data.label_counts": "/b.npz", "data.word_vectors": "/w.txt"})
    check_resumable(tmp_path, moved)
    with pytest.raises(UserError, match=r"data\.word_vectors was '/v\.txt', now 'learned'"):
        check_resumable(tmp_path, moved.with_overrides({"data.word_vectors": "learned"}))


@pytest.mark.parametrize("name", SEARCH_FILES)
def test_search_folder_is_no_run(tmp_path: Path, name: str) -> None:
    CONFIG.save(tmp_path / CONFIG_FILE)
    (tmp_path / name).touch()
    with pytest.raises(UserError, match=f"resume it with msrn search --resume {tmp_path}$"):
        check_resumable(tmp_path, CONFIG)


def test_settings_of_the_training_may_not_differ(tmp_path: Path) -> None:
    """What changes the training is fixed. Where a file lies, how a run is watched and what it runs on may differ."""
    expected = {"resources.", "model.compile", "model.pretrained"}
    expected |= {
        f"data.{name}" for name in ("root", "labels", "merge_labels", "none_values", "word_vectors", "label_counts")
    }
    expected |= {f"data.{name}" for name in ("max_bad_fraction", "max_pixels")}
    expected |= {
        f"train.{name}" for name in ("epochs", "log_every", "hang_minutes", "checkpoint_every", "max_failures")
    }
    expected |= {f"train.{name}" for name in ("storage", "run_name", "eval_batch_size")}
    assert set(MAY_CHANGE) == expected
    CONFIG.save(tmp_path / CONFIG_FILE)
    check_resumable(tmp_path, CONFIG.with_overrides({"train.log_every": 1, "resources.num_workers": 3}))
    with pytest.raises(UserError, match=r"\(data\.flip was True, now False, optim\.lr was .*, now 0\.2\)"):
        check_resumable(tmp_path, CONFIG.with_overrides({"optim.lr": 0.2, "data.flip": not CONFIG.data.flip}))


def test_run_without_a_data_file_resumes(tmp_path: Path) -> None:
    check_data(tmp_path, describe_data(splits_of(20), CONFIG))


@pytest.mark.parametrize("content", ["", "{", "[]", '{"data": "x"}', "7"])
def test_damaged_data_file_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / DATA_FILE).write_text(content)
    with pytest.raises(UserError, match=r"data\.json: damaged; delete it"):
        check_data(tmp_path, describe_data(splits_of(20), CONFIG))


def test_drop_last_that_drops_everything_is_refused() -> None:
    dropping = CONFIG.with_overrides({"data.drop_last": True})
    check_batch(dropping, 16)
    check_batch(CONFIG, 1)
    with pytest.raises(UserError, match=r"data\.drop_last drops all 15 train images.*train\.batch_size=16"):
        check_batch(dropping, 15)


@pytest.mark.parametrize("cut", ["", '{"checkpoint_results": [', None])
def test_copy_replaces_a_cut_off_checkpoint_list(tmp_path: Path, cut: str | None) -> None:
    """A kill or a full disk cuts the list off. The copy from before the last checkpoint replaces it."""
    if cut is not None:
        (tmp_path / LIST_FILE).write_text(cut)
    check_list(tmp_path)  # no checkpoint, nothing to lose
    (tmp_path / "epoch_0001_5f").mkdir()
    with pytest.raises(UserError, match=r"snapshot\.json: .* missing or cut off; put it back from a copy, or delete"):
        check_list(tmp_path)
    (tmp_path / LIST_COPY).write_text('{"checkpoint_results": []}')
    check_list(tmp_path)
    assert (tmp_path / LIST_FILE).read_text() == '{"checkpoint_results": []}'


def test_whole_checkpoint_list_stays(tmp_path: Path) -> None:
    (tmp_path / "epoch_0001_5f").mkdir()
    (tmp_path / LIST_FILE).write_text('{"new": 1}')
    (tmp_path / LIST_COPY).write_text('{"old": 1}')
    check_list(tmp_path)
    assert (tmp_path / LIST_FILE).read_text() == '{"new": 1}'


def test_listed_metrics_come_by_epoch(tmp_path: Path) -> None:
    """A checkpoint within an epoch has no score and is left out."""
    listed = ({"epoch": 9, "val/mAP": 0.1}, {"epoch": 10}, {"epoch": 2, "val/mAP": 0.3})
    content = {"checkpoint_results": [{"metrics": metrics} for metrics in listed]}
    (tmp_path / LIST_FILE).write_text(json.dumps(content))
    assert [metrics["epoch"] for metrics in listed_metrics(tmp_path)] == [2, 9]
    assert listed_metrics(tmp_path / "none") == []
