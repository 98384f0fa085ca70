"""The files on disk: exact round trips, refused files, whole or not at all."""

from __future__ import annotations

import os
import resource
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from msrn_ray.config import ExperimentConfig
from msrn_ray.errors import UserError
from msrn_ray.inference.predictor import build_from_checkpoint
from msrn_ray.labels.graph import LabelCounts, Provenance, attend_mask, choose_tau
from msrn_ray.model import build_model
from msrn_ray.runs import checkpoint as checkpoint_module
from msrn_ray.runs.checkpoint import (
    Checkpoint,
    TrainState,
    find_model_file,
    load_checkpoint,
    load_train_state,
    save_checkpoint,
    save_train_state,
)
from msrn_ray.training.engine import EpochStats
from msrn_ray.training.row_ledger import Account
from tests.tiny import make_tiny_checkpoint


def example() -> Checkpoint:
    """Every entry unlike its default, tensors of several kinds."""
    names = ("straße", "a,b", "zebra crossing")
    pairs = np.array([[0, 3, 1], [3, 0, 0], [1, 0, 0]], np.int64)
    weights = {
        "layer.weight": torch.randn(4, 3, generator=torch.Generator().manual_seed(3)),
        "layer.half": torch.tensor([1 / 3, 65504.0], dtype=torch.float16),
        "layer.bf16": torch.tensor([1 / 3, 1e38], dtype=torch.bfloat16),
        "bn.num_batches_tracked": torch.tensor(2**40),
        "label_semantics.attend_mask": torch.eye(3, dtype=torch.bool),
    }
    return Checkpoint(
        config=ExperimentConfig().with_overrides(
            {"optim.lr": 0.1 + 0.2, "data.root": "/ä", "model.levels": ["layer4"]}
        ),
        label_names=names,
        counts=LabelCounts(names, pairs, np.array([2**40, 4, 5], np.int64), Provenance("ä.json", 2**41, "f" * 64)),
        weights=weights,
        thresholds=(0.1 + 0.2, 1 / 3, 0.5),
        metrics={"val/mAP": 1 / 3, "val/AP/zebra crossing": float("inf"), "val/images": 7},
        epoch=7,
        mean=(0.1, 0.2, 0.3),
        std=(0.4, 0.5, 0.6),
        versions={"torch": "9.9", "msrn_ray": "0.1"},
    )


def state_of(epoch: int, step: int, model: Mapping[str, Tensor] | None = None) -> TrainState:
    """A train state of nothing but its place, and a model."""
    return TrainState(model or {}, {}, {}, {}, None, epoch, "f" * 64, step)


def same_weights(one: Any, other: Any) -> bool:
    return list(one) == list(other) and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


def test_what_is_saved_is_what_is_loaded(tmp_path: Path) -> None:
    before = example()
    save_checkpoint(tmp_path / "deep" / "folder", before)
    for path in (tmp_path / "deep" / "folder", tmp_path / "deep" / "folder" / "model.pt"):
        after = load_checkpoint(path)
        assert after.config == before.config
        assert after.label_names == after.counts.names == before.label_names
        np.testing.assert_array_equal(after.counts.cooccurrence, before.counts.cooccurrence)
        np.testing.assert_array_equal(after.counts.count, before.counts.count)
        assert after.counts.cooccurrence.dtype == after.counts.count.dtype == np.int64
        assert same_weights(after.weights, before.weights)
        assert after.thresholds == before.thresholds
        assert after.metrics == before.metrics
        assert after.epoch == 7
        assert (after.mean, after.std) == (before.mean, before.std)
        assert after.versions == before.versions
    assert [file.name for file in (tmp_path / "deep" / "folder").iterdir()] == ["model.pt"]


