"""Killed ranks and drivers: by their ids, every image of every epoch is trained on once, and the weights are those of a quiet run."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from ray.cluster_utils import Cluster

from msrn_ray.config import ExperimentConfig
from msrn_ray.datasets.protocol import load_splits
from msrn_ray.datasets.scenes.generate import generate_scenes
from msrn_ray.ray_train import driver
from msrn_ray.ray_train.driver import TrainResult, train
from msrn_ray.runs.checkpoint import load_checkpoint
from msrn_ray.runs.resume import resume_config
from msrn_ray.training.inputs import TrainingInputs
from tests.ray_train.test_train import assert_same_weights, coco_copy, small_config
from tests.recorded_run import Kill, Place, Record, read_record, recording
from tests.tiny import make_coco

pytestmark = [pytest.mark.ray, pytest.mark.faults]

# Images then do not depend on those beside them, and differences by rounding are not blown up, as AdamW does where gradients are near zero
COMPARABLE = {"model.frozen_batchnorm": True, "optim.name": "sgd", "optim.lr": 0.01}

NUM_IMAGES, NUM_STEPS = 50, 7  # batch 8: the last step has 2 images
BAD = 18  # row of the image that cannot be decoded
SOUND = [row for row in range(NUM_IMAGES) if row != BAD]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The image that comes first in the first epoch cannot be decoded."""
    folder = tmp_path_factory.mktemp("data")
    root = generate_scenes(folder / "scenes", num_train=NUM_IMAGES, num_val=5, num_test=4)
    train_uris = load_splits(small_config(root, folder)).train.table["uri"].to_pylist()
    assert np.random.default_rng([0, 0]).permutation(NUM_IMAGES)[0] == BAD
    Path(train_uris[BAD]).write_bytes(b"")
    return root


def config_of(scenes: Path, storage: Path, **overrides: object) -> ExperimentConfig:
    """Saved after every second step; the loss of every step is recorded; float32 on every machine."""
    settings = {
        "train.run_name": "run",
        "train.batch_size": 8,
        "train.checkpoint_every": "2 steps",
        "train.log_every": 1,
        "train.amp": "off",
        "data.max_bad_fraction": 0.02,
    }
    return small_config(scenes, storage, **(settings | overrides))


def train_recorded(
    config: ExperimentConfig, folder: Path, *, kill: Kill | None = None, resume: bool = False
) -> tuple[TrainResult, Record]:
    folder.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver, "train_worker", recording(folder, kill))
        result = train(config, resume=resume)
    return result, read_record(folder)


def assert_every_image_once(record: Record, epochs: int = 2) -> None:
    assert sorted(record.rows) == list(range(epochs))
    for epoch, rows in record.rows.items():
        assert sorted(rows) == SOUND, f"epoch {epoch}"


