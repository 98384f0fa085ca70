"""Checkpoints survive the round trip to disk and are found in run folders."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from msrn_ray.errors import UserError
from msrn_ray.inference.predictor import build_from_checkpoint
from msrn_ray.labels.graph import attend_mask, choose_tau
from msrn_ray.model import build_model
from msrn_ray.runs.checkpoint import (
    TrainState,
    find_model_file,
    load_checkpoint,
    load_train_state,
    save_checkpoint,
    save_train_state,
)
from msrn_ray.training.epoch import EpochStats
from msrn_ray.training.row_ledger import Account
from tests.runs.checkpoint_example import example
from tests.tiny import make_tiny_checkpoint


def same_weights(loaded: Any, saved: Any) -> bool:
    return list(loaded) == list(saved) and all(
        loaded[name].dtype == saved[name].dtype and torch.equal(loaded[name], saved[name]) for name in loaded
    )


def test_checkpoint_round_trips(tmp_path: Path) -> None:
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


def test_train_state_round_trips(tmp_path: Path) -> None:
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
    save_checkpoint(tmp_path, example())
    save_train_state(tmp_path, state)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.pt", "train_state.pt"]
    after = load_train_state(tmp_path)
    assert same_weights(after.model, state.model)
    assert (after.epoch, after.data, after.scaler) == (4, "f" * 64, state.scaler)
    assert after.ema is not None
    assert same_weights(after.ema, state.ema)

    resumed = torch.optim.SGD(nn.Linear(3, 2).parameters(), lr=0.5, momentum=0.9)
    resumed.load_state_dict(dict(after.optimizer))
    momenta = [value["momentum_buffer"] for value in resumed.state_dict()["state"].values()]
    assert all(
        torch.equal(buffer, parameter.grad) for buffer, parameter in zip(momenta, layer.parameters(), strict=True)
    )
    assert resumed.param_groups[0]["lr"] == pytest.approx(0.01)
    assert after.scheduler["last_epoch"] == 1

    save_train_state(tmp_path, replace(state, ema=None, epoch=5))
    assert load_train_state(tmp_path).ema is None
    assert load_train_state(tmp_path).epoch == 5


def test_state_within_an_epoch_round_trips(tmp_path: Path) -> None:
    """It holds the step, the account, the sums and the random states, and no model to predict with."""
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
    assert [torch.equal(loaded["cpu"], saved["cpu"]) for loaded, saved in zip(after.rng, rng, strict=True)] == [
        True,
        True,
    ]
    with pytest.raises(UserError, match=rf"within an epoch, without scores.*msrn train --resume {run}"):
        load_checkpoint(run / "epoch_0005_step_000006")


def test_old_state_without_a_step_loads(tmp_path: Path) -> None:
    old = {"model": {}, "optimizer": {}, "scheduler": {}, "scaler": {}, "ema": None, "epoch": 4, "data": "f"}
    torch.save(old, tmp_path / "train_state.pt")
    state = load_train_state(tmp_path)
    assert (state.epoch, state.step, state.rng) == (4, 0, ())


def test_run_folder_stands_for_its_best_checkpoint(tmp_path: Path) -> None:
    run = tmp_path / "run"
    for epoch in (1, 2, 3):
        save_checkpoint(run / f"checkpoint_{epoch}", replace(example(), epoch=epoch))
    with pytest.raises(UserError, match=r"run: holds neither model\.pt nor best\.txt"):
        load_checkpoint(run)
    (run / "best.txt").write_text("checkpoint_2\n")
    assert find_model_file(run) == run / "checkpoint_2" / "model.pt"
    assert load_checkpoint(run).epoch == 2
    (run / "best.txt").write_text("checkpoint_9\n")
    with pytest.raises(UserError, match="run: its best checkpoint checkpoint_9 is missing"):
        load_checkpoint(run)
    with pytest.raises(UserError, match="none: no such file or folder"):
        load_checkpoint(tmp_path / "none")
    with pytest.raises(UserError, match="holds neither"):
        load_checkpoint(tmp_path)


def test_weights_load_on_the_cpu(tmp_path: Path) -> None:
    layer: dict[str, Tensor] = nn.Linear(2, 2).state_dict()
    save_checkpoint(tmp_path, replace(example(), weights=layer))
    after = load_checkpoint(tmp_path).weights
    assert {tensor.device.type for tensor in after.values()} == {"cpu"}


def test_run_without_a_checkpoint_names_the_resume_command(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("preset: scenes\n")
    with pytest.raises(UserError, match=r"no epoch of this run is finished; resume it with msrn train --resume"):
        load_checkpoint(tmp_path)


def test_learned_vectors_and_automatic_graph_round_trip(tmp_path: Path) -> None:
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
    loaded = load_checkpoint(folder)
    assert loaded.config == config
    rebuilt = build_from_checkpoint(loaded)
    assert torch.equal(dict(rebuilt.named_parameters())["label_semantics.word_vectors"], vectors)
    assert torch.equal(rebuilt.state_dict()["label_semantics.attend_mask"], mask)
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(rebuilt(images).logits, model.eval()(images).logits)


def test_old_checkpoint_without_provenance_loads(tmp_path: Path) -> None:
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