def test_train_state_goes_on_where_it_was(tmp_path: Path) -> None:
    layer = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    scheduler.step()
    state = TrainState(
        model=layer.state_dict(),
        optimizer=optimizer.state_dict(),
        scheduler=scheduler.state_dict(),
        scaler={"scale": 2.0**16, "growth_factor": 2.0},
        ema={"n_averaged": torch.tensor(3), "module.weight": torch.ones(2)},
        epoch=4,
        data="f" * 64,
    )
    save_checkpoint(tmp_path, example(), state)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.pt", "train_state.pt"]
    after = load_train_state(tmp_path)
    assert same_weights(after.model, state.model)
    assert (after.epoch, after.data, after.scaler) == (4, "f" * 64, state.scaler)
    assert after.ema is not None
    assert same_weights(after.ema, state.ema)

    other = torch.optim.SGD(nn.Linear(3, 2).parameters(), lr=0.5, momentum=0.9)
    other.load_state_dict(dict(after.optimizer))
    momenta = [value["momentum_buffer"] for value in other.state_dict()["state"].values()]
    assert all(
        torch.equal(buffer, parameter.grad) for buffer, parameter in zip(momenta, layer.parameters(), strict=True)
    )
    assert other.param_groups[0]["lr"] == pytest.approx(0.01)
    assert after.scheduler["last_epoch"] == 1

    save_checkpoint(tmp_path, example(), replace(state, ema=None, epoch=5))
    assert load_train_state(tmp_path).ema is None
    assert load_train_state(tmp_path).epoch == 5


def test_a_state_within_an_epoch(tmp_path: Path) -> None:
    """It goes on from the step, with the account, the sums and the random numbers; and has no model to predict with."""
    torch.manual_seed(3)
    rng = [{"cpu": torch.get_rng_state()}, {"cpu": torch.get_rng_state().flip(0)}]
    account = Account(np.arange(19) % 2 == 0, np.arange(19) == 5)
    stats = EpochStats(seconds=1.5, images=10, classification_sum=1 / 3, steps=6)
    run = tmp_path / "run"
    state = TrainState({}, {}, {}, {}, None, 4, "f" * 64, 6, account.pack(), asdict(stats), 2, rng)
    save_train_state(run / "epoch_0005_step_000006", state)
    after = load_train_state(run / "epoch_0005_step_000006")
    assert (after.epoch, after.step, after.world_size) == (4, 6, 2)
    unpacked = Account.unpack(after.account, 19)
    np.testing.assert_array_equal(unpacked.trained, account.trained)
    np.testing.assert_array_equal(unpacked.unreadable, account.unreadable)
    assert EpochStats(**after.stats) == stats
    assert isinstance(EpochStats(**after.stats).images, int)
    assert [torch.equal(one["cpu"], other["cpu"]) for one, other in zip(after.rng, rng, strict=True)] == [True, True]
    with pytest.raises(UserError, match=rf"within an epoch, without scores.*msrn train --resume {run}"):
        load_checkpoint(run / "epoch_0005_step_000006")


def test_a_state_from_before_epochs_were_saved_half_way(tmp_path: Path) -> None:
    old = {"model": {}, "optimizer": {}, "scheduler": {}, "scaler": {}, "ema": None, "epoch": 4, "data": "f"}
    torch.save(old, tmp_path / "train_state.pt")
    state = load_train_state(tmp_path)
    assert (state.epoch, state.step, state.rng) == (4, 0, ())


