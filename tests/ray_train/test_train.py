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
    """Return a data set of 50 train, 13 val and 10 test images: batch and workers divide no size."""
    return generate_scenes(tmp_path_factory.mktemp("data") / "scenes", num_train=50, num_val=13, num_test=10)


def copy_as_coco(scenes: Path, folder: Path) -> Path:
    """Return a copy that a test may damage. Its runs read it as `coco`, so that it is not generated anew."""
    shutil.copytree(scenes, folder)
    return folder


def small_config(root: Path, storage: Path, **overrides: object) -> ExperimentConfig:
    """Return a config of resnet10 at 64 pixels and batch 16. EMA is on, so that all of the train state matters."""
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
    """Return the result of an undisturbed run of two epochs on two workers."""
    return train(small_config(scenes, tmp_path_factory.mktemp("runs"), **{"train.run_name": "finished"}))


def test_run_folder_holds_metrics_curves_and_checkpoints(finished: TrainResult) -> None:
    folder = finished.run_folder
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2]
    for line in lines:
        assert line["train/images"] == 50
        assert line["val/images"] == 13
        assert line["train/bad_images"] == line["val/bad_images"] == 0
        assert 0 <= line["train/data_wait_fraction"] <= 1
        assert line["train/first_batch_seconds"] > 0
        assert line["train/object_store_peak_bytes"] >= 25 * 3 * 64 * 64, "at least a rank's images of an epoch"
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


