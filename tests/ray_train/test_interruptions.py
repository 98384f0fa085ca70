"""Killed ranks and drivers: every epoch trains each image once, by its id, and the weights equal those of an undisturbed run."""

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
from tests.ray_train.test_train import assert_same_weights, copy_as_coco, small_config
from tests.recorded_run import Kill, Place, Record, read_record, recording
from tests.tiny import make_coco

pytestmark = [pytest.mark.ray, pytest.mark.faults, pytest.mark.timeout(600)]

# A frozen BatchNorm makes images independent of the rest of their batch. AdamW would amplify rounding where gradients are near zero.
COMPARABLE = {"model.frozen_batchnorm": True, "optim.name": "sgd", "optim.lr": 0.01}

NUM_IMAGES, NUM_STEPS = 50, 7  # batch 8: the last step has 2 images
BAD = 18  # row of the image that cannot be decoded
SOUND = [row for row in range(NUM_IMAGES) if row != BAD]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a data set in which the first image of the first epoch cannot be decoded."""
    folder = tmp_path_factory.mktemp("data")
    root = generate_scenes(folder / "scenes", num_train=NUM_IMAGES, num_val=5, num_test=4)
    train_uris = load_splits(small_config(root, folder)).train.table["uri"].to_pylist()
    assert np.random.default_rng([0, 0]).permutation(NUM_IMAGES)[0] == BAD
    Path(train_uris[BAD]).write_bytes(b"")
    return root


def make_config(scenes: Path, storage: Path, **overrides: object) -> ExperimentConfig:
    """Return a config that saves every second step, logs every step's loss and computes in float32 on every CPU."""
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