class _Payload:
    """Unpickled as pickle would, it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.folder),)


def test_a_file_that_would_run_code_is_refused_and_nothing_is_run(tmp_path: Path) -> None:
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
    assert ran.exists(), "the file is really a dangerous one"


def test_cut_off_foreign_and_old_files_are_refused(tmp_path: Path) -> None:
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
    for other in (content | {"format": 2}, {"state_dict": {}, "epoch": 3}, [1, 2], torch.ones(3)):
        torch.save(other, path)
        with pytest.raises(UserError, match=r"model\.pt: not a checkpoint of msrn_ray \(format 1\)"):
            load_checkpoint(path)


@pytest.mark.parametrize("entry", ["label_names", "config", "weights", "cooccurrence", "counts", "thresholds", "epoch"])
def test_a_missing_entry_is_named(tmp_path: Path, entry: str) -> None:
    save_checkpoint(tmp_path, example())
    content = torch.load(tmp_path / "model.pt", weights_only=True)
    del content[entry]
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(UserError, match=rf"model\.pt.*'{entry}' is missing"):
        load_checkpoint(tmp_path)


def test_a_wrong_config_inside_is_named(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, example())
    content = torch.load(tmp_path / "model.pt", weights_only=True)
    content["config"]["optim"]["lr"] = -1
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(UserError, match=r"model\.pt: config: optim\.lr: .*greater than 0"):
        load_checkpoint(tmp_path)


def test_train_state_that_is_missing_or_lacks_an_entry(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"train_state\.pt: cannot be read \(No such file"):
        load_train_state(tmp_path)
    torch.save({"model": {}, "epoch": 3}, tmp_path / "train_state.pt")
    with pytest.raises(UserError, match=r"train_state\.pt.*optimizer"):
        load_train_state(tmp_path)


def test_a_run_folder_stands_for_its_best_checkpoint(tmp_path: Path) -> None:
    run = tmp_path / "run"
    for epoch in (1, 2, 3):
        save_checkpoint(run / f"checkpoint_{epoch}", replace(example(), epoch=epoch))
    with pytest.raises(UserError, match=r"run: holds neither model\.pt nor best\.txt"):
        load_checkpoint(run)
    (run / "best.txt").write_text("checkpoint_2\n")
    assert find_model_file(run) == run / "checkpoint_2" / "model.pt"
    assert load_checkpoint(run).epoch == 2
    (run / "best.txt").write_text("checkpoint_9\n")
    with pytest.raises(UserError, match="run: its best checkpoint checkpoint_9 is gone"):
        load_checkpoint(run)
    with pytest.raises(UserError, match="none: no such file or folder"):
        load_checkpoint(tmp_path / "none")
    with pytest.raises(UserError, match="holds neither"):
        load_checkpoint(tmp_path)


class _Unpicklable:
    def __reduce__(self) -> tuple[object, ...]:
        raise RuntimeError("cannot be saved")


def broken_disk(*_: object) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("failure", ["content", "write", "replace"])
def test_a_failing_save_leaves_the_old_file_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: str
) -> None:
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


def test_a_disk_that_is_full_is_said(tmp_path: Path) -> None:
    """A real refusal of the system half-way through the file, of which torch itself would say "unexpected pos"."""
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


def test_weights_of_a_model_come_back_as_tensors_on_the_cpu(tmp_path: Path) -> None:
    layer: dict[str, Tensor] = nn.Linear(2, 2).state_dict()
    save_checkpoint(tmp_path, replace(example(), weights=layer))
    after = load_checkpoint(tmp_path).weights
    assert {tensor.device.type for tensor in after.values()} == {"cpu"}


def test_a_run_without_a_checkpoint_says_how_to_go_on(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("preset: scenes\n")
    with pytest.raises(UserError, match=r"no epoch of this run is finished; go on with msrn train --resume"):
        load_checkpoint(tmp_path)


def test_a_learned_embedding_and_an_automatic_graph_come_back(tmp_path: Path) -> None:
    folder = make_tiny_checkpoint(tmp_path / "tiny")
    tiny = load_checkpoint(folder)
    config = tiny.config.with_overrides(
        {"data.word_vectors": "learned", "model.tau": "auto", "model.tau_degree": 0.6, "model.levels": ["layer2"]}
    )
    mask = attend_mask(tiny.counts, choose_tau(tiny.counts, "auto", 0.6))
    assert int(mask.sum()) == 3 + 2, "0.4 would give one edge"
    vectors = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    model = build_model(config.model, vectors, mask, train_vectors=True)
    save_checkpoint(folder, replace(tiny, config=config, weights=model.state_dict()))
    back = load_checkpoint(folder)
    assert back.config == config
    again = build_from_checkpoint(back)
    assert torch.equal(dict(again.named_parameters())["label_semantics.word_vectors"], vectors)
    assert torch.equal(again.state_dict()["label_semantics.attend_mask"], mask)
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(again(images).logits, model.eval()(images).logits)


def test_a_checkpoint_from_before_counts_had_a_provenance(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, example())
    content = torch.load(tmp_path / "model.pt", weights_only=True)
    assert content.pop("counts_provenance") == {
        "source": "ä.json",
        "num_images": 2**41,
        "fingerprint": "f" * 64,
    }
    del content["config"]["model"]["tau_degree"]
    del content["config"]["data"]["label_counts"]
    torch.save(content, tmp_path / "model.pt")
    old = load_checkpoint(tmp_path)
    assert old.counts.provenance is None
    assert old.config == example().config