def assert_bad_image_told_once(result: TrainResult) -> None:
    """Before an interruption or after it, in one epoch or in both."""
    assert [(line["train/images"], line["train/bad_images"]) for line in lines_of(result)] == [(len(SOUND), 1)] * 2
    with (result.run_folder / "bad_images.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert (row["split"], row["reason"]) == ("train", "the file is empty")


def lines_of(result: TrainResult) -> list[dict[str, object]]:
    lines = [json.loads(line) for line in (result.run_folder / "metrics.jsonl").read_text().splitlines()]
    differ = ("seconds", "per_second", "fraction", "checkpoint", "bytes")  # from run to run
    return [{name: value for name, value in line.items() if not name.endswith(differ)} for line in lines]


@pytest.fixture(scope="module")
def quiet(local_ray: None, scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainResult, Record]:
    """A run of two workers that nothing disturbs."""
    folder = tmp_path_factory.mktemp("quiet")
    return train_recorded(config_of(scenes, folder, **COMPARABLE), folder / "record")


def test_a_killed_rank_costs_only_the_steps_since_the_last_checkpoint(
    quiet: tuple[TrainResult, Record], scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """SIGKILL of rank 1 within the second epoch: exact ids, and weights and figures of an undisturbed run to the last bit."""
    undisturbed, record = quiet
    assert_every_image_once(record)
    assert_bad_image_told_once(undisturbed)
    assert record.starts == [((0, 0), 2)]
    assert not record.repeated

    killed, record = train_recorded(
        config_of(scenes, tmp_path / "killed", **COMPARABLE), tmp_path / "killed_record", kill=Kill(1, (1, 4))
    )
    assert (tmp_path / "killed_record" / "killed").exists()
    told = capsys.readouterr().out
    assert "\nworker " in told
    assert f", resuming after step {record.starts[-1][0][1]} of epoch 2\n" in told
    assert_every_image_once(record)
    first, again = record.starts
    assert (first, again[1]) == (((0, 0), 2), 2)
    assert again[0] in {(1, 2), (1, 4)}, "the run went on within the epoch"
    assert (1, 4) in record.repeated
    assert all(again[0] <= place <= (1, 5) for place in record.repeated)
    assert_same_weights(killed.run_folder, undisturbed.run_folder, num_steps=2 * NUM_STEPS)
    assert lines_of(killed) == lines_of(undisturbed)
    assert_bad_image_told_once(killed)
    kept = {line["checkpoint"] for line in map(json.loads, (killed.run_folder / "metrics.jsonl").open())}
    assert {path.name for path in killed.run_folder.glob("*epoch_*")} <= kept, "nothing saved within an epoch is left"


def start_driver(config: ExperimentConfig, record: Path, **environment: str) -> subprocess.Popen[str]:
    """A recorded run with a driver of its own, on a cluster of its own unless RAY_ADDRESS is given."""
    record.mkdir()
    config.save(record.with_suffix(".yaml"))
    inherited = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    return subprocess.Popen(
        [sys.executable, "-m", "tests.recorded_run", str(record.with_suffix(".yaml")), str(record)],
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=inherited | environment,
    )


def wait_for_step(driver: subprocess.Popen[str], record: Path, place: Place) -> None:
    deadline = time.monotonic() + 200
    while not any(str(list(place)) in file.read_text() for file in record.glob("*.jsonl")):
        assert driver.poll() is None, driver.communicate()[0]
        assert time.monotonic() < deadline, "the run did not get so far"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def interrupted(
    local_ray: None, scenes: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[TrainResult, Record, Record]:
    """A run whose driver was killed within the first epoch, resumed with one worker instead of two.

    Gives the result, what was recorded at the kill, and what in the end.
    """
    folder = tmp_path_factory.mktemp("driver")
    record = folder / "record"
    driver = start_driver(config_of(scenes, folder, **COMPARABLE), record)
    wait_for_step(driver, record, (0, 4))
    driver.send_signal(signal.SIGKILL)
    driver.communicate(timeout=60)
    time.sleep(2)  # workers die with their cluster; they must not write any more
    before = read_record(record)
    resumed = resume_config(folder / "run").with_overrides({"resources.num_workers": 1})
    result, after = train_recorded(resumed, record, resume=True)
    return result, before, after


def test_a_killed_driver_and_another_number_of_workers(interrupted: tuple[TrainResult, Record, Record]) -> None:
    result, before, after = interrupted
    assert set(before.rows) == {0}, "it was killed within the first epoch"
    assert_every_image_once(after)
    first, again = after.starts
    assert (first, again[1]) == (((0, 0), 2), 1)
    assert (0, 2) <= again[0] < (1, 0), "the run went on within the epoch"
    assert_bad_image_told_once(result)
    assert load_checkpoint(result.run_folder).metrics["val/images"] == 5


def test_the_number_of_workers_does_not_change_the_training(
    interrupted: tuple[TrainResult, Record, Record], quiet: tuple[TrainResult, Record]
) -> None:
    """Two workers up to the kill, then one, against two throughout: the loss of every step, and of whole epochs."""
    (result, before, after), (undisturbed, record) = interrupted, quiet
    assert len(before.losses) >= 4
    assert list(record.losses) == [(epoch, step) for epoch in range(2) for step in range(NUM_STEPS)]
    assert set(after.losses) == set(record.losses)
    assert record.losses[1, 5] < 0.95 * record.losses[0, 0], "it learns"
    for places in (before.losses, after.losses):
        for place, loss in places.items():
            assert loss == pytest.approx(record.losses[place], rel=1e-4), place
    for ours, theirs in zip(lines_of(result), lines_of(undisturbed), strict=True):
        assert ours["train/loss"] == pytest.approx(theirs["train/loss"], rel=1e-4)
        assert ours["val/loss"] == pytest.approx(theirs["val/loss"], rel=1e-4)


def test_bad_images_one_that_is_gone_and_workers_as_many_as_there_is_room_for(
    local_ray: None, scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was there when the run began; it counts as an image that cannot be decoded, and the epoch's account says so."""
    root = coco_copy(scenes, tmp_path / "data")
    broken = {3: b"plain text", 31: b"\xff\xd8\xff\xe0" + bytes(300)}
    gather, uris = driver.gather_inputs, load_splits(config_of(root, tmp_path)).train.table["uri"].to_pylist()

    def gather_and_spoil(config: ExperimentConfig) -> TrainingInputs:
        inputs = gather(config)
        Path(uris[17]).unlink()
        for row, content in broken.items():
            Path(uris[row]).write_bytes(content)
        return inputs

    monkeypatch.setattr(driver, "gather_inputs", gather_and_spoil)
    # ranks may meet the same image in different epochs: counted twice, it would be more than 4.5
    settings = {"resources.num_workers": "1..2", "data.max_bad_fraction": 0.09}
    result, record = train_recorded(config_of(root, tmp_path / "runs", **settings), tmp_path / "record")
    assert record.starts == [((0, 0), 2)]
    left = [row for row in SOUND if row not in {3, 17, 31}]
    assert {epoch: sorted(rows) for epoch, rows in record.rows.items()} == {0: left, 1: left}
    assert [(line["train/images"], line["train/bad_images"]) for line in lines_of(result)] == [(46, 4), (46, 4)]
    with (result.run_folder / "bad_images.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert sorted(row["uri"] for row in rows) == sorted(uris[row] for row in (3, 17, BAD, 31))
    assert {row["split"] for row in rows} == {"train"}
    reasons = {row["uri"]: row["reason"] for row in rows}
    assert "No such file" in reasons[uris[17]]
    assert reasons[uris[3]] == "not an image of a known format"
    assert reasons[uris[BAD]] == "the file is empty"


def test_a_node_that_dies_leaves_as_many_cpus_as_workers(scenes: Path, tmp_path: Path) -> None:
    """Three workers on four CPUs; two CPUs are left, so one worker goes on, and one CPU decodes for it."""
    soon = {"health_check_period_ms": 1000, "health_check_timeout_ms": 3000, "health_check_failure_threshold": 3}
    head = {"num_cpus": 2, "include_dashboard": False, "_system_config": soon}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        node = cluster.add_node(num_cpus=2)
        cluster.wait_for_nodes()
        record = tmp_path / "record"
        config = config_of(scenes, tmp_path, **{"resources.num_workers": "1..3", "train.epochs": 1})
        driver = start_driver(config, record, RAY_ADDRESS=cluster.address)
        wait_for_step(driver, record, (0, 3))
        cluster.remove_node(node, allow_graceful=False)
        told = driver.communicate(timeout=200)[0]
        assert driver.returncode == 0, told
    finally:
        cluster.shutdown()
    after = read_record(record)
    assert_every_image_once(after, epochs=1)
    assert [world for _, world in after.starts] == [3, 1]
    assert after.starts[1][0] >= (0, 2), "the run went on within the epoch"


def test_one_image_and_more_workers_than_images(local_ray: None, tmp_path: Path) -> None:
    """A table smaller than a batch too: the one step of the epoch has one image, and the second rank a filler."""
    root = make_coco(tmp_path / "data", {"train": [[0, 1]], "val": [[0], [1, 2]]})
    settings = {"data.missing_words": "random", "protocol": "paper", "train.epochs": 1}
    result, record = train_recorded(config_of(root, tmp_path / "runs", **settings), tmp_path / "record")
    assert record.starts == [((0, 0), 2)]
    assert record.rows == {0: [0]}
    assert [line["train/images"] for line in lines_of(result)] == [1]
