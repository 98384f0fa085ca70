"""Training, resuming and evaluating through Ray on a small generated data set."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from msrn_ray.config import ExperimentConfig, load_config
from msrn_ray.datasets.protocol import load_splits
from msrn_ray.datasets.scenes.generate import generate_scenes
from msrn_ray.errors import BadImagesError, NonFiniteLossError, UserError
from msrn_ray.inference.predictor import Predictor
from msrn_ray.labels.graph import LabelCounts, Provenance, save_counts
from msrn_ray.labels.word_vectors import load_word_vectors
from msrn_ray.presets import PRESETS
from msrn_ray.ray_train.driver import TrainResult, train
from msrn_ray.ray_train.evaluate import evaluate_checkpoint
from msrn_ray.runs.checkpoint import load_checkpoint, load_train_state
from msrn_ray.runs.resume import resume_config

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """50 train, 13 val and 10 test images: no size divides by batch or workers."""
    return generate_scenes(tmp_path_factory.mktemp("data") / "scenes", num_train=50, num_val=13, num_test=10)


def coco_copy(scenes: Path, folder: Path) -> Path:
    """A copy that may be damaged; read as `coco`, so that it is not generated anew."""
    shutil.copytree(scenes, folder)
    return folder


def small_config(root: Path, storage: Path, **overrides: object) -> ExperimentConfig:
    """resnet10 at 64 pixels, batch 16, EMA on, so that all of the train state matters."""
    return PRESETS["scenes"].config.with_overrides(
        {
            "data.dataset": "coco",
            "data.root": str(root),
            "data.image_size": 64,
            "model.embed_dim": 32,
            "model.compile": "off",
            "optim.schedule": "cosine",
            "optim.ema_decay": 0.9,
            "train.epochs": 2,
            "train.batch_size": 16,
            "train.log_every": 2,
            "train.eval_batch_size": 4,
            "train.storage": str(storage),
            "resources.num_workers": 2,
            **overrides,
        }
    )


@pytest.fixture(scope="module")
def finished(local_ray: None, scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    """An undisturbed run of two epochs on two workers."""
    return train(small_config(scenes, tmp_path_factory.mktemp("runs"), **{"train.run_name": "finished"}))


def test_a_run_leaves_what_it_says(finished: TrainResult) -> None:
    folder = finished.run_folder
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2]
    for line in lines:
        assert line["train/images"] == 50
        assert line["val/images"] == 13
        assert line["train/bad_images"] == line["val/bad_images"] == 0
        assert 0 <= line["train/data_wait_fraction"] <= 1
        assert line["train/first_batch_seconds"] > 0
        assert line["train/object_store_peak_bytes"] >= 25 * 3 * 64 * 64, "a rank's images of an epoch"
        assert line["train/object_store_spilled_bytes"] == 0
    assert ["train/epoch_gap_seconds" in line for line in lines] == [False, True]
    assert 0 <= lines[1]["train/epoch_gap_seconds"] < sum(line["epoch_seconds"] for line in lines)
    best = max(lines, key=lambda line: line["val/mAP"])
    assert finished.best_checkpoint == folder / best["checkpoint"]
    assert finished.metrics["val/mAP"] == best["val/mAP"]
    assert finished.metrics["test/images"] == 10
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert any((folder / "tensorboard").iterdir())
    kept = sorted(path.name for path in folder.glob("epoch_*"))
    assert kept == sorted({best["checkpoint"], lines[-1]["checkpoint"]})


def test_the_checkpoint_needs_nothing_else(finished: TrainResult, scenes: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(finished.best_checkpoint, moved)
    predictor = Predictor.from_checkpoint(moved)
    images = sorted((scenes / "test2014").glob("*.jpg"))
    probabilities = predictor(images)
    assert probabilities.shape == (10, 16)
    assert predictor.label_names == tuple(sorted(predictor.label_names))
    assert probabilities.min() >= 0
    assert probabilities.max() <= 1


def test_the_saved_config_is_the_run(finished: TrainResult) -> None:
    config = load_config(finished.run_folder / "config.yaml")
    assert load_checkpoint(finished.best_checkpoint).config == config
    with pytest.raises(UserError, match="exists already"):
        train(config)


def test_evaluation_does_not_depend_on_the_number_of_workers(finished: TrainResult) -> None:
    """Two workers scored test in the run itself; 10 images do not divide by 3."""
    config = load_config(finished.run_folder / "config.yaml").with_overrides({"resources.num_workers": 3})
    metrics = evaluate_checkpoint(finished.best_checkpoint, config, "test")
    assert metrics["test/images"] == 10
    compared = [name for name, value in finished.metrics.items() if name.startswith("test/") and value == value]
    assert len(compared) > 20
    for name in compared:
        assert metrics[name] == pytest.approx(finished.metrics[name], abs=1e-6), name


def assert_same_weights(one: Path, other: Path, num_steps: int) -> None:
    """Two runs of two epochs, `num_steps` in all, ended in the same weights and averages to the last bit."""
    ours, theirs = (load_train_state(max(run.glob("epoch_0002*"))) for run in (one, other))
    assert ours.epoch == theirs.epoch == 2
    for name, tensor in theirs.model.items():
        assert torch.equal(ours.model[name], tensor), name
    assert ours.ema is not None
    assert theirs.ema is not None
    for name, tensor in theirs.ema.items():
        assert torch.equal(ours.ema[name], tensor), name
    assert ours.scheduler["last_epoch"] == theirs.scheduler["last_epoch"] == num_steps


def test_interrupted_and_resumed_equals_uninterrupted(finished: TrainResult, scenes: Path, tmp_path: Path) -> None:
    """Ctrl-C after the first epoch's checkpoint, then --resume: the same weights to the last bit."""
    config = small_config(scenes, tmp_path, **{"train.run_name": "stopped"})
    config.save(tmp_path / "start.yaml")
    command = [sys.executable, "-m", "msrn_ray", "train", "--config", str(tmp_path / "start.yaml")]
    environment = {**os.environ, "RAY_worker_niceness": "0"}
    environment.pop("RAY_ADDRESS", None)
    process = subprocess.Popen(
        [*command, "--train.run-name", "stopped"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("epoch 1/2  train/loss"):
            break
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=90)
    assert process.returncode == 130, errors
    assert f"--resume {tmp_path / 'stopped'}" in errors
    assert "Traceback" not in errors
    assert len(errors) < 500, "Ray's own log noise"

    resumed = train(resume_config(tmp_path / "stopped"), resume=True)
    lines = (resumed.run_folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [1, 2]
    assert_same_weights(resumed.run_folder, finished.run_folder, num_steps=8)


def test_resuming_with_other_settings_is_refused(finished: TrainResult) -> None:
    before = (finished.run_folder / "config.yaml").read_bytes()
    config = resume_config(finished.run_folder).with_overrides({"model.levels": ["layer4"], "train.batch_size": 8})
    with pytest.raises(UserError, match=r"model\.levels was .*train\.batch_size was 16, now 8"):
        train(config, resume=True)
    assert (finished.run_folder / "config.yaml").read_bytes() == before


def test_resuming_with_other_word_vectors_is_refused(finished: TrainResult) -> None:
    config = resume_config(finished.run_folder).with_overrides({"data.word_vectors": "learned"})
    with pytest.raises(UserError, match=r"data\.word_vectors was None, now 'learned'"):
        train(config, resume=True)


def test_learned_vectors_given_counts_and_kernels(
    local_ray: None, scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Vectors that are trained, counts from a file, and the attention compiled where there is a compiler, as by default."""
    names = load_splits(small_config(scenes, tmp_path)).train.label_names
    pairs = np.zeros((len(names), len(names)), np.int64)
    pairs[0, 1] = pairs[1, 0] = 9
    counts = LabelCounts(names, pairs, np.full(len(names), 10), Provenance("elsewhere", 100, "a" * 64))
    save_counts(tmp_path / "counts.npz", counts)
    settings = {"data.word_vectors": "learned", "data.label_counts": str(tmp_path / "counts.npz")}
    result = train(small_config(scenes, tmp_path, **settings, **{"model.compile": "auto", "train.epochs": 1}))
    assert re.search(
        r"training on 2 x cpu in (bf16|float32), attention kernels (compiled in \d+ s|tile by tile.*), epochs",
        capsys.readouterr().out,
    )
    assert result.metrics["val/images"] == 13
    saved = load_checkpoint(result.best_checkpoint)
    assert saved.counts.provenance == counts.provenance
    assert int(saved.weights["label_semantics.attend_mask"].sum()) == len(names) + 2
    start = load_word_vectors(names, "learned").vectors
    assert saved.weights["label_semantics.word_vectors"].shape == start.shape
    assert not torch.equal(saved.weights["label_semantics.word_vectors"], start), "they are trained"
    assert Predictor.from_checkpoint(result.run_folder)([Image.new("RGB", (64, 64))]).shape == (1, len(names))


def test_resuming_on_other_data_is_refused(finished: TrainResult, scenes: Path, tmp_path: Path) -> None:
    run = tmp_path / "finished"
    shutil.copytree(finished.run_folder, run)
    other = coco_copy(scenes, tmp_path / "other")
    path = other / "annotations" / "instances_train2014.json"
    content = json.loads(path.read_text())
    content["images"].pop()
    kept = {image["id"] for image in content["images"]}
    content["annotations"] = [one for one in content["annotations"] if one["image_id"] in kept]
    path.write_text(json.dumps(content))
    config = resume_config(run).with_overrides({"data.root": str(other), "train.epochs": 3})
    before = (run / "config.yaml").read_bytes()
    with pytest.raises(UserError) as caught:
        train(config, resume=True)
    said, now = str(caught.value).removeprefix(f"{run} was trained on other images or labels: ").split("; now ")
    assert said.startswith(f"coco in {scenes} (instances_train2014.json")
    assert ": 50 train, 13 val images), fingerprint " in said
    assert now.startswith(f"coco in {other} (instances_train2014.json")
    assert ": 49 train, 13 val images), fingerprint " in now
    assert "--data.root, or start a new run" in now
    assert (run / "config.yaml").read_bytes() == before
    assert not (run / "failure.txt").exists()


def test_fewer_epochs_than_a_run_has_done_are_refused(finished: TrainResult) -> None:
    config = resume_config(finished.run_folder).with_overrides({"train.epochs": 1})
    with pytest.raises(UserError, match="can be raised when a run is resumed, not lowered"):
        train(config, resume=True)


def test_the_checkpoint_holds_the_average_and_the_synchronised_statistics(finished: TrainResult) -> None:
    """model.pt has the weights that were scored: the moving average, with BatchNorm statistics that all ranks share."""
    last = max(finished.run_folder.glob("epoch_0002*"))
    weights, state = load_checkpoint(last).weights, load_train_state(last)
    assert state.ema is not None
    for name, tensor in weights.items():
        assert torch.equal(tensor, state.ema[f"module.{name}"]), name
        if "running_" in name:
            assert torch.equal(tensor, state.model[name]), name
    assert any(not torch.equal(tensor, state.model[name]) for name, tensor in weights.items())


def test_one_worker_scores_val_as_two_did_in_the_last_epoch(finished: TrainResult) -> None:
    last = max(finished.run_folder.glob("epoch_0002*"))
    line = json.loads((finished.run_folder / "metrics.jsonl").read_text().splitlines()[-1])
    config = load_config(finished.run_folder / "config.yaml").with_overrides({"resources.num_workers": 1})
    metrics = evaluate_checkpoint(last, config, "val")
    compared = [name for name, value in line.items() if name.startswith("val/") and value is not None]
    assert len(compared) > 20
    for name in compared:
        assert metrics[name] == pytest.approx(line[name], abs=1e-6), name
    assert metrics["protocol"] == "honest"


def test_a_split_of_bad_images_is_named_by_evaluate(finished: TrainResult, scenes: Path, tmp_path: Path) -> None:
    root = coco_copy(scenes, tmp_path / "rotten")
    for image in (root / "test2014").glob("*.jpg"):
        image.write_bytes(b"")
    config = load_config(finished.run_folder / "config.yaml").with_overrides({"data.root": str(root)})
    with pytest.raises(BadImagesError, match=r"10 of 10 test images cannot be decoded.*the file is empty"):
        evaluate_checkpoint(finished.best_checkpoint, config, "test")


def test_a_loss_that_is_not_finite_stops_all_ranks_with_step_and_images(
    local_ray: None, scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small_config(
        scenes,
        tmp_path,
        **{"optim.name": "sgd", "optim.lr": 1e30, "optim.schedule": "constant", "optim.clip_norm": None},
    )
    with pytest.raises(NonFiniteLossError, match=r"not finite at step \d+ of the epoch, images \d+") as caught:
        train(config)
    assert capsys.readouterr().out.count("training on 2 x") == 1, "what starting again would repeat is not tried again"
    named = re.findall(r"images ([\d, ]+);", str(caught.value))[0].split(", ")
    content = json.loads((scenes / "annotations" / "instances_train2014.json").read_text())
    assert {int(name) for name in named} <= {image["id"] for image in content["images"]}
    (run,) = tmp_path.iterdir()
    assert not list(run.glob("epoch_*"))
    assert (run / "failure.txt").read_text().strip() == str(caught.value)


@pytest.fixture
def damaged(scenes: Path, tmp_path: Path) -> tuple[Path, list[Path]]:
    """Three of the 50 train images are not images any more."""
    root = coco_copy(scenes, tmp_path / "damaged")
    victims = sorted((root / "train2014").glob("*.jpg"))[5:8]
    victims[0].write_bytes(b"")
    victims[1].write_bytes(victims[1].read_bytes()[:300])
    victims[2].write_text("plain text")
    return root, victims


def test_too_many_bad_images_stop_the_run_and_are_named(
    local_ray: None, damaged: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    root, victims = damaged
    with pytest.raises(BadImagesError, match=r"of 50 train images cannot be decoded.*max_bad_fraction=0\.01") as caught:
        train(small_config(root, tmp_path / "runs"))
    assert any(str(victim) in str(caught.value) for victim in victims)


@pytest.mark.timeout(60)  # Ray itself would wait for ever
def test_more_workers_than_the_cluster_has_is_an_error_not_a_wait(
    local_ray: None, scenes: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"num_workers=40.*cluster has 6 CPUs"):
        train(small_config(scenes, tmp_path / "runs", **{"resources.num_workers": 40}))
    assert not (tmp_path / "runs").exists()