def test_checkpoint_predicts_without_other_files(finished: TrainResult, scenes: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(finished.best_checkpoint, moved)
    predictor = Predictor.from_checkpoint(moved)
    images = sorted((scenes / "test2014").glob("*.jpg"))
    probabilities = predictor(images)
    assert probabilities.shape == (10, 16)
    assert predictor.label_names == tuple(sorted(predictor.label_names))
    assert probabilities.min() >= 0
    assert probabilities.max() <= 1


def test_saved_config_is_the_config_of_the_run(finished: TrainResult) -> None:
    config = load_config(finished.run_folder / "config.yaml")
    assert load_checkpoint(finished.best_checkpoint).config == config
    with pytest.raises(UserError, match="exists already"):
        train(config)


def test_evaluation_is_independent_of_worker_count(finished: TrainResult) -> None:
    """The run scored test with two workers. Three workers do not divide its 10 images."""
    config = load_config(finished.run_folder / "config.yaml").with_overrides({"resources.num_workers": 3})
    metrics = evaluate_checkpoint(finished.best_checkpoint, config, "test").metrics
    assert metrics["test/images"] == 10
    compared = [name for name, value in finished.metrics.items() if name.startswith("test/") and value == value]
    assert len(compared) > 20
    for name in compared:
        assert metrics[name] == pytest.approx(finished.metrics[name], abs=1e-6), name


def assert_same_weights(run: Path, reference: Path, num_steps: int) -> None:
    """Assert that two runs of two epochs, `num_steps` in all, have equal weights and averages to the last bit."""
    state, expected = (load_train_state(max(folder.glob("epoch_0002*"))) for folder in (run, reference))
    assert state.epoch == expected.epoch == 2
    for name, tensor in expected.model.items():
        assert torch.equal(state.model[name], tensor), name
    assert state.ema is not None
    assert expected.ema is not None
    for name, tensor in expected.ema.items():
        assert torch.equal(state.ema[name], tensor), name
    assert state.scheduler["last_epoch"] == expected.scheduler["last_epoch"] == num_steps


def test_interrupted_and_resumed_equals_uninterrupted(finished: TrainResult, scenes: Path, tmp_path: Path) -> None:
    """Ctrl-C after the first epoch's checkpoint, then --resume, gives equal weights to the last bit."""
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
    assert len(errors) < 500, "Ray's log messages are hidden"

    resumed = train(resume_config(tmp_path / "stopped"), resume=True)
    lines = (resumed.run_folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [1, 2]
    assert_same_weights(resumed.run_folder, finished.run_folder, num_steps=8)


def test_resuming_a_finished_run_returns_its_result(
    finished: TrainResult, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without Ray, and without a change in its folder."""
    monkeypatch.setattr("msrn_ray.ray_train.driver.connect", lambda resources: pytest.fail("Ray was started"))
    before = {path: path.stat().st_mtime_ns for path in finished.run_folder.rglob("*")}
    result = train(resume_config(finished.run_folder), resume=True)
    assert (result.run_folder, result.best_checkpoint) == (finished.run_folder, finished.best_checkpoint)
    np.testing.assert_equal(result.metrics, finished.metrics)
    assert "all 2 epochs are done; raise train.epochs to train more" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in finished.run_folder.rglob("*")} == before


def test_changed_data_are_scored_on_the_recorded_split(finished: TrainResult, scenes: Path, tmp_path: Path) -> None:
    """The run's folder keeps its split: an image that leaves test is named, and the others keep their scores."""
    root = copy_as_coco(scenes, tmp_path / "changed")
    path = root / "annotations" / "instances_test2014.json"
    content = json.loads(path.read_text())
    gone = content["images"].pop()["id"]
    content["annotations"] = [box for box in content["annotations"] if box["image_id"] != gone]
    path.write_text(json.dumps(content))
    config = load_config(finished.run_folder / "config.yaml").with_overrides({"data.root": str(root)})
    evaluation = evaluate_checkpoint(finished.run_folder, config, "test")
    assert (evaluation.metrics["test/images"], evaluation.metrics["test/images_trained_on"]) == (9, 0)
    assert f"gone: 1 of 10 recorded test images ({gone})" in " ".join(evaluation.notes)


def test_resuming_with_other_settings_is_refused(finished: TrainResult) -> None:
    saved_config = (finished.run_folder / "config.yaml").read_bytes()
    config = resume_config(finished.run_folder).with_overrides({"model.levels": ["layer4"], "train.batch_size": 8})
    with pytest.raises(UserError, match=r"model\.levels was .*train\.batch_size was 16, now 8"):
        train(config, resume=True)
    assert (finished.run_folder / "config.yaml").read_bytes() == saved_config


def test_resuming_with_other_word_vectors_is_refused(finished: TrainResult) -> None:
    config = resume_config(finished.run_folder).with_overrides({"data.word_vectors": "learned"})
    with pytest.raises(UserError, match=r"data\.word_vectors was None, now 'learned'"):
        train(config, resume=True)


def test_run_with_learned_vectors_given_counts_compiled_kernels(
    local_ray: None, scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run trains the word vectors, reads counts from a file, and compiles the attention if it finds a compiler, as by default."""
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
    initial = load_word_vectors(names, "learned").vectors
    assert saved.weights["label_semantics.word_vectors"].shape == initial.shape
    assert not torch.equal(saved.weights["label_semantics.word_vectors"], initial), "training changes them"
    assert Predictor.from_checkpoint(result.run_folder)([Image.new("RGB", (64, 64))]).shape == (1, len(names))


def test_resuming_on_other_data_is_refused(finished: TrainResult, scenes: Path, tmp_path: Path) -> None:
    run = tmp_path / "finished"
    shutil.copytree(finished.run_folder, run)
    other_root = copy_as_coco(scenes, tmp_path / "other")
    path = other_root / "annotations" / "instances_train2014.json"
    content = json.loads(path.read_text())
    content["images"].pop()
    kept = {image["id"] for image in content["images"]}
    content["annotations"] = [box for box in content["annotations"] if box["image_id"] in kept]
    path.write_text(json.dumps(content))
    config = resume_config(run).with_overrides({"data.root": str(other_root), "train.epochs": 3})
    saved_config = (run / "config.yaml").read_bytes()
    with pytest.raises(UserError) as caught:
        train(config, resume=True)
    saved_data, new_data = (
        str(caught.value).removeprefix(f"{run} was trained on other images or labels: ").split("; now ")
    )
    assert saved_data.startswith(f"coco in {scenes} (instances_train2014.json")
    assert ": 50 train, 13 val images), fingerprint " in saved_data
    assert new_data.startswith(f"coco in {other_root} (instances_train2014.json")
    assert ": 49 train, 13 val images), fingerprint " in new_data
    assert "--data.root, or start a new run" in new_data
    assert (run / "config.yaml").read_bytes() == saved_config
    assert not (run / "failure.txt").exists()


def test_resuming_with_too_few_epochs_is_refused(finished: TrainResult) -> None:
    config = resume_config(finished.run_folder).with_overrides({"train.epochs": 1})
    with pytest.raises(UserError, match="can be raised when a run is resumed, not lowered"):
        train(config, resume=True)


def test_checkpoint_holds_moving_average_and_shared_statistics(finished: TrainResult) -> None:
    """model.pt has the scored weights: the moving average, with BatchNorm statistics that all ranks share."""
    last = max(finished.run_folder.glob("epoch_0002*"))
    weights, state = load_checkpoint(last).weights, load_train_state(last)
    assert state.ema is not None
    for name, tensor in weights.items():
        assert torch.equal(tensor, state.ema[f"module.{name}"]), name
        if "running_" in name:
            assert torch.equal(tensor, state.model[name]), name
    assert any(not torch.equal(tensor, state.model[name]) for name, tensor in weights.items())


def test_one_worker_scores_val_like_two_workers(finished: TrainResult) -> None:
    last = max(finished.run_folder.glob("epoch_0002*"))
    line = json.loads((finished.run_folder / "metrics.jsonl").read_text().splitlines()[-1])
    config = load_config(finished.run_folder / "config.yaml").with_overrides({"resources.num_workers": 1})
    evaluation = evaluate_checkpoint(last, config, "val")
    metrics = evaluation.metrics
    compared = [name for name, value in line.items() if name.startswith("val/") and value is not None]
    assert len(compared) > 20
    for name in compared:
        assert metrics[name] == pytest.approx(line[name], abs=1e-6), name
    assert evaluation.protocol == "honest"
    assert metrics["val/images_trained_on"] == 0


def test_evaluate_reports_a_split_of_bad_images(finished: TrainResult, scenes: Path, tmp_path: Path) -> None:
    root = copy_as_coco(scenes, tmp_path / "rotten")
    for image in (root / "test2014").glob("*.jpg"):
        image.write_bytes(b"")
    config = load_config(finished.run_folder / "config.yaml").with_overrides({"data.root": str(root)})
    with pytest.raises(BadImagesError, match=r"10 of 10 test images cannot be decoded.*the file is empty"):
        evaluate_checkpoint(finished.best_checkpoint, config, "test")


def test_non_finite_loss_ends_run_naming_the_images(
    local_ray: None, scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small_config(
        scenes,
        tmp_path,
        **{"optim.name": "sgd", "optim.lr": 1e30, "optim.schedule": "constant", "optim.clip_norm": None},
    )
    with pytest.raises(NonFiniteLossError, match=r"not finite at step \d+ of the epoch, images \d+") as caught:
        train(config)
    assert capsys.readouterr().out.count("training on 2 x") == 1, "Ray Train does not retry an error that would recur"
    named = re.findall(r"images ([\d, ]+);", str(caught.value))[0].split(", ")
    content = json.loads((scenes / "annotations" / "instances_train2014.json").read_text())
    assert {int(name) for name in named} <= {image["id"] for image in content["images"]}
    (run,) = tmp_path.iterdir()
    assert not list(run.glob("epoch_*"))
    assert (run / "failure.txt").read_text().strip() == str(caught.value)


@pytest.fixture
def damaged(scenes: Path, tmp_path: Path) -> tuple[Path, list[Path]]:
    """Return a data set with 3 damaged images among its 50 train images, and the paths of the damaged images."""
    root = copy_as_coco(scenes, tmp_path / "damaged")
    bad_images = sorted((root / "train2014").glob("*.jpg"))[5:8]
    bad_images[0].write_bytes(b"")
    bad_images[1].write_bytes(bad_images[1].read_bytes()[:300])
    bad_images[2].write_text("plain text")
    return root, bad_images


def test_run_stops_and_names_too_many_bad_images(
    local_ray: None, damaged: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    root, bad_images = damaged
    with pytest.raises(BadImagesError, match=r"of 50 train images cannot be decoded.*max_bad_fraction=0\.01") as caught:
        train(small_config(root, tmp_path / "runs"))
    assert any(str(image) in str(caught.value) for image in bad_images)


@pytest.mark.timeout(60)  # Ray itself would wait forever
def test_more_workers_than_cpus_is_an_error(local_ray: None, scenes: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"num_workers=40.*cluster has 6 CPUs"):
        train(small_config(scenes, tmp_path / "runs", **{"resources.num_workers": 40}))
    assert not (tmp_path / "runs").exists()