def assert_bad_image_reported_once(result: TrainResult) -> None:
    """Count the bad image once, whether it is met before an interruption or after it, in one epoch or in both."""
    assert [(line["train/images"], line["train/bad_images"]) for line in repeatable_metrics(result)] == [
        (len(SOUND), 1)
    ] * 2
    with (result.run_folder / "bad_images.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert (row["split"], row["reason"]) == ("train", "the file is empty")


def repeatable_metrics(result: TrainResult) -> list[dict[str, object]]:
    lines = [json.loads(line) for line in (result.run_folder / "metrics.jsonl").read_text().splitlines()]
    varying = ("seconds", "per_second", "fraction", "checkpoint", "bytes")  # these differ from run to run
    return [{name: value for name, value in line.items() if not name.endswith(varying)} for line in lines]


@pytest.fixture(scope="module")
def undisturbed_run(
    local_ray: None, scenes: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[TrainResult, Record]:
    """Return the result and the record of an undisturbed run of two workers."""
    folder = tmp_path_factory.mktemp("undisturbed")
    return train_recorded(make_config(scenes, folder, **COMPARABLE), folder / "record")


def test_killed_rank_costs_only_steps_since_the_checkpoint(
    undisturbed_run: tuple[TrainResult, Record], scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """After SIGKILL of rank 1 within the second epoch, ids, weights and metrics equal those of an undisturbed run to the last bit."""
    undisturbed, record = undisturbed_run
    assert_every_image_once(record)
    assert_bad_image_reported_once(undisturbed)
    assert record.starts == [((0, 0), 2)]
    assert not record.repeated

    killed, record = train_recorded(
        make_config(scenes, tmp_path / "killed", **COMPARABLE), tmp_path / "killed_record", kill=Kill(1, (1, 4))
    )
    assert (tmp_path / "killed_record" / "killed").exists()
    output = capsys.readouterr().out
    assert "\nworker " in output
    assert f", resuming after step {record.starts[-1][0][1]} of epoch 2\n" in output
    assert_every_image_once(record)
    first_start, restart = record.starts
    assert (first_start, restart[1]) == (((0, 0), 2), 2)
    assert restart[0] in {(1, 2), (1, 4)}, "the run resumes within the epoch"
    assert (1, 4) in record.repeated
    assert all(restart[0] <= place <= (1, 5) for place in record.repeated)
    assert_same_weights(killed.run_folder, undisturbed.run_folder, num_steps=2 * NUM_STEPS)
    assert repeatable_metrics(killed) == repeatable_metrics(undisturbed)
    assert_bad_image_reported_once(killed)
    kept = {line["checkpoint"] for line in map(json.loads, (killed.run_folder / "metrics.jsonl").open())}
    assert {path.name for path in killed.run_folder.glob("*epoch_*")} <= kept, (
        "no checkpoint from within an epoch remains"
    )


def start_driver(config: ExperimentConfig, record: Path, **environment: str) -> subprocess.Popen[str]:
    """Start a recorded run with a separate driver. It starts a separate cluster unless RAY_ADDRESS is given."""
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
        assert time.monotonic() < deadline, "the run did not reach the step"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def interrupted(
    local_ray: None, scenes: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[TrainResult, Record, Record]:
    """Kill the driver of a run within the first epoch and resume the run with one worker instead of two.

    Return the result, the record at the kill and the record at the end.
    """
    folder = tmp_path_factory.mktemp("driver")
    record = folder / "record"
    driver = start_driver(make_config(scenes, folder, **COMPARABLE), record)
    wait_for_step(driver, record, (0, 4))
    driver.send_signal(signal.SIGKILL)
    driver.communicate(timeout=60)
    time.sleep(2)  # the workers die with their cluster and must not write after this
    at_kill = read_record(record)
    resumed = resume_config(folder / "run").with_overrides({"resources.num_workers": 1})
    result, at_end = train_recorded(resumed, record, resume=True)
    return result, at_kill, at_end


def test_killed_driver_resumes_with_fewer_workers(interrupted: tuple[TrainResult, Record, Record]) -> None:
    result, at_kill, at_end = interrupted
    assert set(at_kill.rows) == {0}, "the kill came within the first epoch"
    assert_every_image_once(at_end)
    first_start, restart = at_end.starts
    assert (first_start, restart[1]) == (((0, 0), 2), 1)
    assert (0, 2) <= restart[0] < (1, 0), "the run resumes within the epoch"
    assert_bad_image_reported_once(result)
    assert load_checkpoint(result.run_folder).metrics["val/images"] == 5


def test_worker_count_does_not_change_the_training(
    interrupted: tuple[TrainResult, Record, Record], undisturbed_run: tuple[TrainResult, Record]
) -> None:
    """Compare the losses of steps and epochs: two workers until the kill and then one, against two workers throughout."""
    (result, at_kill, at_end), (undisturbed, record) = interrupted, undisturbed_run
    assert len(at_kill.losses) >= 4
    assert list(record.losses) == [(epoch, step) for epoch in range(2) for step in range(NUM_STEPS)]
    assert set(at_end.losses) == set(record.losses)
    assert record.losses[1, 5] < 0.95 * record.losses[0, 0], "the loss falls"
    for places in (at_kill.losses, at_end.losses):
        for place, loss in places.items():
            assert loss == pytest.approx(record.losses[place], rel=1e-4), place
    for metrics, expected in zip(repeatable_metrics(result), repeatable_metrics(undisturbed), strict=True):
        assert metrics["train/loss"] == pytest.approx(expected["train/loss"], rel=1e-4)
        assert metrics["val/loss"] == pytest.approx(expected["val/loss"], rel=1e-4)


def test_elastic_run_leaves_out_bad_and_deleted_images(
    local_ray: None, scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An image that is deleted after the start of the run counts as an image that cannot be decoded."""
    root = copy_as_coco(scenes, tmp_path / "data")
    broken = {3: b"plain text", 31: b"\xff\xd8\xff\xe0" + bytes(300)}
    gather, uris = driver.gather_inputs, load_splits(make_config(root, tmp_path)).train.table["uri"].to_pylist()

    def gather_and_damage(config: ExperimentConfig) -> TrainingInputs:
        inputs = gather(config)
        Path(uris[17]).unlink()
        for row, content in broken.items():
            Path(uris[row]).write_bytes(content)
        return inputs

    monkeypatch.setattr(driver, "gather_inputs", gather_and_damage)
    # Ranks may read the same image in different epochs. If it counted twice, the bad images would exceed the limit of 4.5.
    settings = {"resources.num_workers": "1..2", "data.max_bad_fraction": 0.09}
    result, record = train_recorded(make_config(root, tmp_path / "runs", **settings), tmp_path / "record")
    assert record.starts == [((0, 0), 2)]
    readable = [row for row in SOUND if row not in {3, 17, 31}]
    assert {epoch: sorted(rows) for epoch, rows in record.rows.items()} == {0: readable, 1: readable}
    assert [(line["train/images"], line["train/bad_images"]) for line in repeatable_metrics(result)] == [
        (46, 4),
        (46, 4),
    ]
    with (result.run_folder / "bad_images.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert sorted(row["uri"] for row in rows) == sorted(uris[row] for row in (3, 17, BAD, 31))
    assert {row["split"] for row in rows} == {"train"}
    reasons = {row["uri"]: row["reason"] for row in rows}
    assert "No such file" in reasons[uris[17]]
    assert reasons[uris[3]] == "not an image of a known format"
    assert reasons[uris[BAD]] == "the file is empty"


def test_run_resumes_with_fewer_workers_after_node_death(scenes: Path, tmp_path: Path) -> None:
    """Three workers use four CPUs. Two CPUs remain, so the run resumes with one worker, and one CPU decodes for it."""
    fast_health_checks = {
        "health_check_period_ms": 1000,
        "health_check_timeout_ms": 3000,
        "health_check_failure_threshold": 3,
    }
    head = {"num_cpus": 2, "include_dashboard": False, "_system_config": fast_health_checks}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        node = cluster.add_node(num_cpus=2)
        cluster.wait_for_nodes()
        record = tmp_path / "record"
        config = make_config(scenes, tmp_path, **{"resources.num_workers": "1..3", "train.epochs": 1})
        driver = start_driver(config, record, RAY_ADDRESS=cluster.address)
        wait_for_step(driver, record, (0, 3))
        cluster.remove_node(node, allow_graceful=False)
        output = driver.communicate(timeout=200)[0]
        assert driver.returncode == 0, output
    finally:
        cluster.shutdown()
    result = read_record(record)
    assert_every_image_once(result, epochs=1)
    assert [world for _, world in result.starts] == [3, 1]
    assert result.starts[1][0] >= (0, 2), "the run resumes within the epoch"


def test_one_image_and_more_workers_than_images(local_ray: None, tmp_path: Path) -> None:
    """The table is also smaller than a batch. The only step of the epoch has one image, and the second rank has a filler."""
    root = make_coco(tmp_path / "data", {"train": [[0, 1]], "val": [[0], [1, 2]]})
    settings = {"data.missing_words": "random", "protocol": "paper", "train.epochs": 1}
    result, record = train_recorded(make_config(root, tmp_path / "runs", **settings), tmp_path / "record")
    assert record.starts == [((0, 0), 2)]
    assert record.rows == {0: [0]}
    assert [line["train/images"] for line in repeatable_metrics(result)] == [1]
