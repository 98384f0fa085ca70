"""Files that an earlier version wrote still load, resume and repeat: checkpoint, run folders, study, prepared shards.

Commit 17a492d wrote `old_files.tar.xz` on the data set of `scenes` below (24, 8 and 6 images):
- `run`, a finished run of two epochs
- `killed`, a run that SIGKILL ended within its third epoch
- `study`, a search of two trials
- `shards`, the prepared data set
- `run_predictions.csv`, which `msrn predict` wrote for the val images with `run`
"""

from __future__ import annotations

import csv
import json
import os
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest

from msrn_ray.config import load_config
from msrn_ray.data_settings import DataSettings
from msrn_ray.datasets.registry import read_published
from msrn_ray.datasets.scenes.generate import generate_scenes
from msrn_ray.inference.predictor import Predictor
from msrn_ray.io.byte_ranges import read_bytes
from msrn_ray.ray_train.driver import train
from msrn_ray.runs.checkpoint import load_checkpoint
from msrn_ray.runs.resume import resume_config
from msrn_ray.runs.state import list_runs
from tuning.study_storage import open_study

ARCHIVE = Path(__file__).with_name("old_files.tar.xz")


@pytest.fixture
def old_files(tmp_path: Path) -> Path:
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    hour_ago = time.time() - 3600
    os.utime(tmp_path / "old_files/killed/state.json", (hour_ago, hour_ago))
    return tmp_path / "old_files"


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return generate_scenes(tmp_path_factory.mktemp("data") / "scenes", num_train=24, num_val=8, num_test=6)


def test_old_checkpoint_predicts_the_same_probabilities(old_files: Path, scenes: Path) -> None:
    predictor = Predictor.from_checkpoint(old_files / "run")
    with (old_files / "run_predictions.csv").open(newline="") as file:
        rows = {Path(row["image"]).name: row for row in csv.DictReader(file)}
    images = sorted((scenes / "val2014").glob("*.jpg"))
    assert {image.name for image in images} == set(rows)
    expected = [[float(rows[image.name][label]) for label in predictor.label_names] for image in images]
    np.testing.assert_allclose(predictor(images).numpy(), np.array(expected), rtol=0, atol=1e-5)


def test_old_runs_are_listed_with_their_state(old_files: Path) -> None:
    runs = {run.name: (run.state, run.epoch, run.epochs) for run in list_runs(old_files)}
    assert runs["run"] == ("finished", 2, 2)
    assert runs["killed"] == ("interrupted", 2, 3)


def test_old_shards_hold_the_original_images(old_files: Path, scenes: Path) -> None:
    published = read_published(DataSettings(dataset="coco", root=str(old_files / "shards")))
    original = read_published(DataSettings(dataset="coco", root=str(scenes)))
    assert published.val is not None
    assert original.val is not None
    for prepared, unprepared in ((published.train, original.train), (published.val, original.val)):
        assert prepared.label_names == unprepared.label_names
        np.testing.assert_array_equal(prepared.targets, unprepared.targets)
        uris = zip(prepared.table["uri"].to_pylist(), unprepared.table["uri"].to_pylist(), strict=True)
        assert all(read_bytes(shard) == Path(image).read_bytes() for shard, image in uris)


def test_old_study_opens_and_draws_its_next_trial(old_files: Path) -> None:
    study = open_study(f"sqlite:///{old_files / 'study' / 'study.db'}", "study")
    assert (study.num_trials, study.num_unfinished) == (2, 0)
    best = study.best_trial()
    assert best is not None
    assert study.config_of(best).data.image_size == 64
    study.set_num_trials(3)
    point = study.next_trial()
    assert point is not None
    assert point.number == 2
    assert set(point.overrides) == {"model.tau", "optim.lr"}
    assert study.config.with_overrides(point.overrides).model.levels == ("layer1",)


@pytest.mark.ray
@pytest.mark.slow
def test_old_run_killed_within_an_epoch_resumes(local_ray: None, old_files: Path, scenes: Path) -> None:
    config = resume_config(old_files / "killed").with_overrides({"data.root": str(scenes)})
    result = train(config, resume=True)
    lines = [json.loads(line) for line in (result.run_folder / "metrics.jsonl").read_text().splitlines()]
    assert [(line["epoch"], line["train/images"]) for line in lines] == [(1, 24), (2, 24), (3, 24)]
    assert result.metrics["test/images"] == 6
    assert load_checkpoint(result.best_checkpoint).label_names == load_checkpoint(old_files / "run").label_names


@pytest.mark.ray
@pytest.mark.slow
def test_old_config_repeats_its_run(local_ray: None, old_files: Path, scenes: Path, tmp_path: Path) -> None:
    """Compare weights and scores. The tolerances allow for rounding, which differs between CPUs."""
    config = load_config(old_files / "run" / "config.yaml").with_overrides(
        {"data.root": str(scenes), "train.storage": str(tmp_path / "runs"), "train.run_name": None}
    )
    result = train(config)
    saved, repeated = load_checkpoint(old_files / "run"), load_checkpoint(result.best_checkpoint)
    assert repeated.epoch == saved.epoch
    for name, weight in saved.weights.items():
        np.testing.assert_allclose(repeated.weights[name].numpy(), weight.numpy(), rtol=1e-3, atol=1e-5, err_msg=name)
    assert repeated.metrics["val/mAP"] == pytest.approx(saved.metrics["val/mAP"], abs=1e-3)
